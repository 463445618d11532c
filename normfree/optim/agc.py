"""Adaptive gradient clipping (AGC): bound the gradient of each unit by the norm of the unit's weights.

Source: [B] section 4.1, equation 3, and the reference code.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from normfree.optim.dtensor import norms_for
from normfree.optim.named_gradients import (
    Clippable,
    ClipReport,
    NamedGradient,
    check_limit,
    named_gradients,
    raise_if_nonfinite,
)
from normfree.optim.units import Units

# Lower bound of the gradient norm in the division; reference code.
GRADIENT_FLOOR = 1e-6


def unitwise_norm(tensor: Tensor, *, unit: str = "filter") -> Tensor:
    """Compute the L2 norm of every unit of a tensor.

    A tensor with at most one dimension other than 1 (scalars, vectors, (1, n), (n, 1), (1, 1, 1, n)) is one unit.
    Otherwise each index of dimension 0 is a unit: an output of a linear layer, a filter of a convolution of any rank,
    grouped or not. With unit="tensor" every tensor is one unit.

    Args:
        tensor: a weight, gain or bias, or its gradient, in torch's layout.
        unit: "filter" or "tensor".

    Returns:
        The norms in a shape that broadcasts against `tensor`: (n, 1, ..., 1), or all ones for a single unit. In float32
        for half precision, else in the dtype of the tensor.

    Source: reference code, whose weights are HWIO and IO with the unit last. Its rank-3 rule (one unit for each pair of
    trailing indices) applies to no layer of the published networks and has no counterpart here.
    """
    return norms_for([tensor], unit=unit).unitwise(tensor)


def adaptive_clip_grad_(
    model_or_parameters: Clippable,
    clipping: float = 0.01,
    *,
    eps: float = 1e-3,
    unit: str = "filter",
    error_if_nonfinite: bool = True,
) -> ClipReport:
    """Scale down, in place, the gradient of every unit whose norm exceeds `clipping` times the norm of its weights.

    For the weights p of a unit and their gradient g, with n = max(|p|, eps): if |g| > clipping * n, then
    g *= clipping * n / max(|g|, 1e-6). The gradients of the other units keep every bit. Call it after `backward()` and
    before any optimizer step, on gradients summed over micro-batches and processes.

    Parameters that FSDP2 shards are clipped as one process would clip them: every process makes the call and gets the
    same report.

    Args:
        model_or_parameters: a module, a tensor, tensors, (name, tensor) pairs, or parameter groups as
            `parameter_groups` returns and `optimizer.param_groups` holds. A group's own `clipping` takes precedence;
            0.0 means not clipped. A module or bare tensors are clipped entirely; to exempt the classifier's weight, as
            the paper does, pass groups. Parameters without a gradient are skipped.
        clipping: largest allowed ratio of the norms, λ. 0.01 suits batches of 1024 to 4096; smaller batches need
            larger values ([B] section 4.1).
        eps: lower bound of the weight norm, so that weights that start at zero can move.
        unit: "filter": each index of dimension 0 of a weight, see `unitwise_norm`. "tensor": each whole tensor.
        error_if_nonfinite: raise for Inf and NaN before anything changes, for which the host waits for the device. If
            False, units that are not finite keep their gradient and do not count as clipped.

    Returns:
        A `ClipReport`: the clipped fraction, the number of units, and the global gradient norm before clipping.

    Raises:
        NonFiniteGradientError: a gradient contains Inf or NaN; no gradient was changed.
        ValueError: `clipping` or `eps` is negative, a gradient is sparse, or the input is of another type.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> _ = model.weight.data.fill_(1.0)  # each unit (a row) has norm 2
        >>> model.weight.grad = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
        >>> report = normfree.adaptive_clip_grad_(model, 0.5)  # the limit is 0.5 * 2
        >>> model.weight.grad
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.1000, 0.0000, 0.0000, 0.0000]])
        >>> float(report), report.units
        (0.5, 2)

    Source: [B] section 4.1, equation 3; constants of the reference code.
    """
    check_limit("clipping", clipping)
    check_limit("eps", eps)
    entries = named_gradients(model_or_parameters, clipping)
    norms = norms_for([e.grad for e in entries], unit=unit)
    clipped = [e for e in entries if e.clipping > 0.0]
    groups = [(members, norms.units([e.grad for e in members])) for members in _by_device(clipped)]
    gradient_norms = [gradients.norms() for _, gradients in groups]
    grad_norm = torch.zeros(())
    if entries:
        counted = [units.counted(values) for (_, units), values in zip(groups, gradient_norms, strict=True)]
        exempt = norms.tensor_norms([e.grad for e in entries if e.clipping == 0.0])
        grad_norm = norms.global_norm(counted, exempt, entries[0].grad)
    if error_if_nonfinite:
        raise_if_nonfinite(grad_norm, entries, norms)
    counts = []
    for (members, gradients), values in zip(groups, gradient_norms, strict=True):
        weights = norms.units([e.parameter for e in members])
        over = _clip_(weights, gradients, values, _clipping(members, gradients, values), eps)
        counts.append(gradients.counted(over).sum().to(grad_norm.device))
    units = norms.count([e.grad for e in clipped])
    fraction = norms.total(counts) / units if units else torch.zeros_like(grad_norm)
    return ClipReport(fraction.to(torch.float32), units, grad_norm)


@torch.no_grad()
def _clip_(
    weights: Units, gradients: Units, gradient_norms: Tensor, clipping: float | Tensor, eps: float
) -> Tensor:
    """Clip the units of one device ([B] equation 3). Return which units were over their limit."""
    limit = weights.norms().clamp_(min=eps) * clipping
    # With error_if_nonfinite=False a norm can be infinite, and infinity * (limit / infinity) would be NaN.
    over = (gradient_norms > limit) & torch.isfinite(gradient_norms)
    scale = torch.where(over, limit / gradient_norms.clamp(min=GRADIENT_FLOOR), 1.0)
    gradients.scale_(scale, over)
    return over


def _clipping(entries: list[NamedGradient], units: Units, like: Tensor) -> float | Tensor:
    """Return the clipping factor of all units: one number if all groups agree, else one for each unit."""
    values = [e.clipping for e in entries]
    if len(set(values)) == 1:
        return values[0]
    repeats = torch.tensor(units.sizes, device=like.device)
    each = torch.tensor(values, dtype=like.dtype, device=like.device)
    return each.repeat_interleave(repeats, output_size=like.numel())


def _by_device(entries: list[NamedGradient]) -> list[list[NamedGradient]]:
    """Return the entries of each device."""
    devices: dict[torch.device, list[NamedGradient]] = defaultdict(list)
    for entry in entries:
        devices[entry.grad.device].append(entry)
    return list(devices.values())
