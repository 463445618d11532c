"""Pointer tables: one call of a kernel works on many tensors.

A kernel walks over units: filters in weight standardization, units of AGC in the optimizer step. A unit is one run of
memory, and the units of a tensor follow one another, so a kernel needs only these two tensors:

    table  int64 T x 8    per tensor: four addresses, elements in a unit, index of its first unit, one more number
                          (an address or a group), 0
    owner  int32 U        index of the tensor that each unit belongs to
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 8  # numbers per tensor in `table`


class TableEntry(NamedTuple):
    """One tensor of a call, or several tensors of one shape that are processed together.

    addresses: of up to four tensors; 0 where a kernel reads none.
    units: the number of units. length: elements in a unit. extra: what the kernel reads from the seventh column.
    """

    addresses: tuple[int, int, int, int]
    units: int
    length: int
    extra: int = 0


class PointerTable(NamedTuple):
    """The tables of one call, and the units of all entries."""

    table: Tensor
    owner: Tensor
    units: int


def pointer_table(entries: Sequence[TableEntry]) -> PointerTable:
    """Return the tables of `entries`. The caller must keep the tensors alive until the kernel has run."""
    units = tuple(e.units for e in entries)
    firsts = accumulate(units, initial=0)
    rows = [[*e.addresses, e.length, first, e.extra, 0] for e, first in zip(entries, firsts, strict=False)]
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return PointerTable(table, owner_of(units), sum(units))


@lru_cache(maxsize=8)
def owner_of(units: tuple[int, ...]) -> Tensor:
    """Return `owner` for tensors with so many units each.

    >>> owner_of((2, 1)).tolist()
    [0, 0, 1]
    """
    index = torch.arange(len(units), dtype=torch.int32, device="cpu")
    return index.repeat_interleave(torch.tensor(units, dtype=torch.long, device="cpu"))
