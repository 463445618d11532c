"""Which way a convolution is computed, forward and backward: the library's, unless one of ours is faster there.

3x3 by fewer multiplications (`winograd`) and the gradients of
other kernels as matrix products (`weight_gradient`) on CPUs. All give the same to rounding.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.ops import winograd
from normfree.ops.weight_gradient import pays, weight_gradient


class Geometry(TypedDict):
    """Of a convolution, besides its kernel."""

    stride: int
    padding: tuple[int, int]
    groups: int


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: tuple[int, int], groups: int
) -> Tensor:
    """conv2d(x, weight, bias, stride, padding, 1, groups). Differentiable where gradients are enabled."""
    geometry = Geometry(stride=stride, padding=padding, groups=groups)
    if not torch.is_grad_enabled() and winograd.suits(x, weight, bias=bias, **geometry):
        return winograd.conv2d(x, weight, bias, groups=groups)
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


def own_gradients(x: Tensor, weight: Tensor, *, stride: int, padding: tuple[int, int], groups: int) -> bool:
    """Whether `gradients`, or `conv2d` where autograd does not watch, has a faster way than the library."""
    return pays(x, weight, groups=groups) or winograd.suits(
        x, weight, stride=stride, padding=padding, groups=groups
    )


def gradients(
    grad: Tensor,
    a: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    needs: tuple[bool, bool, bool],
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of a convolution's input `a`, kernel and bias, from that of its result; None where not needed."""
    needs_a, needs_weight, needs_bias = needs
    # autocast computed in the type of `grad`, from copies of both in that type
    typed_a, typed_weight = a.to(grad.dtype), weight.to(grad.dtype)
    grad_a = grad_weight = grad_bias = None
    geometry = Geometry(stride=stride, padding=padding, groups=groups)
    if grad.dtype == a.dtype:
        minimal = type(grad) is Tensor and winograd.suits(a, weight, **geometry)
        if needs_weight and minimal:
            grad_weight = winograd.weight_gradient(a, grad, groups=groups)
        elif needs_weight and pays(a, weight, groups=groups):
            size = (weight.shape[2], weight.shape[3])
            grad_weight = weight_gradient(a, grad, kernel_size=size, **geometry)
        if needs_a and minimal:
            grad_a = winograd.input_gradient(grad, weight, groups=groups)
        if needs_bias and grad_weight is not None:
            grad_bias = grad.sum((0, 2, 3))
    left = (
        needs_a and grad_a is None,
        needs_weight and grad_weight is None,
        needs_bias and grad_bias is None,
    )
    if any(left):
        found = torch.ops.aten.convolution_backward(
            grad,
            typed_a,
            typed_weight,
            bias_sizes,
            (stride, stride),
            padding,
            (1, 1),
            False,
            (0, 0),
            groups,
            left,
        )
        mine = grad_a, grad_weight, grad_bias
        grad_a, grad_weight, grad_bias = (
            new if missing else old for new, missing, old in zip(found, left, mine, strict=True)
        )
    return grad_a, grad_weight, grad_bias
