"""How a block's branch joins its shortcut, with gradients in as few passes over memory as there can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfree.native.dispatch import eager_training

#: Products computed at a time on a CPU, or one image's, so that they stay in the cache: 4 MB in float32, see
#: `weight_gradient.PATCHES`.
PRODUCTS = 1 << 20


def add_branch(shortcut: Tensor, branch: Tensor, gate: Tensor | float, *, kept: Tensor | None) -> Tensor:
    """shortcut + gate · branch, B C H W.

    gate: a number, or a tensor that broadcasts against `branch`: 0-dim, B 1 1 1 or B C 1 1. kept: the images that
    `branch` and `gate` are of; None: all.
    """
    if not isinstance(gate, Tensor):
        return torch.add(shortcut, branch, alpha=gate)
    gate = gate.to(branch.dtype)
    if eager_training():
        y: Tensor = _GatedSum.apply(shortcut, branch, gate, kept)
        return y
    return _gated_sum(shortcut, branch, gate, kept)


def spatial_mean(x: Tensor) -> Tensor:
    """B C H W -> B C, as `x.mean((2, 3))`; but the gradient of a sum is a view, that of a mean is written out."""
    if eager_training() and x.dtype in (torch.float32, torch.float64):
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return x.mean((2, 3))


def _gated_sum(shortcut: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return torch.addcmul(shortcut, branch, gate)
    return add_images(shortcut, branch * gate, kept)


class _GatedSum(torch.autograd.Function):
    """Autograd's own gradient of `addcmul` takes a pass more over the branch, for a factor that is 1."""

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, gate: Tensor, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(branch, gate, kept)
        ctx.kind = shortcut.dtype
        return _gated_sum(shortcut, branch, gate, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gate, kept = ctx.saved_tensors
        needs_shortcut, needs_branch, needs_gate, _ = ctx.needs_input_grad
        by_shortcut = grad.to(ctx.kind) if needs_shortcut else None
        if kept is not None:
            grad = take_images(grad, kept)
        grad = grad.to(branch.dtype)
        by_branch = grad * gate if needs_branch else None
        by_gate = _products(grad, branch)[:, :, None, None] if needs_gate else None
        return by_shortcut, by_branch, None if by_gate is None else by_gate.sum_to_size(gate.shape), None


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sums over pixels of a · b: B C H W -> B C."""
    if a.device.type != "cpu" or not len(a):
        return (a * b).sum((2, 3))
    at_once = max(1, PRODUCTS // a[0].numel())
    return torch.cat([(x * y).sum((2, 3)) for x, y in zip(a.split(at_once), b.split(at_once), strict=True)])


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
