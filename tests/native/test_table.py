"""Pointer tables against what they describe."""

from __future__ import annotations

import torch

from normfree.native.table import COLUMNS, TableEntry, owner_of, pointer_table


def test_a_table_lists_each_tensor_and_the_owner_of_each_unit() -> None:
    entries = [
        TableEntry((1, 2, 3, 4), units=2, length=5, extra=9),
        TableEntry((6, 0, 0, 0), units=3, length=7),
    ]
    made = pointer_table(entries)
    assert made.table.tolist() == [[1, 2, 3, 4, 5, 0, 9, 0], [6, 0, 0, 0, 7, 2, 0, 0]]
    assert made.table.shape == (2, COLUMNS)
    assert made.table.dtype == torch.int64
    assert made.owner.tolist() == [0, 0, 1, 1, 1]
    assert made.owner.dtype == torch.int32
    assert made.units == 5


def test_no_entries_make_empty_tables() -> None:
    assert pointer_table([]).units == 0
    assert len(owner_of(())) == 0
