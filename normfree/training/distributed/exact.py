"""parallel="exact": bit-identical results for any number of processes.

A sum of floating-point numbers depends on the order of the additions, so this order is fixed. The batch is split into V
micro-batches, V a power of two, whose gradients are added in one binary tree: ((g0 + g1) + (g2 + g3)) + ... Each of W
processes computes V / W consecutive micro-batches, a subtree, and adds their gradients one after another (`TreeSum`);
then the processes add their sums in pairs (`World.tree_sum_`). a + b and b + a are the same float, so both processes of
a pair get the same bits. The random numbers of a micro-batch (mixing, dropout, stochastic depth) depend on its index in
the batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor


class TreeSum:
    """Sum of lists of tensors in a fixed binary tree, for a power of two of lists that are added one after another.

    It works like a binary counter: after n lists it holds one partial sum for each digit 1 of n in binary, so at most
    log2(n) + 1 of them. `add` takes ownership of the tensors and changes them.
    """

    def __init__(self) -> None:
        self._partial: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, values: list[Tensor]) -> None:
        """Add a list; all lists have the same shapes."""
        level = 0
        while level in self._partial:
            left = self._partial.pop(level)
            torch._foreach_add_(left, values)
            values, level = left, level + 1
        self._partial[level] = values

    def total(self) -> list[Tensor]:
        """Return the sum of all lists. Their number must be a power of two."""
        assert len(self._partial) == 1, "not a power of two"
        return next(iter(self._partial.values()))


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """Return a context in which equal inputs give equal bits.

    It selects deterministic algorithms, no autotuning of cuDNN, and one thread: on a CPU the order of a sum depends on
    the number of threads, which differs between machines.
    """
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Required by PyTorch's deterministic mode; cuBLAS reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)
