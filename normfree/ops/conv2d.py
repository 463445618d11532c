"""A convolution with a backward pass of its own: of an activation it keeps the activation's input alone.

Autograd would keep both: the input for the activation's gradient, the output for that of the kernel. The output is
computed again in the backward pass instead: one pass over memory more, and nearly half of what training has to hold
less. Values and gradients are those of the plain path, bit for bit: the same operations in the same order; but for the
convolutions that `convolution` computes its own way, which add up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.dispatch import eager_training
from normfree.ops.conv2d_backends import Geometry, conv2d, gradients, own_gradients
from normfree.ops.padding import Border, borders, without_border, zero_border

Activation = Callable[[Tensor], Tensor]

#: Their gradient is told from their output, which the convolution keeps: there is nothing to save.
KEPT_ANYWAY: frozenset[Activation] = frozenset({F.relu, torch.relu})


def activated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: Activation | None,
    border: Border | None,
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Tensor:
    """conv2d(pad(act(x), border), weight, bias). `x`: B C H W; `act`: None is the identity; `border`: of zeros, or
    None.

    Differentiable once.
    """
    y: Tensor = _ActivatedConv2d.apply(x, weight, bias, act, border, stride, padding, groups)
    return y


def _bordered(a: Tensor, border: Border | None) -> Tensor:
    """`a` within `border` of zeros, without a gradient."""
    if border is None:
        return a
    if a.device.type == "cpu" and a.is_contiguous(memory_format=torch.channels_last):
        return zero_border(a.permute(0, 2, 3, 1), border).permute(0, 3, 1, 2)
    return F.pad(a, border)


class _ActivatedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: Activation | None,
        border: Border | None,
        stride: int,
        padding: tuple[int, int],
        groups: int,
    ) -> Tensor:
        a = _bordered(x if act is None else act(x), border)
        y = conv2d(a, weight, bias, stride=stride, padding=padding, groups=groups)
        ctx.save_for_backward(x, weight)
        ctx.act, ctx.border, ctx.bias_sizes = act, border, None if bias is None else list(bias.shape)
        ctx.options = {"stride": stride, "padding": padding, "groups": groups}
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        source = x.detach().requires_grad_(needs_x)
        with torch.enable_grad():
            activated = source if ctx.act is None else ctx.act(source)
        a = _bordered(activated.detach(), ctx.border)
        needs = needs_x, needs_weight, needs_bias and ctx.bias_sizes is not None
        grad_a, grad_weight, grad_bias = gradients(grad, a, weight, ctx.bias_sizes, needs, **ctx.options)
        grad_x = None
        if grad_a is not None:
            if ctx.border is not None:
                grad_a = without_border(grad_a, ctx.border).clone()
            (grad_x,) = torch.autograd.grad(activated, source, grad_a.to(a.dtype))
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias,
            *(None,) * 5,
        )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: Activation | None,
    stride: int,
    groups: int,
    padding: str,
) -> Tensor:
    """Convolution of `act(x)` with the padding of `pad_input`. Where autograd watches, `act(x)` is not kept."""
    own_backward = eager_training()
    if act is not None and (act in KEPT_ANYWAY or not own_backward):
        x, act = act(x), None
    border, sides = borders(x, weight.shape[-1], stride, padding=padding)
    geometry = Geometry(stride=stride, padding=sides, groups=groups)
    if act is None and not (own_backward and own_gradients(x, weight, **geometry)):
        return conv2d(x if border is None else F.pad(x, border), weight, bias, **geometry)
    return activated_conv2d(x, weight, bias, act=act, border=border, **geometry)
