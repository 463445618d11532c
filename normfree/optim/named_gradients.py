"""Gradients with the names of their parameters, from any input that clipping accepts; its report and its errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from normfree.optim.units import UnitNorms
from normfree.suggest import problem, some_names

# What clipping accepts: a module, a tensor, tensors, (name, tensor) pairs, or parameter groups.
Clippable: TypeAlias = (
    nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
)


class NonFiniteGradientError(ValueError):
    """A gradient contains Inf or NaN. No gradient was changed.

    Args:
        names: the parameters whose gradients are not finite.
        total: number of all gradients.

    Attributes:
        names: the parameters, as a tuple.
        total: number of all gradients.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([[float("inf"), 0.0]])).sum().backward()
        >>> try:
        ...     normfree.adaptive_clip_grad_(model)
        ... except normfree.NonFiniteGradientError as error:
        ...     print(error.names)
        ('weight',)
    """

    def __init__(self, names: list[str], total: int) -> None:
        self.names, self.total = tuple(names), total
        super().__init__(
            problem(
                f"{len(names)} of {total} gradients are not finite: {some_names(names)}; none was changed",
                allowed="finite gradients",
                fix="skip this step or lower the learning rate; under a GradScaler pass error_if_nonfinite=False",
            )
        )


@dataclass(frozen=True, eq=False)
class ClipReport:
    """Result of a clipping call.

    The tensors stay on the device of the gradients, so that the host waits for the device only if it reads them.

    Attributes:
        fraction: 0-dim, the fraction of the `units` that was clipped, in [0, 1]; `float(report)` returns it.
        units: number of units that clipping applied to.
        grad_norm: 0-dim, global L2 norm of all gradients before clipping.

    Examples:
        >>> import torch
        >>> weight = torch.ones(2, 4, requires_grad=True)
        >>> weight.grad = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.01]])
        >>> report = normfree.adaptive_clip_grad_(weight, 0.01)  # the limit of each row is 0.02
        >>> float(report), report.units, round(report.grad_norm.item(), 3)
        (0.5, 2, 3.0)
    """

    fraction: Tensor
    units: int
    grad_norm: Tensor

    def __float__(self) -> float:
        return float(self.fraction)


class NamedGradient(NamedTuple):
    """A parameter with its name, its gradient and its clipping factor λ; 0 means not clipped."""

    name: str
    parameter: Tensor
    grad: Tensor
    clipping: float


def named_gradients(source: Clippable, clipping: float) -> list[NamedGradient]:
    """Return each parameter that has a gradient, once, in order.

    Args:
        source: see `Clippable`. Parameters without a name are called "parameter INDEX of shape SHAPE".
        clipping: factor of the parameters whose group has none of its own.

    Raises:
        ValueError: a gradient is sparse, a group's clipping is negative, or `source` is of another type.
    """
    entries: list[NamedGradient] = []
    seen: set[int] = set()
    for index, (name, parameter, own) in enumerate(_walk(source, clipping)):
        grad = parameter.grad
        if grad is None or grad.numel() == 0 or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        called = name if name is not None else f"parameter {index} of shape {tuple(parameter.shape)}"
        if grad.layout != torch.strided:
            raise ValueError(sparse_gradient(called))
        entries.append(NamedGradient(called, parameter, grad, own))
    return entries


def _walk(source: Clippable, clipping: float) -> Iterator[tuple[str | None, Tensor, float]]:
    """Yield (name or None, parameter, clipping) for every parameter of `source`."""
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
                problem(
                    f"cannot clip an object of type {type(item).__name__}",
                    allowed="a module, a tensor, tensors, (name, tensor) pairs, or parameter groups",
                    fix="pass model.named_parameters() or optimizer.param_groups",
                )
            )


def sparse_gradient(name: str) -> str:
    """Return the error message for a sparse gradient of the parameter `name`."""
    given = f"the gradient of {name!r} is sparse"
    return problem(given, allowed="dense gradients", fix="build the layer with sparse=False")


def check_limit(argument: str, value: float) -> None:
    """Raise ValueError if the argument "clipping" or "eps" is negative or NaN."""
    if not value >= 0.0:
        published = {"clipping": 0.01, "eps": 1e-3}[argument]
        fix = f"pass {argument}={published}, the published value"
        raise ValueError(problem(f"{argument} is {value}", allowed="0 or more", fix=fix))


def raise_if_nonfinite(grad_norm: Tensor, entries: list[NamedGradient], norms: UnitNorms) -> None:
    """Raise NonFiniteGradientError if the global norm is not finite because a gradient is not.

    The host waits for the device. A norm that overflows although every gradient is finite raises nothing.
    """
    if torch.isfinite(grad_norm):
        return
    each = norms.tensor_norms([e.grad for e in entries])
    names = [e.name for e, norm in zip(entries, each, strict=True) if not torch.isfinite(norm)]
    if names:
        raise NonFiniteGradientError(names, len(entries))
