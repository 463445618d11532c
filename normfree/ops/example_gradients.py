"""Gradients of single examples of a convolution with a standardized weight, in closed form.

The gradient of a convolution's weight is one matrix product for each example. That of the weight before standardization
is a linear function of it, which `closed_form` applies to all examples at once.

`torch.nn.utils._per_sample_grad.call_for_per_sample_grads` (Opacus's mode "ew") replaces each parameter by a tensor
that records the gradients of examples, called an expanded weight. It supports the functions that PyTorch knows; the
functions below whose names begin with `expanded` support the others that this package needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.ops.padding import pad_input
from normfree.ops.standardize_torch import closed_form, standardize_forward
from normfree.suggest import problem


class Convolution(NamedTuple):
    """What defines a convolution besides its parameters; `scale` and `eps` are those of `standardize`."""

    stride: int
    groups: int
    padding: str
    scale: float
    eps: str


def conv2d_example_gradients(x: Tensor, grad: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """Return the gradient of the weight for each example, B O I/groups h w.

    Args:
        x: the input, B I H W.
        grad: the gradient of the output, B O H' W'.
        weight: O I/groups h w, of which only the shape matters.
        conv: stride, groups and padding.
    """
    size = weight.shape[-1]
    x, sides = pad_input(x, size, conv.stride, padding=conv.padding)
    patches = F.unfold(x, size, padding=sides, stride=conv.stride)  # B (I·h·w) pixels
    patches = patches.unflatten(1, (conv.groups, -1))
    grad = grad.flatten(2).unflatten(1, (conv.groups, -1))
    return (grad @ patches.mT).reshape(len(x), *weight.shape)


def standardized_example_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, gain: Tensor, conv: Convolution
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and gain for each example, B O I/groups h w and B O."""
    back = conv2d_example_gradients(x, grad, weight, conv).flatten(2)
    by_weight, by_gain = closed_form(weight.flatten(1), gain, back, scale=conv.scale, eps=conv.eps)
    return by_weight.view(len(x), *weight.shape), by_gain


def is_expanded(tensor: Tensor | None) -> bool:
    """Return True for a parameter in place of which `call_for_per_sample_grads` has put an expanded weight."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    return isinstance(tensor, Tensor) and hasattr(tensor, "orig_weight")


def expanded_conv2d(
    x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """Return the convolution of `x` by the standardized weight; its backward pass records gradients of examples."""
    y: Tensor = _ExpandedConv2d.apply(x, weight, gain, bias, conv)
    return y


def expanded_number(number: Tensor, count: int) -> Tensor:
    """Return a parameter of shape (1,) as B 1 1 1 for `count` examples, and record the gradients of examples."""
    y: Tensor = _ExpandedNumber.apply(number, count)
    return y


class _ExpandedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor | None, conv: Convolution
    ) -> Tensor:
        ctx.parameters, ctx.conv = (weight, gain, bias), conv
        plain, own_gain, own_bias = (_original(t) for t in ctx.parameters)
        standardized = standardize_forward(plain, own_gain, scale=conv.scale, eps=conv.eps)[0].to(plain.dtype)
        ctx.save_for_backward(x, standardized)
        return _convolve(x, standardized, own_bias, conv)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, standardized = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[0]:
            with torch.enable_grad():
                source = x.detach().requires_grad_()
                y = _convolve(source, standardized, None, ctx.conv)
            (by_x,) = torch.autograd.grad(y, source, grad)
        weight, gain, bias = ctx.parameters
        if is_expanded(weight) or is_expanded(gain):
            own = _original(weight), _original(gain)
            by_weight, by_gain = standardized_example_gradients(x, grad, *own, ctx.conv)
            _record(weight, by_weight)
            _record(gain, by_gain)
        if is_expanded(bias):
            _record(bias, grad.sum((2, 3)))
        return by_x, None, None, None, None


class _ExpandedNumber(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: Tensor, count: int) -> Tensor:
        ctx.number = number
        return _original(number).detach().expand(count, 1, 1, 1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        _record(ctx.number, grad.flatten(1))
        return None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution) -> Tensor:
    x, sides = pad_input(x, weight.shape[-1], conv.stride, padding=conv.padding)
    return F.conv2d(x, weight, bias, conv.stride, sides, 1, conv.groups)


def _original(tensor: Any) -> Any:
    return tensor.orig_weight.detach() if is_expanded(tensor) else tensor


def _record(expanded: Any, gradients: Tensor) -> None:
    """Add `gradients` of examples to the attribute `grad_sample` of the parameter behind an expanded weight."""
    if not is_expanded(expanded):
        return
    if len(gradients) != expanded.batch_size:
        raise ValueError(
            problem(
                f"a layer reads {len(gradients)} examples of a batch of {expanded.batch_size}",
                allowed="layers that read all examples",
                fix="do not select examples in forward",
            )
        )
    if expanded.loss_reduction == "mean":
        gradients = gradients * expanded.batch_size
    original = expanded.orig_weight
    before = getattr(original, "grad_sample", None)
    original.grad_sample = gradients if before is None else before + gradients
