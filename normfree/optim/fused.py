"""The optimizer step in two calls of the compiled kernels, on a CPU: clipping, SGD and EMA in one pass over memory.

The first call reads the gradients for their norms. The second reads weights, gradients, momentum and average once, and
writes all of them except the gradients. Together they move 32 bytes for each parameter. `clip_grad_`, `SGD.step` and
`Ema.update` compute the same in three calls.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from normfree.native.dispatch import same_layout
from normfree.native.library import float32_memory, library, run
from normfree.native.table import PointerTable, TableEntry, pointer_table
from normfree.optim.dtensor import is_sharded
from normfree.optim.ema import Ema, ema_decay
from normfree.optim.named_gradients import ClipReport, NonFiniteGradientError, sparse_gradient
from normfree.optim.sgd import SGD
from normfree.suggest import problem

# Settings of a parameter group that the kernels read from `numbers`, after 1 - d of the average, its first element.
GROUP_NUMBERS = ("lr", "weight_decay", "momentum", "nesterov", "clipping")


class _Entry(NamedTuple):
    """A parameter with the index of its group, its average if there is one, its units, and its strides at the start."""

    name: str
    group: int
    parameter: Tensor
    average: Tensor | None
    units: int
    stride: tuple[int, ...]


class FusedUpdate:
    """Clip, decay, step and average all parameters of `optimizer` that have a gradient.

    A step equals `adaptive_clip_grad_(optimizer.param_groups)`, `optimizer.step()` and `ema.update(model)` to rounding,
    except that the gradients are only read. The settings of the groups are read at every step. Momentum is stored in
    the optimizer and the average in `ema`.

    Args:
        optimizer: built from groups with names and `clipping`, as `parameter_groups` returns them.
        model: the network whose parameters and buffers `ema` averages.
        ema: the average, or None.
        eps: as for `adaptive_clip_grad_`.

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
        # The table of the current gradients, the entries that it was built from, and the tensors without a gradient.
        self._table: PointerTable | None = None
        self._made_from: list[TableEntry] = []
        self._with_gradient: list[_Entry] = []
        self._names: list[str] | None = None
        self._others: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def create(
        cls, optimizer: SGD, *, model: nn.Module, ema: Ema | None = None, eps: float = 1e-3
    ) -> Self | None:
        """Return an update if the kernels can do all the work of `optimizer`, else None."""
        named = all("param_names" in group and "clipping" in group for group in optimizer.param_groups)
        if library() is None or not named:
            return None
        update = cls(optimizer, model=model, ema=ema, eps=eps)
        return update if update.fits() else None

    def fits(self) -> bool:
        """Return True if the kernels can process all tensors.

        They need a CPU, float32, momentum in every group, no shards, no gaps in memory, dimension 0 outermost, and the
        average in the memory format of the weights.
        """
        return all(group["momentum"] for group in self.optimizer.param_groups) and all(
            e.parameter.device.type == "cpu"
            and e.parameter.dtype == torch.float32
            and not is_sharded(e.parameter)
            and _units_are_runs(e.parameter)
            and (e.average is None) == (self.ema is None)
            and (e.average is None or same_layout(e.average, e.parameter))
            for e in self._all
        )

    @torch.no_grad()
    def step(self, *, error_if_nonfinite: bool = True) -> ClipReport:
        """Take one step and count it in `ema.num_updates`. Return what `adaptive_clip_grad_` would.

        Args:
            error_if_nonfinite: raise for Inf and NaN. If False, such a step changes no tensor but is counted, and
                `grad_norm` of the report is not finite.

        Raises:
            NonFiniteGradientError: the global norm is not finite in float32; nothing was changed.
            ValueError: a gradient is sparse, or the memory format of a parameter has changed.
        """
        numbers = self._numbers()
        table, grads = self._current_table()
        if table is None:
            report = ClipReport(torch.zeros_like(numbers[0]), 0, torch.zeros_like(numbers[0]))
        else:
            report = self._run(table, numbers)
        del grads  # some may be copies in the memory format of their parameter, needed until here
        self._average_others_(report.grad_norm, numbers[0])
        if error_if_nonfinite:
            self._raise_if_nonfinite(report)
        if self.ema is not None:
            self.ema.num_updates += 1
        return report

    def _run(self, table: PointerTable, numbers: Tensor) -> ClipReport:
        squares = float32_memory(table.units)  # of the gradient of each unit
        clipped = torch.zeros(table.units, dtype=torch.int8, device="cpu")
        size = {"count": table.units, "elements": sum(e.parameter.numel() for e in self._with_gradient)}
        run("unit_squares", table.table, table.owner, squares, **size)
        grad_norm = squares.sum().sqrt_()
        if torch.isfinite(grad_norm):
            average = int(self.ema is not None)
            run("update", table.table, table.owner, numbers, squares, clipped, self.eps, average, **size)
        groups = self.optimizer.param_groups
        units = sum(e.units for e in self._with_gradient if groups[e.group]["clipping"] > 0.0)
        fraction = clipped.sum() / units if units else torch.zeros_like(grad_norm)
        return ClipReport(fraction.to(torch.float32), units, grad_norm)

    def _raise_if_nonfinite(self, report: ClipReport) -> None:
        if not torch.isfinite(report.grad_norm):
            grads = {e.name: e.parameter.grad for e in self._all if e.parameter.grad is not None}
            names = [name for name, grad in grads.items() if not torch.isfinite(grad.norm())]
            raise NonFiniteGradientError(names or list(grads), len(grads))

    def _numbers(self) -> Tensor:
        """Return the weight of the next update of the average and the settings of all groups."""
        weight = 0.0
        if self.ema is not None:
            weight = 1.0 - ema_decay(self.ema.num_updates, decay=self.ema.decay, ramp=self.ema.ramp)
        groups = self.optimizer.param_groups
        settings = (float(group[name]) for group in groups for name in GROUP_NUMBERS)
        return torch.tensor([weight, *settings], dtype=torch.float32, device="cpu")

    def _current_table(self) -> tuple[PointerTable | None, list[Tensor]]:
        """Return the table of all gradients, and the gradients that it points to; None if there are none."""
        entries, found, grads = [], [], []
        for entry in self._all:
            p = entry.parameter
            if p.grad is None or p.numel() == 0:
                continue
            if p.stride() != entry.stride:
                raise ValueError(
                    problem(
                        f"the memory format of {entry.name!r} has changed since the update was created",
                        allowed="the format of its average",
                        fix="change formats first, then create Ema and the update",
                    )
                )
            grads.append(_laid_out(p.grad, entry))
            momentum = self.optimizer.state[p].get("momentum_buffer")
            if momentum is None or not same_layout(momentum, p):
                momentum = self.optimizer.named_state()[entry.name]  # creates it
            average = momentum if entry.average is None else entry.average
            w, g, m, e = (t.data_ptr() for t in (p, grads[-1], momentum, average))
            found.append(TableEntry((w, g, m, e), entry.units, p.numel() // entry.units, extra=entry.group))
            entries.append(entry)
        if found != self._made_from:
            self._table = pointer_table(found) if found else None
        names = [e.name for e in entries]
        if names != self._names:
            self._names, self._others = names, self._without_gradient(entries)
        self._made_from, self._with_gradient = found, entries
        return self._table, grads

    def _without_gradient(self, entries: list[_Entry]) -> list[tuple[Tensor, Tensor]]:
        """Return what the kernels do not average: pairs of a tensor of the model and its average."""
        if self.ema is None:
            return []
        done = {id(e.parameter) for e in entries}
        nets = (self.model, self.ema.module)
        source, shadow = (dict(net.named_parameters()) | dict(net.named_buffers()) for net in nets)
        return [(t, shadow[name]) for name, t in source.items() if id(t) not in done]

    def _average_others_(self, grad_norm: Tensor, weight: Tensor) -> None:
        """Average frozen weights, parameters without a gradient, and buffers, if `grad_norm` is finite."""
        finite = torch.isfinite(grad_norm)
        weight = torch.where(finite, weight, 0.0)
        for tensor, average in self._others:
            if average.is_floating_point():
                average.lerp_(tensor.to(average), weight.to(average.dtype))
            else:
                average.copy_(torch.where(finite, tensor, average))


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the dimensions that are not 1."""
    return [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def _units_are_runs(tensor: Tensor) -> bool:
    """Return True if memory has no gaps and dimension 0, if it is a dimension of units, is the outermost."""
    layout = _layout(tensor)
    expected = 1
    for n, s in sorted(layout, key=lambda pair: pair[1]):
        if s != expected:
            return False
        expected *= n
    return len(layout) < 2 or tensor.shape[0] == 1 or layout[0][1] == max(s for _, s in layout)


def _laid_out(grad: Tensor, entry: _Entry) -> Tensor:
    """Return the gradient in float32 and the memory format of its parameter, copied only if needed."""
    if grad.layout != torch.strided:
        raise ValueError(sparse_gradient(entry.name))
    if grad.dtype == torch.float32 and same_layout(grad, entry.parameter):
        return grad
    return torch.empty_like(entry.parameter).copy_(grad)
