"""Adaptive gradient clipping: no unit's gradient may be large compared with the unit's own weights.

Source: [B] section 4.1, equation 3, and the reference code. A unit is what feeds one output: dimension 0 of a
weight in torch's layout, or a whole gain or bias vector. Call it after `loss.backward()`, before any
optimizer. Parameters that FSDP2 shards (DTensors) are clipped as one process would clip them; every process makes the
call and gets the same report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.optim.groups import some_names
from normfree.optim.sharded import (
    counts_here,
    is_sharded,
    local,
    shard_group,
    spread,
    sum_norms,
    sum_over,
)
from normfree.optim.units import Units

Clippable: TypeAlias = (
    nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]
)

MODES = ("agc", "norm", "value", "off")

# Floor of the gradient norm in the division; reference code.
GRADIENT_FLOOR = 1e-6


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


class _Entry(NamedTuple):
    """A parameter with its gradient, and how far that may go; 0: it is not clipped."""

    name: str
    parameter: Tensor
    grad: Tensor
    clipping: float


def unitwise_norm(tensor: Tensor) -> Tensor:
    """L2 norm of every unit of `tensor`, of the same rank so that it broadcasts against it.

    If at most one dimension differs from 1 (scalars, vectors, (1, n), (n, 1), (1, 1, 1, n)) the tensor is one
    unit and all dimensions of the result are 1. Otherwise each index of dimension 0 is a unit (an output of a
    linear layer, a filter of a convolution of any rank, grouped or not) and the result is (n, 1, ..., 1).
    Computed in float32 for half precision, in the tensor's own dtype otherwise.
    Source: reference code, whose kernels are HWIO and IO with the unit last. Its rank-3 rule (one unit for
    each pair of trailing indices) is met by no layer of the published networks and has no counterpart here.
    """
    single = _is_one_unit(tensor)
    norms = _unit_norms([tensor], shard_group([tensor]), [single])[0]
    shaped = norms.reshape(_scale_shape(norms, tensor))
    return spread(shaped, tensor, rows=not single) if is_sharded(tensor) else shaped


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
    _check_limit("clipping", clipping)
    _check_limit("eps", eps)
    entries = _entries(model_or_parameters, clipping)
    clipped = [e for e in entries if e.clipping > 0.0]
    exempt = [e.grad for e in entries if e.clipping == 0.0]
    group = shard_group(e.grad for e in entries)
    batches = [_Batch(list(members), group) for members in _by_device(clipped).values()]
    grad_norm = _checked_total(
        [batch.counted(batch.grad_norm) for batch in batches],
        _tensor_norms(exempt, group),
        entries,
        error_if_nonfinite,
        group,
    )
    counts = [batch.clip_(eps).to(grad_norm.device) for batch in batches]
    if group is None:
        units = sum(batch.grad_norm.numel() for batch in batches)
    else:
        units = sum(1 if _is_one_unit(e.grad) else e.grad.shape[0] for e in clipped)
    fraction = _total(counts, group) / units if units else torch.zeros_like(grad_norm)
    return ClipReport(fraction.to(torch.float32), units, grad_norm)


def clip_grad_(
    model_or_parameters: Clippable,
    *,
    mode: str,
    clipping: float,
    eps: float = 1e-3,
    error_if_nonfinite: bool = True,
) -> ClipReport:
    """Clip gradients in place by one of four rules, so that they can be compared under one option.

    mode: "agc" is `adaptive_clip_grad_`. "norm" and "value" are torch's clipping of the global norm (one
        unit) and of every element (each a unit); `clipping` is then the bound in gradient units, and applies
        to all parameters, since the groups' own values are meant for "agc". "off" changes nothing.
    In every mode Inf and NaN raise NonFiniteGradientError first. With `error_if_nonfinite=False`, "norm" and
    "value" treat them as torch does. Other arguments, result and errors as for `adaptive_clip_grad_`; an
    unknown mode raises ValueError, and so does `clipping=0` for "norm" and "value": it would erase the gradient.
    """
    if mode not in MODES:
        near = get_close_matches(mode, MODES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"Clipping mode {mode!r} is unknown. Allowed: {', '.join(map(repr, MODES))}. Nearest: {near!r}."
        )
    if mode == "agc":
        return adaptive_clip_grad_(
            model_or_parameters, clipping, eps=eps, error_if_nonfinite=error_if_nonfinite
        )
    _check_limit("clipping", clipping)
    if clipping == 0.0 and mode != "off":
        raise ValueError(
            f"clipping is 0 with mode {mode!r}. It must be above 0, or every gradient is erased. "
            "Pass mode='off'."
        )
    entries = _entries(model_or_parameters, clipping)
    group = shard_group(e.grad for e in entries)
    norms = _tensor_norms([e.grad for e in entries], group)
    grad_norm = _checked_total([], norms, entries, error_if_nonfinite, group)
    parameters = [_plain(e) for e in entries]
    fraction, units = torch.zeros_like(grad_norm, dtype=torch.float32), 0
    if mode == "norm" and entries:
        fraction, units = (grad_norm > clipping).to(torch.float32), 1
        torch.nn.utils.clip_grads_with_norm_(parameters, clipping, grad_norm)
    elif mode == "value" and entries:
        units = sum(e.grad.numel() for e in entries)
        above = [
            torch.count_nonzero(local(e.grad).abs() > clipping).to(grad_norm.device)
            for e in entries
            if group is None or counts_here(e.grad, group)
        ]
        fraction = (_total(above, group) / units).to(torch.float32)
        torch.nn.utils.clip_grad_value_(parameters, clipping)
    return ClipReport(fraction, units, grad_norm)


class _Batch:
    """The gradients to clip on one device, with the norms of all their units that lie here in one vector.

    `group`: see `shard_group`. A unit that several processes hold, or know, is counted by the first of them.
    """

    def __init__(self, entries: list[_Entry], group: Any) -> None:
        self.entries, self.group = entries, group
        self.single = [_is_one_unit(e.grad) for e in entries]
        self.sizes = [1 if one else len(local(e.grad)) for e, one in zip(entries, self.single, strict=True)]
        self.units = self._native([e.grad for e in entries])
        self.grad_norm = self.units.norms() if self.units else self._norms([e.grad for e in entries])

    def _native(self, tensors: list[Tensor]) -> Units | None:
        return Units(tensors, self.sizes) if self.group is None and Units.takes(tensors) else None

    def _norms(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(_unit_norms(tensors, self.group, self.single))

    def counted(self, values: Tensor) -> Tensor:
        """`values`, one for each unit, with 0 for those that another process counts."""
        if self.group is None:
            return values
        first = torch.distributed.get_rank(self.group) == 0
        here = [counts_here(e.grad, self.group) and (first or not _is_one_unit(e.grad)) for e in self.entries]
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
            torch._foreach_mul_([g for g, _ in pairs], [s.view(_scale_shape(s, g)) for g, s in pairs])

    def _clipping(self) -> float | Tensor:
        """One number if all groups agree, else one for each unit."""
        values = [e.clipping for e in self.entries]
        if len(set(values)) == 1:
            return values[0]
        like = self.grad_norm
        repeats = torch.tensor(self.sizes, device=like.device)
        each = torch.tensor(values, dtype=like.dtype, device=like.device)
        return each.repeat_interleave(repeats, output_size=like.numel())


def _entries(source: Clippable, clipping: float) -> list[_Entry]:
    """Every parameter with a gradient, once, with its name and its own clipping."""
    entries: list[_Entry] = []
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
        entries.append(_Entry(called, parameter, grad, own))
    return entries


def _walk(source: Clippable, clipping: float) -> Iterator[tuple[str | None, Tensor, float]]:
    if isinstance(source, nn.Module):
        source = source.named_parameters()
    for item in [source] if isinstance(source, Tensor) else source:
        if isinstance(item, Tensor):
            yield None, item, clipping
        elif isinstance(item, Mapping) and "params" in item:
            own = item.get("clipping", clipping)
            _check_limit("clipping", own)
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


def _check_limit(what: str, value: float) -> None:
    if not value >= 0.0:
        published = {"clipping": 0.01, "eps": 1e-3}[what]
        raise ValueError(f"{what} is {value}. It must be 0 or more. The published value is {published}.")


def _checked_total(
    here: list[Tensor], whole: list[Tensor], entries: list[_Entry], error_if_nonfinite: bool, group: Any
) -> Tensor:
    """Global norm from norms of which each process has its own (`here`) and norms that all know (`whole`).

    Looks for the culprits only when it is not finite.
    """
    if not entries:
        return torch.zeros(())
    norms = [sum_over(n.double().square().sum(), group).sqrt() for n in here] if group is not None else here
    device = entries[0].grad.device
    flat = [n.reshape(-1).to(device) for n in norms + whole]
    total = torch.linalg.vector_norm(torch.cat(flat))
    if group is not None:
        total = total.to(torch.promote_types(entries[0].grad.dtype, torch.float32))
    if error_if_nonfinite and not torch.isfinite(total):
        each = _tensor_norms([e.grad for e in entries], group)
        names = [e.name for e, norm in zip(entries, each, strict=True) if not torch.isfinite(norm)]
        if names:
            raise NonFiniteGradientError(names, len(entries))
    return total


def _total(counts: list[Tensor], group: Any) -> Tensor:
    """The sum of counts, over all processes if there are several."""
    total = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long)
    return total if group is None else sum_over(total, group)


def _plain(entry: _Entry) -> Tensor:
    """The parameter with its gradient as torch's own functions take them: of a DTensor, the rows that lie here."""
    if not is_sharded(entry.parameter):
        return entry.parameter
    rows = local(entry.parameter).detach()
    rows.grad = local(entry.grad)
    return rows


