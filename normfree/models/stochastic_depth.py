"""Stochastic depth: while training, the residual branch of some images is left out (Huang et al. 2016; [B] 4.3).

A mask says of which. On a CPU the branch is then computed for the others alone, which is the same function in less
time; `net.Block` does so with the functions below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StochasticDepth(nn.Module):
    """A mask B 1 1 1 of zeros (with probability `rate`) and ones while training; None otherwise.

    The ones are not divided by the keep probability, unlike EfficientNet's (reference, `StochDepth`), unless
    `rescale` is set (timm, `DropPath`).
    """

    def __init__(self, rate: float, *, rescale: bool = False) -> None:
        super().__init__()
        self.rate, self.rescale = rate, rescale

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.training or self.rate <= 0.0:
            return None
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=torch.float32) >= self.rate
        mask = keep.to(x.dtype)
        return mask / (1.0 - self.rate) if self.rescale else mask

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}, rescale={self.rescale}"


def kept_images(mask: Tensor) -> Tensor | None:
    """Where `mask` B 1 1 1 of `StochasticDepth` is not zero, so that a branch need not compute what is thrown away;
    None if that is everywhere. At least one image, so that the branch's parameters have gradients, which are then 0.

    Reads the mask, for which a host with a GPU would wait; and what is compiled or captured wants one shape.
    """
    kept = mask.flatten().nonzero().flatten()
    if len(kept) == len(mask):
        return None
    return kept if len(kept) else kept.new_zeros(1)


def take_images(x: Tensor, kept: Tensor) -> Tensor:
    """The images `kept` of B C H W, channels_last."""
    return x.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


def add_images(x: Tensor, part: Tensor, kept: Tensor) -> Tensor:
    """x B C H W with `part` added to the images `kept`."""
    part = part.to(x.dtype).permute(0, 2, 3, 1)
    return x.permute(0, 2, 3, 1).index_add(0, kept, part).permute(0, 3, 1, 2)
