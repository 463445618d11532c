"""Pointer tables against what they describe."""

from __future__ import annotations

import torch

from normfree.native.table import COLUMNS, TableEntry, is_aligned, owner_of, pointer_table, upload


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
    assert (made.order, made.units, made.aligned_units) == ([0, 1], 5, 5)


def test_aligned_entries_come_first_and_the_order_is_otherwise_kept() -> None:
    flags = [False, True, False, True]
    entries = [TableEntry((i, 0, 0, 0), units=i + 1, length=1, aligned=flag) for i, flag in enumerate(flags)]
    made = pointer_table(entries)
    assert made.order == [1, 3, 0, 2]
    assert made.table[:, 0].tolist() == [1, 3, 0, 2]
    assert made.table[:, 5].tolist() == [0, 2, 6, 7]
    assert (made.units, made.aligned_units) == (10, 6)


def test_no_entries_make_empty_tables() -> None:
    assert pointer_table([]).units == 0
    assert len(owner_of([])) == 0


def test_aligned_means_multiples_of_sixteen_bytes() -> None:
    assert is_aligned(0, 16, 64)
    assert not is_aligned(16, 24)


def test_upload_makes_a_tensor_of_the_numbers() -> None:
    assert torch.equal(upload([[1.0, 2.0]], torch.float32, "cpu"), torch.tensor([[1.0, 2.0]]))
