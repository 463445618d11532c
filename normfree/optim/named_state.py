"""Copying of tensors by name, with an error that lists every difference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normfree.suggest import closest, problem, some_names
from normfree.weights.names import shaped_as


def copy_named_(targets: Mapping[str, Tensor], source: Mapping[str, Tensor], *, owner: str) -> None:
    """Copy every tensor of `source` into the tensor of the same name in `targets`, in place.

    The targets keep their dtype, device and memory format.

    Args:
        targets: tensors by name.
        source: tensors of the same names and shapes; 0-dim tensors also fit the shape (1,).
        owner: what the error message calls the targets.

    Raises:
        ValueError: names are unknown or missing, or shapes differ; the message lists them, and nothing was copied.
    """
    source = {name: shaped_as(t, targets[name]) if name in targets else t for name, t in source.items()}
    differences: list[str] = []
    unknown = [name for name in source if name not in targets]
    missing = [name for name in targets if name not in source]
    shapes = [
        f"{name!r} is {tuple(source[name].shape)} instead of {tuple(target.shape)}"
        for name, target in targets.items()
        if name in source and source[name].shape != target.shape
    ]
    if unknown:
        differences.append(f"unknown: {some_names(unknown)}")
    if missing:
        differences.append(f"missing: {some_names(missing)}")
    if shapes:
        differences.append(f"shapes: {'; '.join(shapes[:5])}" + (" and more" if len(shapes) > 5 else ""))
    if differences:
        pairs = ((name, closest(name, targets)) for name in unknown[:5])
        near = ", ".join(f"{name!r} to {close!r}" for name, close in pairs if close)
        raise ValueError(
            problem(
                f"the saved tensors do not fit {owner} ({', '.join(differences)})",
                allowed=f"exactly its {len(targets)} names and shapes",
                fix=f"rename {near}" if near else "load tensors saved from the same network",
            )
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])
