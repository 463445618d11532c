"""normfree.optim.named_state."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

import torch
from torch import Tensor

from normfree.suggest import some_names


def copy_named_(targets: Mapping[str, Tensor], source: Mapping[str, Tensor], *, owner: str) -> None:
    """Copy every tensor of `source` into the tensor of the same name in `targets`, in place.

    Dtype, device and memory layout of the targets stay. `owner` says in the error whose names these are.
    Raises ValueError that lists unknown names, missing names and different shapes, before anything is copied.
    """
    problems: list[str] = []
    unknown = [name for name in source if name not in targets]
    missing = [name for name in targets if name not in source]
    shapes = [
        f"{name!r} is {tuple(source[name].shape)} instead of {tuple(target.shape)}"
        for name, target in targets.items()
        if name in source and source[name].shape != target.shape
    ]
    if unknown:
        problems.append(f"unknown: {some_names(unknown)}")
    if missing:
        problems.append(f"missing: {some_names(missing)}")
    if shapes:
        problems.append(f"shapes: {'; '.join(shapes[:5])}" + (" and more" if len(shapes) > 5 else ""))
    if problems:
        pairs = ((name, get_close_matches(name, list(targets), n=1)) for name in unknown[:5])
        near = ", ".join(f"{name!r} -> {close[0]!r}" for name, close in pairs if close)
        raise ValueError(
            f"The saved tensors do not fit {owner} ({', '.join(problems)}). Exactly its {len(targets)} "
            f"names and shapes are allowed. Nearest: {near or 'the tensors saved from the same network'}."
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])
