"""The units of adaptive gradient clipping: their norms, and scaling by one factor for each unit.

A unit consists of the weights of one output: an index of dimension 0 of a weight, or a whole gain or bias vector.
`normfree.optim.dtensor` has the same classes for parameters that FSDP2 shards over processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.dispatch import is_plain_cpu_tensor
from normfree.native.library import float32_memory, library, run
from normfree.native.table import TableEntry, pointer_table
from normfree.suggest import unknown

# What a unit is: "filter" as described above ([B] section 4.1), or the whole tensor (DreamerV3, arXiv 2301.04104).
UNITS = ("filter", "tensor")


class UnitNorms:
    """Norms of units and tensors, their sums and counts, for tensors that are whole in this process.

    Args:
        unit: "filter" or "tensor", see `UNITS`.

    Raises:
        ValueError: `unit` is neither.
    """

    def __init__(self, unit: str = "filter") -> None:
        if unit not in UNITS:
            raise ValueError(unknown("unit", unit, UNITS))
        self.unit = unit

    def is_one_unit(self, tensor: Tensor) -> bool:
        """Return True if the tensor is one unit: always with unit "tensor", else if at most one dimension is not 1."""
        return self.unit == "tensor" or tensor.numel() == max(tensor.shape, default=1)

    def count(self, tensors: Sequence[Tensor]) -> int:
        """Return the number of units of all tensors, over all processes."""
        return sum(1 if self.is_one_unit(t) else t.shape[0] for t in tensors)

    def units(self, tensors: Sequence[Tensor]) -> Units:
        """Return the units of tensors on one device, one after the other."""
        single = [self.is_one_unit(t) for t in tensors]
        return NativeUnits(tensors, single) if NativeUnits.supports(tensors) else Units(tensors, single)

    def unitwise(self, tensor: Tensor) -> Tensor:
        """Return the unit norms of one tensor in a shape that broadcasts against it."""
        single = [self.is_one_unit(tensor)]
        norms = Units([tensor], single).norms()
        return norms.reshape(scale_shape(norms, tensor))

    def tensor_norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the 0-dim norm of each whole tensor."""
        return tensor_norms(tensors)

    def global_norm(self, unit_norms: list[Tensor], whole: list[Tensor], like: Tensor) -> Tensor:
        """Return the global norm, on the device of `like`, from unit norms of some tensors and norms of the others."""
        flat = [n.reshape(-1).to(like.device) for n in [*unit_norms, *whole]]
        return torch.linalg.vector_norm(torch.cat(flat))

    def count_above(self, tensor: Tensor, bound: float) -> Tensor:
        """Return the number of elements of `tensor` whose absolute value exceeds `bound`, 0-dim, for `total`."""
        return torch.count_nonzero(tensor.abs() > bound)

    def total(self, counts: list[Tensor]) -> Tensor:
        """Return the sum of 0-dim counts."""
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long)


class Units:
    """The units of some tensors of one device in one vector, computed by PyTorch.

    Args:
        tensors: their units follow one another in the results.
        single: for each tensor, whether it is one unit.
    """

    def __init__(self, tensors: Sequence[Tensor], single: Sequence[bool]) -> None:
        self.tensors, self.single = list(tensors), list(single)
        self.sizes = [1 if one else len(t) for t, one in zip(self.tensors, self.single, strict=True)]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Return the L2 norm of every unit, in float32 for half precision, else in the dtype of its tensor."""
        whole = iter(self.single_norms())
        return torch.cat(
            [
                next(whole).reshape(1)
                if one
                else torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim)), dtype=norm_dtype(t))
                for t, one in zip(self.tensors, self.single, strict=True)
            ]
        )

    def single_norms(self) -> list[Tensor]:
        """Return the norms of the tensors that are one unit."""
        return tensor_norms([t for t, one in zip(self.tensors, self.single, strict=True) if one])

    @torch.no_grad()
    def scale_(self, factors: Tensor, changed: Tensor) -> None:
        """Multiply each unit by its factor, which is 1 where `changed` is False."""
        pairs = list(zip(self.tensors, factors.split(self.sizes), strict=True))
        if factors.device.type == "cpu":
            # On the CPU, reading a value does not wait for a device; tensors without a changed unit are skipped.
            sizes = torch.tensor(self.sizes, device="cpu")
            before = F.pad(changed.cumsum(0), (1, 0))[F.pad(sizes.cumsum(0), (1, 0))]
            pairs = [pair for pair, hits in zip(pairs, before.diff().tolist(), strict=True) if hits]
        if pairs:
            torch._foreach_mul_([t for t, _ in pairs], [f.view(scale_shape(f, t)) for t, f in pairs])

    def counted(self, values: Tensor) -> Tensor:
        """Return `values`, one for each unit, with 0 for units that another process counts."""
        return values


class NativeUnits(Units):
    """`Units` of plain float32 tensors on the CPU, computed by the compiled kernels."""

    def __init__(self, tensors: Sequence[Tensor], single: Sequence[bool]) -> None:
        super().__init__(tensors, single)
        sizes = zip(self.tensors, self.sizes, strict=True)
        entries = [TableEntry((0, t.data_ptr(), 0, 0), size, t.numel() // size) for t, size in sizes]
        self._table = pointer_table(entries)
        self._elements = sum(t.numel() for t in self.tensors)

    @staticmethod
    def supports(tensors: Sequence[Tensor]) -> bool:
        """Return True if the kernels exist and can process all tensors, which must be plain float32 CPU tensors.

        In those, each unit is one contiguous range of memory, and the units follow one another.
        """
        return bool(tensors) and all(map(is_plain_cpu_tensor, tensors)) and library() is not None

    def norms(self) -> Tensor:
        squares = float32_memory(self._table.units)
        self._run("unit_squares", squares)
        return squares.sqrt_()

    def scale_(self, factors: Tensor, changed: Tensor) -> None:
        self._run("scale_units", factors.contiguous())  # leaves units whose factor is 1 untouched

    def _run(self, name: str, values: Tensor) -> None:
        table = self._table
        run(name, table.table, table.owner, values, count=table.units, elements=self._elements)


@torch.no_grad()
def tensor_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 0-dim norm of each tensor, by one multi-tensor call for each device and dtype."""
    norms: dict[int, Tensor] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(index)
    for indices in alike.values():
        members = [tensors[i] for i in indices]
        norms |= zip(indices, torch._foreach_norm(members, 2, norm_dtype(members[0])), strict=True)
    return [norms[index] for index in range(len(tensors))]


def scale_shape(values: Tensor, tensor: Tensor) -> tuple[int, ...]:
    """Return the shape in which `values`, one for each unit, broadcast against `tensor`, keeping every dimension."""
    return (len(values), *(1,) * (tensor.ndim - 1)) if tensor.ndim else ()


def norm_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of the norms of a tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
