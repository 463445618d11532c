"""The whole update in two launches: clipping, SGD and EMA in one sweep over memory.

The first launch reads the gradients for their norms. The second reads weights, gradients, momentum and average once,
writes all but the gradients back, and writes nothing when the global norm is not finite. Together 32 bytes per
parameter. `fused_triton` has the CUDA kernels, `native/update.c` those for CPUs; the same result comes from
`clip_grad_`, `SGD.step` and `Ema.update_`.
"""

from __future__ import annotations

import importlib.util
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from normfree.native.dispatch import same_layout
from normfree.native.library import library, run
from normfree.native.table import COLUMNS, owner_of
from normfree.optim.dtensor import is_sharded
from normfree.optim.ema import Ema, ema_decay
from normfree.optim.named_gradients import ClipReport, NonFiniteGradientError
from normfree.optim.sgd import SGD

#: Elements that a program takes at a time, and its warps: eight for each lane, two 16-byte accesses per tensor.
BLOCK, WARPS = 2048, 8


class _Entry(NamedTuple):
    name: str
    group: int
    parameter: Tensor
    average: Tensor | None
    units: int
    stride: tuple[int, ...]


def fused_update(
    optimizer: SGD, *, model: nn.Module, ema: Ema | None = None, eps: float = 1e-3
) -> FusedUpdate | None:
    """A `FusedUpdate` where one can do the whole work, else None: then the three plain calls are the way.

    It takes groups as `parameter_groups` makes them, and a CUDA device with Triton, or a CPU with the compiled kernels
    of `normfree.native`; for the rest see `FusedUpdate.fits`.
    """
    groups = optimizer.param_groups
    devices = {p.device.type for group in groups for p in group["params"]}
    kind: type[FusedUpdate]
    if devices == {"cuda"} and importlib.util.find_spec("triton") is not None:
        kind = FusedUpdate
    elif devices == {"cpu"} and library() is not None:
        kind = NativeUpdate
    else:
        return None
    if not all("param_names" in group and "clipping" in group for group in groups):
        return None
    update = kind(optimizer, model=model, ema=ema, eps=eps)
    return update if update.fits() else None


