"""shortcut + gate · branch, the end of a residual block, and the branch computed only for the images that need it.

Stochastic depth multiplies the branch of some images by 0. `kept_images` finds the others, `take_images` selects them
before the branch is computed, and `gated_add` adds the result to them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfree.native.dispatch import eager_training

# Elements on a CPU below which autograd's own gradients are faster: see LEAST_WORK of `conv2d`.
LEAST_ELEMENTS = 1 << 16
# Elements multiplied at a time on a CPU (at least one image's), so that they stay in the cache: 4 MB in float32, as
# `weight_gradient.PATCHES`.
PRODUCTS = 1 << 20
# The part of the images from which on it pays to leave them out: selecting the others and adding to them is a pass over
# memory in each direction. docs/speed.md has the measurement.
LEAST_DROPPED = 0.1


def gated_add(shortcut: Tensor, branch: Tensor, gate: Tensor | float, *, kept: Tensor | None) -> Tensor:
    """Return shortcut + gate · branch, B C H W.

    Args:
        shortcut: B C H W.
        branch: B C H W, or only the images `kept` of it.
        gate: a number, or a tensor that broadcasts against `branch`: 0-dim, B 1 1 1 or B C 1 1.
        kept: indices of the images in `branch` and `gate`, from `kept_images`; None means all.
    """
    if not isinstance(gate, Tensor):
        return torch.add(shortcut, branch, alpha=gate)
    gate = gate.to(branch.dtype)
    # `eager_training` comes first: a compiled or exported graph must not depend on sizes
    if eager_training() and not (branch.device.type == "cpu" and branch.numel() < LEAST_ELEMENTS):
        y: Tensor = _GatedAdd.apply(shortcut, branch, gate, kept)
        return y
    return _gated_add(shortcut, branch, gate, kept)


def kept_images(mask: Tensor | None, *, independent: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask of the images whose branch must be computed, and their indices; None means all.

    At least one image is kept, so that the branch's parameters get gradients, which are then 0. All images are kept
    if few are dropped; without gradients or under a compiler, which need one shape; on a GPU, where reading the mask
    would make the host wait; and for fake tensors, which have no values to read.

    Args:
        mask: B 1 1 1 from `StochasticDepth`, 0 for images without the branch; None if the branch is never dropped.
        independent: False if images influence each other in the branch, as with batch norm: all are kept.
    """
    if type(mask) is not Tensor or mask.device.type != "cpu" or not independent or not eager_training():
        return mask, None
    kept = mask.flatten().nonzero().flatten()
    if len(mask) - len(kept) < max(1, LEAST_DROPPED * len(mask)):
        return mask, None
    kept = kept if len(kept) else kept.new_zeros(1)
    return mask[kept], kept


def take_images(x: Tensor, kept: Tensor | None) -> Tensor:
    """Return the images `kept` of `x` B C H W, in channels_last; None means all of them, `x` itself."""
    if kept is None:
        return x
    return x.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


def add_images(x: Tensor, part: Tensor, kept: Tensor) -> Tensor:
    """Return `x` B C H W with `part` added to its images `kept`."""
    part = part.to(x.dtype).permute(0, 2, 3, 1)
    return x.permute(0, 2, 3, 1).index_add(0, kept, part).permute(0, 3, 1, 2)


def spatial_mean(x: Tensor) -> Tensor:
    """Return the mean over H and W: B C H W -> B C.

    In training it is a sum and a division: the gradient of a sum is a view, that of `x.mean((2, 3))` is a full map.
    """
    if eager_training() and x.dtype != torch.float16:  # whose sums could overflow
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return x.mean((2, 3))


def _gated_add(shortcut: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return torch.addcmul(shortcut, branch, gate)
    return add_images(shortcut, branch * gate, kept)


class _GatedAdd(torch.autograd.Function):
    """`_gated_add` with a backward pass that saves one pass over the branch: `addcmul` also scales by a factor of 1."""

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gate, kept)
        ctx.dtype = shortcut.dtype
        return _gated_add(shortcut, branch, gate, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, kept = ctx.saved_tensors
        needs_shortcut, needs_branch, needs_gate, _ = ctx.needs_input_grad
        by_shortcut = grad.to(ctx.dtype) if needs_shortcut else None
        grad = take_images(grad, kept).to(branch.dtype)
        by_branch = grad * gate if needs_branch else None
        by_gate = None
        if needs_gate:
            by_gate = _sum_of_products(grad, branch)[:, :, None, None].sum_to_size(gate.shape)
        return by_shortcut, by_branch, by_gate, None


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over H and W of a · b: B C H W -> B C."""
    if a.device.type != "cpu" or not len(a):
        return (a * b).sum((2, 3))
    at_once = max(1, PRODUCTS // a[0].numel())
    return torch.cat([(x * y).sum((2, 3)) for x, y in zip(a.split(at_once), b.split(at_once), strict=True)])