def _by_device(entries: list[_Entry]) -> dict[torch.device, list[_Entry]]:
    sorted_out: dict[torch.device, list[_Entry]] = defaultdict(list)
    for entry in entries:
        sorted_out[entry.grad.device].append(entry)
    return sorted_out


def _is_one_unit(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)  # at most one dimension is not 1


def _scale_shape(values: Tensor, tensor: Tensor) -> tuple[int, ...]:
    """Shape in which `values`, one for each unit, broadcast against `tensor`, keeping every dimension."""
    return (len(values), *(1,) * (tensor.ndim - 1)) if tensor.ndim else ()


@torch.no_grad()
def _unit_norms(tensors: list[Tensor], group: Any, single: list[bool]) -> list[Tensor]:
    """One vector of unit norms per tensor: a reduction for each matrix, one call for all that are a `single` unit."""
    whole = iter(_tensor_norms([t for t, one in zip(tensors, single, strict=True) if one], group))
    return [
        next(whole).reshape(1)
        if one
        else torch.linalg.vector_norm(local(t), dim=tuple(range(1, t.ndim)), dtype=_norm_dtype(t))
        for t, one in zip(tensors, single, strict=True)
    ]


@torch.no_grad()
def _tensor_norms(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """0-dim norm of each whole tensor, by one multi-tensor call for each device and dtype."""
    whole, tensors = tensors, [local(t) for t in tensors]
    norms: list[Tensor | None] = [None] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(index)
    for indices in alike.values():
        members = [tensors[i] for i in indices]
        for i, norm in zip(indices, torch._foreach_norm(members, 2, _norm_dtype(members[0])), strict=True):
            norms[i] = norm
    found = [norm for norm in norms if norm is not None]
    return found if group is None else sum_norms(found, whole, group)


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
