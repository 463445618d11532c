"""Adaptive gradient clipping: no unit's gradient may be large compared with the unit's own weights.

Source: [B] section 4.1, equation 3, and the reference code. A unit is what feeds one output: dimension 0 of a
weight in torch's layout, or a whole gain or bias vector. Call it after `loss.backward()`, before any
optimizer. Parameters that FSDP2 shards (DTensors) are clipped as one process would clip them; every process makes the
call and gets the same report.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.optim.dtensor import (
    counts_here,
    local,
    shard_group,
)
from normfree.optim.named_gradients import (
    Clippable,
    ClipReport,
    NamedGradient,
    check_limit,
    checked_total,
    named_gradients,
    total_over_devices,
)
from normfree.optim.units import Units, is_one_unit, scale_shape, tensor_norms, unit_norms

# Floor of the gradient norm in the division; reference code.
GRADIENT_FLOOR = 1e-6


def adaptive_clip_grad_(
    model_or_parameters: Clippable,
    clipping: float = 0.01,
    *,
    eps: float = 1e-3,
    error_if_nonfinite: bool = True,
) -> ClipReport:
    """Scale down, in place, the gradient of every unit whose norm exceeds `clipping` times its weights' norm.

    Per unit: n = max(|p|, eps); if |g| > clipping * n then g *= clipping * n / max(|g|, 1e-6). The other
    units keep their gradient bit for bit. Norms are float32 or better whatever the dtype of the gradients.
    `eps` lets weights that start at zero move.

    model_or_parameters: a module, a tensor, tensors, (name, tensor) pairs, or parameter groups as
        `parameter_groups` makes and `optimizer.param_groups` holds. A group's own `clipping` takes
        precedence; 0.0 means not clipped. A module or bare tensors are clipped entirely, so exempt the
        classifier's weight, as the paper does, by passing groups. Parameters without a gradient are skipped.
    clipping: 0.01 suits batches of 1024 to 4096; smaller batches want more ([B] section 4.1).
    error_if_nonfinite: raise for Inf and NaN before anything changes; this is the only time the host waits
        for the device. If False, units that are not finite stay as they are and do not count as clipped.
    Raises NonFiniteGradientError, and ValueError for negative arguments, sparse gradients and other inputs.
    Source: [B] section 4.1, reference code.
    """
    check_limit("clipping", clipping)
    check_limit("eps", eps)
    entries = named_gradients(model_or_parameters, clipping)
    clipped = [e for e in entries if e.clipping > 0.0]
    exempt = [e.grad for e in entries if e.clipping == 0.0]
    group = shard_group(e.grad for e in entries)
    batches = [_Batch(list(members), group) for members in _by_device(clipped).values()]
    grad_norm = checked_total(
        [batch.counted(batch.grad_norm) for batch in batches],
        tensor_norms(exempt, group),
        entries,
        error_if_nonfinite,
        group,
    )
    counts = [batch.clip_(eps).to(grad_norm.device) for batch in batches]
    if group is None:
        units = sum(batch.grad_norm.numel() for batch in batches)
    else:
        units = sum(1 if is_one_unit(e.grad) else e.grad.shape[0] for e in clipped)
    fraction = total_over_devices(counts, group) / units if units else torch.zeros_like(grad_norm)
    return ClipReport(fraction.to(torch.float32), units, grad_norm)


class _Batch:
    """The gradients to clip on one device, with the norms of all their units that lie here in one vector.

    `group`: see `shard_group`. A unit that several processes hold, or know, is counted by the first of them.
    """

    def __init__(self, entries: list[NamedGradient], group: Any) -> None:
        self.entries, self.group = entries, group
        self.single = [is_one_unit(e.grad) for e in entries]
        self.sizes = [1 if one else len(local(e.grad)) for e, one in zip(entries, self.single, strict=True)]
        self.units = self._native([e.grad for e in entries])
        self.grad_norm = self.units.norms() if self.units else self._norms([e.grad for e in entries])

    def _native(self, tensors: list[Tensor]) -> Units | None:
        return Units(tensors, self.sizes) if self.group is None and Units.takes(tensors) else None

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(unit_norms(tensors, self.group, self.single))

    def counted(self, values: Tensor) -> Tensor:
        """`values`, one for each unit, with 0 for those that another process counts."""
        if self.group is None:
            return values
        first = torch.distributed.get_rank(self.group) == 0
        here = [counts_here(e.grad, self.group) and (first or not is_one_unit(e.grad)) for e in self.entries]
        mask = torch.tensor([h for h, size in zip(here, self.sizes, strict=True) for _ in range(size)])
        return torch.where(mask.to(values.device), values, torch.zeros_like(values))

    @torch.no_grad()
    def clip_(self, eps: float) -> Tensor:
        """Scale the gradients; returns the number of units counted here that were over their limit."""
        parameters = [e.parameter for e in self.entries]
        units = self._native(parameters)
        weights = units.norms() if units else self._norms(parameters)
        limit = weights.clamp_(min=eps) * self._clipping()
        # An infinite norm is reached only if errors are off: infinity times limit / infinity would be NaN.
        over = (self.grad_norm > limit) & torch.isfinite(self.grad_norm)
        scale = torch.where(over, limit / self.grad_norm.clamp(min=GRADIENT_FLOOR), 1.0)
        if self.units:
            self.units.scale_(scale)
        else:
            self._scale_(scale, over)
        return self.counted(over).sum()

    def _scale_(self, scale: Tensor, over: Tensor) -> None:
        grads = [local(e.grad) for e in self.entries]
        pairs = list(zip(grads, scale.split(self.sizes), strict=True))
        if scale.device.type == "cpu":
            # Reading a number is free here, and a tensor that keeps its gradient need not pass through memory.
            before = F.pad(over.cumsum(0), (1, 0))[F.pad(torch.tensor(self.sizes).cumsum(0), (1, 0))]
            pairs = [pair for pair, hits in zip(pairs, before.diff().tolist(), strict=True) if hits]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [s.view(scale_shape(s, g)) for g, s in pairs])

    def _clipping(self) -> float | Tensor:
        """One number if all groups agree, else one for each unit."""
        values = [e.clipping for e in self.entries]
        if len(set(values)) == 1:
            return values[0]
        like = self.grad_norm
        repeats = torch.tensor(self.sizes, device=like.device)
        each = torch.tensor(values, dtype=like.dtype, device=like.device)
        return each.repeat_interleave(repeats, output_size=like.numel())


def _by_device(entries: list[NamedGradient]) -> dict[torch.device, list[NamedGradient]]:
    sorted_out: dict[torch.device, list[NamedGradient]] = defaultdict(list)
    for entry in entries:
        sorted_out[entry.grad.device].append(entry)
    return sorted_out
