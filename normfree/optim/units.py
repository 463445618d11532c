"""The units of AGC of many tensors at once, on a CPU: their norms, and a factor for each.

By the compiled kernels of `normfree.native`; `normfree.optim.agc` has the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfree.native.library import library, owner_of, run
from normfree.native.memory import is_plain

#: Numbers per tensor in the table that `normfree.optim.kernels` describes.
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
        """Whether the kernels are there and can work on all of these. In `is_plain` tensors a unit is one run of
        memory, and one comes after the other."""
        return bool(tensors) and all(map(is_plain, tensors)) and library() is not None

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
