"""Pointer tables: one launch of a kernel works on many tensors.

A kernel walks over units: filters in weight standardization, units of AGC in the optimizer step. A unit is one run of
memory, and the units of a tensor follow one another, so a kernel needs only these two tensors:

    table  int64 T x 8    per tensor: four addresses, elements in a unit, index of its first unit, one more number
                          (an address or a group), 0
    owner  int32 U        index of the tensor that each unit belongs to

The Triton kernels access tensors in steps of 16 bytes where all addresses and lengths allow it. That is a promise to
the compiler, so tensors that cannot keep it come last and get a launch of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

COLUMNS = 8  # numbers per tensor in `table`


class TableEntry(NamedTuple):
    """One tensor of a launch, or several tensors of one shape that are processed together.

    addresses: of up to four tensors; 0 where a kernel reads none.
    units: the number of units. length: elements in a unit. extra: what the kernel reads from the seventh column.
    aligned: whether accesses of 16 bytes are valid, see `is_aligned`.
    """

    addresses: tuple[int, int, int, int]
    units: int
    length: int
    extra: int = 0
    aligned: bool = True


class PointerTable(NamedTuple):
    """The tables of one launch. `order`: indices of the entries in the table, aligned ones first; `units`: of all
    entries; `aligned_units`: of the aligned ones."""

    table: Tensor
    owner: Tensor
    order: list[int]
    units: int
    aligned_units: int


def pointer_table(entries: Sequence[TableEntry], device: torch.device | str = "cpu") -> PointerTable:
    """Return the tables of `entries` on `device`. The caller must keep the tensors alive until the kernel has run."""
    order = aligned_first(entries)
    ordered = [entries[i] for i in order]
    units = tuple(e.units for e in ordered)
    return PointerTable(
        table=upload(table_rows(ordered), torch.int64, device),
        owner=_cached_owner(units, torch.device(device)),
        order=order,
        units=sum(units),
        aligned_units=sum(e.units for e in ordered if e.aligned),
    )


def aligned_first(entries: Sequence[TableEntry]) -> list[int]:
    """Return the indices of `entries`, those of aligned entries first, otherwise in order."""
    return sorted(range(len(entries)), key=lambda i: not entries[i].aligned)


def table_rows(entries: Sequence[TableEntry]) -> list[list[int]]:
    """Return the rows of `table` for `entries`, in their order."""
    firsts = accumulate((e.units for e in entries), initial=0)
    return [[*e.addresses, e.length, first, e.extra, 0] for e, first in zip(entries, firsts, strict=False)]


def owner_of(units: Sequence[int]) -> Tensor:
    """Return `owner` on the CPU for tensors with so many units each.

    >>> owner_of([2, 1]).tolist()
    [0, 0, 1]
    """
    index = torch.arange(len(units), dtype=torch.int32)
    return index.repeat_interleave(torch.tensor(units, dtype=torch.long))


def is_aligned(*numbers: int) -> bool:
    """Return True if all `numbers`, addresses and lengths in bytes, are multiples of 16."""
    return all(n % 16 == 0 for n in numbers)


def upload(values: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return `values`, nested lists of numbers, as a tensor on `device`, without waiting for the device."""
    pin = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pin).to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _cached_owner(units: tuple[int, ...], device: torch.device) -> Tensor:
    return owner_of(units).to(device)
