"""A convolution with a backward pass of its own: of an activation it keeps the activation's input alone.

Autograd would keep both: the input for the activation's gradient, the output for that of the kernel. The output is
computed again in the backward pass instead: one pass over memory more, and nearly half of what training has to hold
less. Values and gradients are those of the plain path, bit for bit: the same operations in the same order; but for the
kernels that `weight_gradient` takes on, whose gradient is added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.models.padding import Border, without_border, zero_border
from normfree.models.pointwise import conv2d, is_product, pointwise_gradients
from normfree.models.weight_gradient import pays, weight_gradient

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


def eager_training() -> bool:
    """Whether to leave the plain path: it is taken without gradients, which keep nothing, under torch.compile, which
    decides by itself what to keep, and inside torch.func's transforms, which see only plain operations."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


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
        grad_a, grad_weight, grad_bias = _gradients(grad, a, weight, ctx.bias_sizes, needs, **ctx.options)
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


def _gradients(
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
    if is_product(a, weight, stride=stride, groups=groups):
        grad_a, grad_weight = pointwise_gradients(
            grad, typed_a, typed_weight, needs_x=needs_a, needs_weight=needs_weight
        )
        return grad_a, grad_weight, grad.sum((0, 2, 3)) if needs_bias else None
    if needs_weight and grad.dtype == a.dtype and pays(a, weight, groups=groups):
        grad_weight = weight_gradient(
            a,
            grad,
            kernel_size=(weight.shape[2], weight.shape[3]),
            stride=stride,
            padding=padding,
            groups=groups,
        )
        needs_weight = False
        if needs_bias:
            grad_bias, needs_bias = grad.sum((0, 2, 3)), False
    if needs_a or needs_weight or needs_bias:
        options = (stride, stride), padding, (1, 1), False, (0, 0), groups
        found = torch.ops.aten.convolution_backward(
            grad, typed_a, typed_weight, bias_sizes, *options, (needs_a, needs_weight, needs_bias)
        )
        grad_a = found[0]
        grad_weight = found[1] if needs_weight else grad_weight
        grad_bias = found[2] if needs_bias else grad_bias
    return grad_a, grad_weight, grad_bias
