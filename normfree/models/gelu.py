"""GELU, x Φ(x), in its two forms, of tensors of any shape, each as fast on a CPU as it can be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.library import library, run
from normfree.native.memory import is_plain, laid_out_as, unwatched


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, as the reference's `jax.nn.gelu`.

    On a CPU by a compiled kernel, in a third of the time of torch's, forward and backward (`docs/speed.md`).
    """
    if (
        unwatched() and is_plain(x) and library() is not None
    ):  # a compiler must not look further than the first
        y: Tensor = _GeluTanh.apply(x)
        return y
    return F.gelu(x, approximate="tanh")


def gelu_erf(x: Tensor) -> Tensor:
    """x (1 + erf(x / √2)) / 2: the exact form, which timm uses."""
    # oneDNN's GELU, in a third of the time both ways, is for row-major float32 tensors; channels_last is one from
    # another side. A graph that is compiled or exported keeps the plain function.
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    ):
        return F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.gelu(x)


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        run("gelu_forward", x, out, count=x.numel(), elements=x.numel())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or type(grad) is not Tensor or grad.dtype != x.dtype or not unwatched():
            # a gradient that is differentiated again, among others
            return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        out, grad = torch.empty_like(x), laid_out_as(x, grad)
        run("gelu_backward", x, grad, out, count=x.numel(), elements=x.numel())
        return out
