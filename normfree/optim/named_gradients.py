"""normfree.optim.named_gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from normfree.optim.units import UnitNorms
from normfree.suggest import some_names

Clippable: TypeAlias = (
    nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
)


class NonFiniteGradientError(ValueError):
    """A gradient holds Inf or NaN. `names` lists the parameters; no gradient was changed."""

    def __init__(self, names: list[str], total: int) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{len(names)} of {total} gradients are not finite: {some_names(names)}. Only finite gradients "
            "can be applied; none was changed. Skip this step or lower the learning rate; under a "
            "GradScaler pass error_if_nonfinite=False."
        )


@dataclass(frozen=True, eq=False)
class ClipReport:
    """What a clipping call did. Its tensors stay on the device of the gradients until somebody reads them.

    fraction: 0-dim, the part of the `units` that was clipped, in [0, 1]; `float(report)` reads it.
    units: how many units were subject to clipping.
    grad_norm: 0-dim, global L2 norm of all gradients before clipping.
    """

    fraction: Tensor
    units: int
    grad_norm: Tensor

    def __float__(self) -> float:
        return float(self.fraction)


class NamedGradient(NamedTuple):
    """A parameter with its gradient, and how far that may go; 0: it is not clipped."""

    name: str
    parameter: Tensor
    grad: Tensor
    clipping: float


def named_gradients(source: Clippable, clipping: float) -> list[NamedGradient]:
    """Every parameter with a gradient, once, with its name and its own clipping."""
    entries: list[NamedGradient] = []
    seen: set[int] = set()
    for index, (name, parameter, own) in enumerate(_walk(source, clipping)):
        grad = parameter.grad
        if grad is None or grad.numel() == 0 or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        called = name if name is not None else f"parameter {index} of shape {tuple(parameter.shape)}"
        if grad.layout != torch.strided:
            raise ValueError(
                f"The gradient of {called!r} is sparse. Clipping takes dense gradients only. Build the "
                "layer with sparse=False."
            )
        entries.append(NamedGradient(called, parameter, grad, own))
    return entries


def _walk(source: Clippable, clipping: float) -> Iterator[tuple[str | None, Tensor, float]]:
    if isinstance(source, nn.Module):
        source = source.named_parameters()
    for item in [source] if isinstance(source, Tensor) else source:
        if isinstance(item, Tensor):
            yield None, item, clipping
        elif isinstance(item, Mapping) and "params" in item:
            own = item.get("clipping", clipping)
            check_limit("clipping", own)
            inner = item["params"]
            members = list(_walk(inner, own))
            names = item.get("param_names", [name for name, _, _ in members])
            yield from ((n, p, own) for n, (_, p, _) in zip(names, members, strict=True))
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Tensor):
            yield str(item[0]), item[1], clipping
        else:
            raise ValueError(
                f"Cannot clip an object of type {type(item).__name__}. Allowed: a module, a tensor, tensors, "
                "(name, tensor) pairs, or parameter groups. Pass model.named_parameters() or "
                "optimizer.param_groups."
            )


def check_limit(what: str, value: float) -> None:
    if not value >= 0.0:
        published = {"clipping": 0.01, "eps": 1e-3}[what]
        raise ValueError(f"{what} is {value}. It must be 0 or more. The published value is {published}.")


def raise_if_nonfinite(grad_norm: Tensor, entries: list[NamedGradient], norms: UnitNorms) -> None:
    """Raise NonFiniteGradientError if the global norm is not finite because of a gradient; this waits for the device.

    A norm that overflows although every gradient is finite raises nothing.
    """
    if torch.isfinite(grad_norm):
        return
    each = norms.tensor_norms([e.grad for e in entries])
    names = [e.name for e, norm in zip(entries, each, strict=True) if not torch.isfinite(norm)]
    if names:
        raise NonFiniteGradientError(names, len(entries))
