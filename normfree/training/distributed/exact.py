"""parallel="exact": the same bits for any number of processes.

The sum of floating-point numbers depends on the order of adding. So the order is fixed: the batch is cut into V
micro-batches, V a power of two, whose gradients are added in one binary tree, ((g0 + g1) + (g2 + g3)) + ... Each of W
processes has V / W neighbours, a subtree, and adds them up as they come (`TreeSum`); the processes then meet in pairs
(`World.tree_sum_`). a + b and b + a are the same float, so that both of a pair get the same bits. What belongs to a
micro-batch (mixing, dropout, stochastic depth) is drawn for its number in the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor


class TreeSum:
    """Sums of lists of tensors in one fixed binary tree, for any power of two of lists, added one after another.

    A binary counter: after n lists it holds one partial sum for each 1 among the binary digits of n, hence at most
    log2(n) + 1 of them. `add` takes the tensors over and changes them.
    """

    def __init__(self) -> None:
        self._partial: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, values: list[Tensor]) -> None:
        """One list more; all have the same shapes."""
        level = 0
        while level in self._partial:
            left = self._partial.pop(level)
            torch._foreach_add_(left, values)
            values, level = left, level + 1
        self._partial[level] = values

    def total(self) -> list[Tensor]:
        """The sum of all lists. Their number must be a power of two."""
        assert len(self._partial) == 1, "not a power of two"
        return next(iter(self._partial.values()))


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """Within the block, equal inputs give equal bits: deterministic algorithms, no choice by measurement, one thread.

    On a CPU several threads would share out a sum by their number, which differs from machine to machine.
    """
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; torch asks for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)
