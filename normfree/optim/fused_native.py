"""The fused update on CPUs, by the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.native.library import library, run
from normfree.native.table import PointerTable
from normfree.optim.fused import FusedUpdate


class NativeUpdate(FusedUpdate):
    """`FusedUpdate` for float32 parameters on a CPU."""

    @classmethod
    def supports_device(cls, kind: str) -> bool:
        return kind == "cpu" and library() is not None

    def _square_(self, table: PointerTable, squares: Tensor) -> None:
        self._run("unit_squares", table, squares)

    def _update_(
        self, table: PointerTable, numbers: Tensor, squares: Tensor, grad_norm: Tensor, clipped: Tensor
    ) -> None:
        if torch.isfinite(grad_norm):
            self._run("update", table, numbers, squares, clipped, self.eps, int(self.ema is not None))
        else:
            clipped.zero_()

    def _run(self, name: str, table: PointerTable, *arguments: Tensor | float) -> None:
        elements = sum(e.parameter.numel() for e in self._with_gradient)
        run(name, table.table, table.owner, *arguments, count=table.units, elements=elements)
