"""GELU and SiLU of tensors of any shape, with faster implementations for CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.dispatch import can_bypass_dispatcher, is_plain_cpu_tensor, is_transformed, laid_out_as
from normfree.native.library import library, run


def gelu_tanh(x: Tensor) -> Tensor:
    """Return x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, as the reference code's `jax.nn.gelu`.

    On a CPU a compiled kernel takes at most half the time of PyTorch's, forward and backward (`docs/speed.md`).
    """
    return _gated(x, "gelu") if _has_kernel("gelu", x) else F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """Return x (1 + erf(x / √2)) / 2, the exact form, which timm uses."""
    return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if _is_faster_permuted(x) else F.gelu(x)


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + exp(-x)). On a CPU with AVX2 a compiled kernel takes four fifths of the time of PyTorch's."""
    return _gated(x, "silu") if _has_kernel("silu", x) else F.silu(x)


def activation_gradient(act: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` for the gradient `grad` of `act(x)`, which will not be differentiated again.

    Autograd computes it for any function. For those of this module a direct call saves the recording of a graph.
    """
    if act is gelu_erf and grad.dtype == x.dtype:
        return _gelu_erf_gradient(x, grad)
    if act in _KERNELS:
        return _gated_gradient(_KERNELS[act], x, grad)
    source = x.detach().requires_grad_()
    with torch.enable_grad():
        activated = act(source)
    return torch.autograd.grad(activated, source, grad)[0]


# Elements below which PyTorch's own functions are faster with their gradients: docs/speed.md has the times.
_LEAST = {"gelu": 1 << 13, "silu": 1 << 15, "permuted": 1 << 17}
# Names of the kernels in activations.c, `NAME`_forward and `NAME`_backward.
_KERNELS: dict[Callable[[Tensor], Tensor], str] = {gelu_tanh: "gelu", silu: "silu"}


def _has_kernel(name: str, x: Tensor) -> bool:
    # `can_bypass_dispatcher` comes first: a compiler that traces this must not evaluate the others
    return (
        can_bypass_dispatcher()
        and is_plain_cpu_tensor(x)
        and x.numel() >= _LEAST[name]
        and library() is not None
    )


def _is_faster_permuted(x: Tensor) -> bool:
    # oneDNN's GELU takes a third to a half of the time in both directions, but needs contiguous tensors; a permuted
    # channels_last tensor is contiguous. Graphs that are compiled or exported keep the plain function.
    return (
        not (torch.compiler.is_compiling() or is_transformed())
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() >= _LEAST["permuted"]
    )


def _gelu_erf_gradient(x: Tensor, grad: Tensor) -> Tensor:
    found: Tensor
    if type(grad) is Tensor and _is_faster_permuted(x):
        found = torch.ops.aten.gelu_backward(grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1))
        return found.permute(0, 3, 1, 2)
    found = torch.ops.aten.gelu_backward(grad, x)
    return found


def _gated(x: Tensor, name: str) -> Tensor:
    y: Tensor = _Gated.apply(x, name)
    return y


def _gated_gradient(name: str, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` by a kernel, or by plain operations where it cannot be used or is differentiated."""
    found: Tensor
    alone = not torch.is_grad_enabled() and grad.dtype == x.dtype
    if alone and type(grad) is Tensor and _has_kernel(name, x):
        found, grad = torch.empty_like(x), laid_out_as(x, grad)
        run(f"{name}_backward", x, grad, found, count=x.numel(), elements=x.numel())
    elif name == "gelu":
        found = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    elif alone:
        found = torch.ops.aten.silu_backward(grad, x)
    else:  # PyTorch has no derivative of `silu_backward`
        gate = torch.sigmoid(x)
        found = grad * gate * (1.0 + x * (1.0 - gate))
    return found


class _Gated(torch.autograd.Function):
    """Calls the kernels of one activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = name
        out = torch.empty_like(x)
        run(f"{name}_forward", x, out, count=x.numel(), elements=x.numel())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _gated_gradient(ctx.function, x, grad), None
