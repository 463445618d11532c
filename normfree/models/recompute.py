"""A convolution of an activation that keeps the activation's input alone.

Autograd would keep both: the input for the activation's gradient, the output for that of the kernel. The output is
computed again in the backward pass instead: one pass over memory more, and nearly half of what training has to hold
less. Values and gradients are those of the plain path, bit for bit: the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

#: Their gradient is told from their output, which the convolution keeps: there is nothing to save.
KEPT_ANYWAY: frozenset[Activation] = frozenset({F.relu, torch.relu})


def activated_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: Activation,
    border: tuple[int, int, int, int] | None,
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Tensor:
    """conv2d(pad(act(x), border), weight, bias). `x`: B C H W; `border`: (left, right, top, bottom) zeros, or None.

    Differentiable once.
    """
    y: Tensor = _ActivatedConv2d.apply(x, weight, bias, act, border, stride, padding, groups)
    return y


def recomputes() -> bool:
    """Whether to leave the plain path: it is taken without gradients, which keep nothing, under torch.compile, which
    decides by itself what to keep, and inside torch.func's transforms, which see only plain operations."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _padded(x: Tensor, border: tuple[int, int, int, int] | None) -> Tensor:
    return x if border is None else F.pad(x, border)


class _ActivatedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: Activation,
        border: tuple[int, int, int, int] | None,
        stride: int,
        padding: tuple[int, int],
        groups: int,
    ) -> Tensor:
        y = F.conv2d(_padded(act(x), border), weight, bias, stride, padding, 1, groups)
        ctx.save_for_backward(x, weight)
        ctx.act, ctx.border, ctx.bias_sizes = act, border, None if bias is None else list(bias.shape)
        ctx.options = (stride, stride), padding, (1, 1), False, (0, 0), groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        source = x.detach().requires_grad_(needs_x)
        with torch.enable_grad():
            a = _padded(ctx.act(source), ctx.border)
        # autocast computed in the type of `grad`, from copies of both in that type
        grad_a, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, a.detach().to(grad.dtype), weight.to(grad.dtype), ctx.bias_sizes, *ctx.options,
            (needs_x, needs_weight, needs_bias and ctx.bias_sizes is not None),
        )  # fmt: skip
        grad_x = torch.autograd.grad(a, source, grad_a.to(a.dtype))[0] if needs_x else None
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad_bias,
            *(None,) * 5,
        )
