"""Regional compilation: the stem and the blocks are compiled, each by itself, and blocks of one shape share a graph.

A network of 84 blocks then takes the time of nine small graphs to compile, and one block more costs nothing. Three
things keep blocks of one shape from being compiled anew, and all three are settled here: shapes are constants, since
the shapes of one block would make those of the next symbols; the rate of stochastic depth, which grows from block to
block, is a tensor; and β, which grows too, is in the kernel already, as `standardized_once` makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from normfree.models.layers import StochasticDepth
from normfree.models.net import Block, Net

#: Graphs that the code of a block may have, in place of torch's 8: two for each of the shapes of a network (the last
#: micro-batch may be smaller than the others), and those of other networks of the same process.
LIMIT = 128


class CompiledBlocks:
    """The stem and blocks of `net`, compiled. They run compiled only while `active`, so that scoring, folding, saving
    and diagnosing find the network as it is.

    backend: of `torch.compile`. A part that cannot be one graph is an error of torch's at its first call.
    Without `standardized_once` around it, every block of a normalizer-free network has a graph of its own, by its β.
    """

    def __init__(self, net: Net, *, backend: str | Callable[..., Any] = "inductor") -> None:
        self._blocks = [module for module in net.modules() if isinstance(module, Block)]
        self._compiled = {
            module: torch.compile(module.forward, backend=backend, fullgraph=True, dynamic=False)
            for module in (net.stem, *self._blocks)
        }
        self._rates: dict[nn.Module, _DepthOfTensor] = {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within it, forward passes of the network run the compiled blocks; backward passes belong into it too."""
        import torch._dynamo.config as dynamo

        plain = {block: block.stochdepth for block in self._blocks}
        try:
            for module, compiled in self._compiled.items():
                module.forward = compiled
            for block, depth in plain.items():
                if depth.rate > 0.0:
                    block.stochdepth = self._by_tensor(depth, block)
            with dynamo.patch(recompile_limit=max(LIMIT, dynamo.recompile_limit)):
                yield
        finally:
            for module in self._compiled:
                module.__dict__.pop("forward", None)
            for block, depth in plain.items():
                block.stochdepth = depth

    def _by_tensor(self, depth: StochasticDepth, block: Block) -> _DepthOfTensor:
        device = next(block.parameters()).device
        found = self._rates.get(block)
        if found is None or found.threshold.device != device:
            found = self._rates[block] = _DepthOfTensor(depth, device)
        found.training = depth.training
        return found


class _DepthOfTensor(StochasticDepth):
    """The same draws and masks, with numbers that a compiled graph reads as it reads weights."""

    def __init__(self, depth: StochasticDepth, device: torch.device) -> None:
        super().__init__(depth.rate, rescale=depth.rescale)
        self.threshold = torch.tensor(depth.rate, device=device)
        self.kept = torch.tensor(1.0 - depth.rate, device=device)

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.training:
            return None
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=torch.float32) >= self.threshold
        mask = keep.to(x.dtype)
        return mask / self.kept if self.rescale else mask
