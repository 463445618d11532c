"""Regional compilation: stem and blocks are compiled one by one, and blocks of the same shape share a graph.

A network of 84 blocks then takes as long to compile as nine small graphs, and one more block adds nothing. Three
differences between blocks of one shape would cause recompilation, and are avoided. Shapes are constants, since the
shapes of one block would become symbols in the next. The rate of stochastic depth, which grows from block to block, is
a tensor. β, which grows too, is already part of the weight that `standardized_once` computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from normfree.models.layers import StochasticDepth
from normfree.models.net import Block, Net

# Graphs that the code of a block may have, instead of PyTorch's 8: two for each shape of a network (the last
# micro-batch may be smaller than the others), and those of other networks in the same process.
LIMIT = 128


class CompiledBlocks:
    """The stem and blocks of `net`, compiled, but used only while `active`.

    Scoring, folding, saving and diagnosis therefore see the network as it is. Without `standardized_once` around it,
    every normalizer-free block gets its own graph, because of its β. A stem or block that cannot be a single graph is
    an error of PyTorch at its first call.

    Args:
        net: the network; its modules are not changed.
        backend: that of `torch.compile`.
    """

    def __init__(self, net: Net, *, backend: str | Callable[..., Any] = "inductor") -> None:
        blocks = [module for module in net.modules() if isinstance(module, Block)]
        self._compiled = {
            region: torch.compile(region.compute, backend=backend, fullgraph=True, dynamic=False)
            for region in (net.stem, *blocks)
        }
        self._depths = [block.stochdepth for block in blocks]
        self._rates: dict[StochasticDepth, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run compiled blocks in forward passes of the network; call backward within the context as well."""
        import torch._dynamo.config as dynamo

        device = next(next(iter(self._compiled)).parameters()).device
        try:
            for region, compute in self._compiled.items():
                region.compiled_compute = compute
            for depth in self._depths:
                if depth.rate > 0.0:
                    depth.rate_tensors = self._tensors(depth, device)
            with dynamo.patch(recompile_limit=max(LIMIT, dynamo.recompile_limit)):
                yield
        finally:
            for region in self._compiled:
                region.compiled_compute = None
            for depth in self._depths:
                depth.rate_tensors = None

    def _tensors(self, depth: StochasticDepth, device: torch.device) -> tuple[Tensor, Tensor]:
        found = self._rates.get(depth)
        if found is None or found[0].device != device:
            rates = (torch.tensor(rate, device=device) for rate in (depth.rate, 1.0 - depth.rate))
            found = self._rates[depth] = (next(rates), next(rates))
        return found
