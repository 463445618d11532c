"""Convolution of an activated, padded input, whose backward pass saves only the activation's input.

Autograd would save both the activation's input, for the gradient of the activation, and its output, for that of the
weight. Here the output is recomputed in the backward pass: one more pass over memory, and nearly half of the memory
that training needs. With PyTorch's own convolution, values and gradients equal those of the plain ops bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.dispatch import eager_training
from normfree.ops.conv2d_backends import TORCH, Backend, Geometry, choose_backend, gradients
from normfree.ops.gelu import activation_gradient
from normfree.ops.padding import Border, borders, without_border, zero_border

Activation = Callable[[Tensor], Tensor]

# The gradient of these depends only on their output, which the convolution saves anyway: recomputing gains nothing.
SAVED_ANYWAY: frozenset[Activation] = frozenset({F.relu, torch.relu})
# Multiplications on a CPU below which plain ops are faster: a backward pass in Python takes about 50 µs, more than
# another backend saves (docs/speed.md has the measured layers). Nor is there much memory to save: 1 MB for a 1x1
# convolution of 64 channels.
LEAST_WORK = 1 << 24


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    act: Activation | None,
    stride: int,
    groups: int,
    padding: str,
) -> Tensor:
    """Return the convolution of `act(x)`, padded as `pad_input` does.

    Args:
        x: B C H W.
        weight: O C/groups H W.
        bias: O, or None.
        act: the activation; None is the identity. Where autograd records, its output is not saved.
        stride: of rows and columns.
        groups: of the convolution.
        padding: "same" or "symmetric", see `pad_input`.
    """
    training = eager_training()
    if training:  # the backward pass then reads what the forward pass has converted
        weight, bias = _as_under_autocast(weight), None if bias is None else _as_under_autocast(bias)
    small = training and is_small(x, weight, stride)
    recompute = training and not small and act is not None and act not in SAVED_ANYWAY
    with torch.no_grad() if recompute else contextlib.nullcontext():
        a = x if act is None else act(x)
    border, sides = borders(a, weight.shape[-1], stride, padding=padding)
    geometry = Geometry(stride, sides, groups)
    backend = TORCH if small else choose_backend(a, weight, bias, geometry)
    if not recompute and (not training or backend is TORCH):
        return backend.forward(a if border is None else F.pad(a, border), weight, bias, geometry)
    source = x if recompute else a
    with torch.no_grad():
        a = _with_border(a, border)
    y: Tensor = _Conv2d.apply(
        source, a.detach(), weight, bias, act if recompute else None, border, backend, geometry
    )
    return y


def is_small(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return True if a convolution on a CPU has fewer than LEAST_WORK multiplications."""
    pixels = len(x) * x.shape[2] * x.shape[3] // stride**2
    return x.device.type == "cpu" and pixels * weight.numel() < LEAST_WORK


def _as_under_autocast(parameter: Tensor) -> Tensor:
    """Return `parameter` in the dtype that autocast would convert it to."""
    device = parameter.device.type
    if device == "meta" or parameter.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return parameter
    return parameter.to(torch.get_autocast_dtype(device))


def _with_border(a: Tensor, border: Border | None) -> Tensor:
    """Return `a` with `border` of zeros, without a gradient."""
    if border is None:
        return a
    if a.device.type == "cpu" and a.is_contiguous(memory_format=torch.channels_last):
        return zero_border(a.permute(0, 2, 3, 1), border).permute(0, 3, 1, 2)
    return F.pad(a, border)


class _Conv2d(torch.autograd.Function):
    """Convolution of `a`, which is act(x) with its border and is not saved, as a function of x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        act: Activation | None,
        border: Border | None,
        backend: Backend,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.act, ctx.border, ctx.backend, ctx.geometry = act, border, backend, geometry
        return backend.forward(a, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated again
            needs = needs_x, needs_weight, needs_bias
            by_x, by_weight, by_bias = _differentiable(
                x, weight, grad, ctx.act, ctx.border, ctx.geometry, needs
            )
            return by_x, None, by_weight, by_bias, *(None,) * 4
        a = _with_border(x if ctx.act is None else ctx.act(x), ctx.border)
        grad_a, grad_weight, grad_bias = gradients(
            ctx.backend, grad, a, weight, ctx.geometry, (needs_x, needs_weight, needs_bias)
        )
        grad_x = None
        if grad_a is not None:
            if ctx.border is not None:
                grad_a = without_border(grad_a, ctx.border).clone()
            grad_x = grad_a.to(a.dtype)
            if ctx.act is not None:
                grad_x = activation_gradient(ctx.act, x, grad_x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_x, None, grad_weight, grad_bias, *(None,) * 4


def _differentiable(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    act: Activation | None,
    border: Border | None,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias as functions of x, weight and `grad` made of plain ops."""
    a = x if act is None else act(x)
    a = a if border is None else F.pad(a, border)
    # Under autocast the result has another dtype than the input.
    typed = a.to(grad.dtype), weight.to(grad.dtype)
    y = F.conv2d(*typed, None, geometry.stride, geometry.padding, 1, geometry.groups)
    wanted = [t for t, needed in zip((x, weight), needs, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
    by_x, by_weight = (next(found) if needed else None for needed in needs[:2])
    return by_x, by_weight, grad.sum((0, 2, 3)) if needs[2] else None
