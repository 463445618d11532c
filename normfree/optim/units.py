"""The units of AGC of many tensors at once, on a CPU: their norms, and a factor for each.

By the compiled kernels of `normfree.native`; `normfree.optim.agc` has the plain way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.native.dispatch import is_plain_cpu_tensor
from normfree.native.library import library, run
from normfree.native.table import owner_of
from normfree.optim.dtensor import (
    is_sharded,
    local,
    shard_group,
    spread,
    sum_norms,
)

#: Numbers per tensor in the table that `normfree.optim.fused_triton` describes.
COLUMNS = 8


class Units:
    """The units of some tensors, one after the other.

    tensors: such that `takes` says yes.
    sizes: the number of units of each.
    """

    def __init__(self, tensors: Sequence[Tensor], sizes: Sequence[int]) -> None:
        rows, first, self._elements = [], 0, 0
        for tensor, size in zip(tensors, sizes, strict=True):
            rows.append([0, tensor.data_ptr(), 0, 0, tensor.numel() // size, first, 0, 0])
            first += size
            self._elements += tensor.numel()
        self._tensors = tensors  # whose addresses the table has
        self._table, self._owner = torch.tensor(rows, dtype=torch.int64), owner_of(sizes)

    @staticmethod
    def takes(tensors: Sequence[Tensor]) -> bool:
        """Return True if the kernels exist and can process all of these: in plain CPU tensors each unit is one run of
        memory, and the units follow one another."""
        return bool(tensors) and all(map(is_plain_cpu_tensor, tensors)) and library() is not None

    def norms(self) -> Tensor:
        """L2 norm of every unit, float32."""
        squares = torch.empty(len(self._owner))
        self._run("unit_squares", squares)
        return squares.sqrt_()

    def scale_(self, factors: Tensor) -> None:
        """Multiplies each unit by its factor (float32), and does not touch those whose factor is 1."""
        self._run("scale_units", factors.contiguous())

    def _run(self, name: str, values: Tensor) -> None:
        run(name, self._table, self._owner, values, count=len(self._owner), elements=self._elements)


def unitwise_norm(tensor: Tensor) -> Tensor:
    """L2 norm of every unit of `tensor`, of the same rank so that it broadcasts against it.

    If at most one dimension differs from 1 (scalars, vectors, (1, n), (n, 1), (1, 1, 1, n)) the tensor is one
    unit and all dimensions of the result are 1. Otherwise each index of dimension 0 is a unit (an output of a
    linear layer, a filter of a convolution of any rank, grouped or not) and the result is (n, 1, ..., 1).
    Computed in float32 for half precision, in the tensor's own dtype otherwise.
    Source: reference code, whose kernels are HWIO and IO with the unit last. Its rank-3 rule (one unit for
    each pair of trailing indices) is met by no layer of the published networks and has no counterpart here.
    """
    single = is_one_unit(tensor)
    norms = unit_norms([tensor], shard_group([tensor]), [single])[0]
    shaped = norms.reshape(scale_shape(norms, tensor))
    return spread(shaped, tensor, rows=not single) if is_sharded(tensor) else shaped


def is_one_unit(tensor: Tensor) -> bool:
    return tensor.numel() == max(tensor.shape, default=1)  # at most one dimension is not 1


def scale_shape(values: Tensor, tensor: Tensor) -> tuple[int, ...]:
    """Shape in which `values`, one for each unit, broadcast against `tensor`, keeping every dimension."""
    return (len(values), *(1,) * (tensor.ndim - 1)) if tensor.ndim else ()


@torch.no_grad()
def unit_norms(tensors: list[Tensor], group: Any, single: list[bool]) -> list[Tensor]:
    """One vector of unit norms per tensor: a reduction for each matrix, one call for all that are a `single` unit."""
    whole = iter(tensor_norms([t for t, one in zip(tensors, single, strict=True) if one], group))
    return [
        next(whole).reshape(1)
        if one
        else torch.linalg.vector_norm(local(t), dim=tuple(range(1, t.ndim)), dtype=norm_dtype(t))
        for t, one in zip(tensors, single, strict=True)
    ]


@torch.no_grad()
def tensor_norms(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """0-dim norm of each whole tensor, by one multi-tensor call for each device and dtype."""
    whole, tensors = tensors, [local(t) for t in tensors]
    norms: list[Tensor | None] = [None] * len(tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(index)
    for indices in alike.values():
        members = [tensors[i] for i in indices]
        for i, norm in zip(indices, torch._foreach_norm(members, 2, norm_dtype(members[0])), strict=True):
            norms[i] = norm
    found = [norm for norm in norms if norm is not None]
    return found if group is None else sum_norms(found, whole, group)


def norm_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