class FusedUpdate:
    """Clips, decays, steps and averages all parameters of `optimizer` that have a gradient.

    A step is the same as `clip_grad_(optimizer.param_groups, mode="agc", ...)`, `optimizer.step()` and
    `ema.update_(model, step=step)`, to rounding, except that the gradients are only read. The groups' settings are
    read at every step. Momentum lives in the optimizer and the average in `ema`, as without it.

    optimizer: built from groups with names and `clipping`, as `parameter_groups` makes them.
    model: whose parameters and buffers `ema` averages.
    eps: as for `adaptive_clip_grad_`.
    For a CUDA graph: one step outside, capture `launch_`, then call `set_numbers_` before each replay.
    Source: [B] sections 4.1 and 4.3, reference code.
    """

    def __init__(
        self, optimizer: SGD, *, model: nn.Module, ema: Ema | None = None, eps: float = 1e-3
    ) -> None:
        self.optimizer, self.model, self.ema, self.eps = optimizer, model, ema, eps
        averages: dict[int, Tensor] = {}
        if ema is not None:
            shadow = dict(ema.module.named_parameters())
            averages = {id(p): shadow[name] for name, p in model.named_parameters()}
        self._all: list[_Entry] = []
        for index, group in enumerate(optimizer.param_groups):
            for name, p in zip(group["param_names"], group["params"], strict=True):
                units = p.shape[0] if len(_layout(p)) > 1 else 1
                self._all.append(_Entry(name, index, p, averages.get(id(p)), units, p.stride()))
        device = self._all[0].parameter.device
        #: What a step depends on besides tensors, on the device: see `normfree.optim.fused_triton`.
        self.numbers = torch.zeros(1 + 5 * len(optimizer.param_groups), device=device)
        #: Which of `_all` have a gradient, in order, and whether 16-byte accesses to them are sound.
        self._plan: list[tuple[int, bool]] = []
        self._rows: list[list[int]] = []
        self._firsts: list[int] = []
        self._others: list[tuple[Tensor, Tensor]] = []
        self._late = False  # whether the table on the device still has to get its rows
        self._set_plan([])

    def fits(self) -> bool:
        """Whether the kernels can do all the work: one device, float32, momentum in every group, no shards, no gaps
        in memory, dimension 0 outermost, and the average laid out as the weights."""
        return (
            len({e.parameter.device for e in self._all}) == 1
            and all(group["momentum"] for group in self.optimizer.param_groups)
            and all(
                e.parameter.dtype == torch.float32
                and not is_sharded(e.parameter)
                and _units_are_runs(e.parameter)
                and (e.average is None) == (self.ema is None)
                and (e.average is None or same_layout(e.average, e.parameter))
                for e in self._all
            )
        )

    def step_(self, *, step: int, error_if_nonfinite: bool = True) -> ClipReport:
        """One step; `step` (from 0) sets the decay of the average. Returns what `adaptive_clip_grad_` would.

        error_if_nonfinite: raise NonFiniteGradientError for Inf and NaN, which waits for the device, though only
            after all work is under way. If False, such a step changes nothing and `grad_norm` tells.
        A global norm beyond float32 counts as not finite. Raises ValueError for a sparse gradient.
        """
        self.set_numbers_(step=step)
        report = self.launch_()
        if error_if_nonfinite:
            self.check(report)
        return report

    def check(self, report: ClipReport) -> None:
        """Raises NonFiniteGradientError if the gradients of `report`, which still lie with the parameters, were not
        finite. Waits for the device."""
        if not torch.isfinite(report.grad_norm):
            grads = {e.name: e.parameter.grad for e in self._all if e.parameter.grad is not None}
            names = [name for name, grad in grads.items() if not torch.isfinite(grad.norm())]
            raise NonFiniteGradientError(names or list(grads), len(grads))

    def set_numbers_(self, *, step: int) -> None:
        """Copies the groups' settings, and the weight of the average's `step`, to the device."""
        from normfree.optim.fused_triton import GROUP_NUMBERS

        weight = 0.0
        if self.ema is not None:
            weight = 1.0 - ema_decay(step, decay=self.ema.decay, ramp=self.ema.ramp)
        groups = self.optimizer.param_groups
        values = [weight, *(float(group[name]) for group in groups for name in GROUP_NUMBERS)]
        _upload_(self.numbers, values)
        self._send_table()

    @torch.no_grad()
    def launch_(self) -> ClipReport:
        """The step itself, with the numbers that lie on the device. Waits for nothing."""
        grads = self._set_table()
        if not grads:
            zero = torch.zeros_like(self.numbers[0])
            self._average_others_(zero)
            return ClipReport(zero, 0, zero)
        squares = torch.empty(len(self._owner), device=self.numbers.device)
        clipped = torch.empty(len(self._owner), dtype=torch.int8, device=self.numbers.device)
        self._square_(squares)
        grad_norm = squares.sum().sqrt_()
        self._update_(squares, grad_norm, clipped)
        del grads  # some may be copies in the layout of their parameter, which had to live until here
        self._average_others_(grad_norm)
        groups, planned = self.optimizer.param_groups, [self._all[index] for index, _ in self._plan]
        units = sum(e.units for e in planned if groups[e.group]["clipping"] > 0.0)
        fraction = clipped.sum() / units if units else torch.zeros_like(grad_norm)
        return ClipReport(fraction.to(torch.float32), units, grad_norm)

    def _square_(self, squares: Tensor) -> None:
        """The first launch: the sum of squares of every unit's gradient."""
        from normfree.optim import fused_triton

        with torch.cuda.device_of(self.numbers):
            for start, count, hint in self._launches():
                fused_triton.unit_squares[(count,)](
                    self._table, self._owner, squares, start,
                    BLOCK=BLOCK, ALIGNED=hint, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip

    def _update_(self, squares: Tensor, grad_norm: Tensor, clipped: Tensor) -> None:
        """The second launch: all the rest, and who was clipped; nothing if `grad_norm` is not finite."""
        from normfree.optim import fused_triton

        with torch.cuda.device_of(self.numbers):
            for start, count, hint in self._launches():
                fused_triton.update[(count,)](
                    self._table, self._owner, self.numbers, squares, grad_norm, clipped, start, self.eps,
                    BLOCK=BLOCK, ALIGNED=hint, EMA=self.ema is not None, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip

    def _launches(self) -> list[tuple[int, int, bool]]:
        """First unit, number of units, and whether 16-byte accesses to them are sound."""
        halves = [(0, self._aligned, True), (self._aligned, len(self._owner) - self._aligned, False)]
        return [half for half in halves if half[1]]

    def _set_table(self) -> list[Tensor]:
        """Brings the tables up to date; returns the gradients that they point to."""
        found: list[tuple[int, bool, list[int]]] = []
        grads = []
        for index, entry in enumerate(self._all):
            p = entry.parameter
            if p.grad is None or p.numel() == 0:
                continue
            if p.stride() != entry.stride:
                raise ValueError(
                    f"The memory format of {entry.name!r} has changed since the update was made. Its average lies "
                    "in the old one. Change formats first, then make Ema and update."
                )
            grads.append(_laid_out(p.grad, entry))
            momentum = self.optimizer.state[p].get("momentum_buffer")
            if momentum is None or not same_layout(momentum, p):
                momentum = self.optimizer.named_state()[entry.name]  # makes it
            average = momentum if entry.average is None else entry.average
            pointers = [t.data_ptr() for t in (p, grads[-1], momentum, average)]
            length = p.numel() // entry.units
            aligned = length % 4 == 0 and all(pointer % 16 == 0 for pointer in pointers)
            found.append((index, aligned, [*pointers, length]))
        found.sort(key=lambda item: not item[1])
        plan = [(index, aligned) for index, aligned, _ in found]
        if plan != self._plan:
            self._set_plan(plan)
        rows = [
            [*row, first, self._all[index].group, 0]
            for (index, _, row), first in zip(found, self._firsts, strict=True)
        ]
        if rows != self._rows:
            self._rows, self._late = rows, True
            self._send_table()
        return grads

    def _send_table(self) -> None:
        """Copies the rows to the device, unless a graph is captured: what is captured must not depend on the host."""
        if self._late and not _capturing(self.numbers):
            _upload_(self._table, self._rows)
            self._late = False

    def _set_plan(self, plan: list[tuple[int, bool]]) -> None:
        """New tables, for another set of tensors."""
        if _capturing(self.numbers):
            raise ValueError(
                "Other gradients exist than at the last step, while a CUDA graph is captured. The same ones must, "
                "since the graph holds the addresses of their tables. Make one such step before the capture."
            )
        self._plan, self._rows = plan, []
        entries = [self._all[index] for index, _ in plan]
        units = [e.units for e in entries]
        self._firsts = list(accumulate(units, initial=0))[:-1]
        self._elements = sum(e.parameter.numel() for e in entries)
        self._aligned = sum(e.units for e, (_, aligned) in zip(entries, plan, strict=True) if aligned)
        device = self.numbers.device
        self._table = torch.zeros(len(plan), COLUMNS, dtype=torch.int64, device=device)
        self._owner = owner_of(units).to(device)
        self._others = []
        if self.ema is not None:
            done = {id(e.parameter) for e in entries}
            source, shadow = (
                dict(net.named_parameters()) | dict(net.named_buffers())
                for net in (self.model, self.ema.module)
            )
            self._others = [(t, shadow[name]) for name, t in source.items() if id(t) not in done]

    def _average_others_(self, grad_norm: Tensor) -> None:
        """What the optimizer does not move: frozen weights, parameters without a gradient, buffers."""
        finite = torch.isfinite(grad_norm)
        weight = torch.where(finite, self.numbers[0], 0.0)
        for tensor, average in self._others:
            if average.is_floating_point():
                average.lerp_(tensor.to(average), weight.to(average.dtype))
            else:
                average.copy_(torch.where(finite, tensor, average))


class NativeUpdate(FusedUpdate):
    """The same on a CPU, by the kernels of `normfree.native`."""

    def _square_(self, squares: Tensor) -> None:
        self._run("unit_squares", self._table, self._owner, squares)

    def _update_(self, squares: Tensor, grad_norm: Tensor, clipped: Tensor) -> None:
        if not torch.isfinite(grad_norm):
            clipped.zero_()
            return
        averages = int(self.ema is not None)
        self._run("update", self._table, self._owner, self.numbers, squares, clipped, self.eps, averages)

    def _run(self, name: str, *arguments: Tensor | float) -> None:
        run(name, *arguments, count=len(self._owner), elements=self._elements)


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions that are not 1. Equal lists: element i in memory is the same element."""
    return [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def _units_are_runs(tensor: Tensor) -> bool:
    """Whether memory has no gaps and dimension 0, if there are units along it, is the outermost."""
    layout = _layout(tensor)
    expected = 1
    for n, s in sorted(layout, key=lambda pair: pair[1]):
        if s != expected:
            return False
        expected *= n
    return len(layout) < 2 or tensor.shape[0] == 1 or layout[0][1] == max(s for _, s in layout)


def _laid_out(grad: Tensor, entry: _Entry) -> Tensor:
    """The gradient in float32 and the memory format of its parameter; itself if it is so."""
    if grad.layout != torch.strided:
        raise ValueError(
            f"The gradient of {entry.name!r} is sparse. Clipping takes dense gradients only. Build the "
            "layer with sparse=False."
        )
    if grad.dtype == torch.float32 and same_layout(grad, entry.parameter):
        return grad
    return torch.empty_like(entry.parameter).copy_(grad)


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _upload_(target: Tensor, values: list[float] | list[list[int]]) -> None:
    """Copies numbers to the device without a wait: from memory of its own each time, which torch reuses when it may."""
    source = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(source, non_blocking=True)
