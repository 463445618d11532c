"""Backends of a convolution, each with the same four methods, and the one function that chooses between them.

PyTorch's own convolution (oneDNN on CPUs, cuDNN on GPUs) is the default. On CPUs two others are used where they were
measured to be faster: Winograd's algorithm for 3x3 convolutions (`winograd`), and matrix products for the gradient of
the weight (`weight_gradient`) and for 1x1 convolutions of few pixels. All give the same results to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.dispatch import (
    can_bypass_dispatcher,
    eager_training,
    is_plain_cpu_tensor,
    is_transformed,
)
from normfree.native.processor import processor_kind
from normfree.ops import winograd
from normfree.ops.weight_gradient import LEAST_CHANNELS, LEAST_FILTERS, weight_gradient

# Pixels of all images up to which a 1x1 convolution is faster as a product. oneDNN copies the filters into another
# layout at each call, which pays for many pixels only: docs/speed.md has the measured layers.
MOST_ROWS = 2048
# Pixels of all outputs up to which patches and products are faster for the gradient of a 3x3 weight, by the kind of
# processor; without a limit on others. With 0, no product in float32 is used: each takes twice the time of the
# same convolution.
MOST_PATCHES = {"AVX512": 512, "AVX512 AMD": 0}


class Geometry(NamedTuple):
    """Stride, zero padding (rows, columns) and groups of a convolution."""

    stride: int
    padding: tuple[int, int]
    groups: int


class Backend(Protocol):
    """One way to compute a convolution and its gradients.

    Shapes: x B I H W, weight O I/groups h w, bias O, result and its gradient `grad` B O H' W'.
    """

    bypasses_dispatcher: bool
    """Whether it calls compiled kernels, which hooks into PyTorch's operations do not see."""

    def supports(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
        """Return True if the backend can compute this convolution, and is the faster way to do so."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """Return the convolution of `x`."""
        ...

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        """Return the gradient of `x`."""
        ...

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias; None for those that `needs` excludes."""
        ...


class TorchBackend:
    """PyTorch's own convolution: every device and dtype. Only its `forward` is differentiable by autograd."""

    bypasses_dispatcher = False

    def supports(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
        return True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, 1, geometry.groups)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        found, _, _ = _convolution_backward(grad, x, weight, geometry, (True, False, False))
        assert found is not None
        return found

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        _, by_weight, by_bias = _convolution_backward(grad, x, weight, geometry, (False, *needs))
        return by_weight, by_bias


class ProductBackend(TorchBackend):
    """Weight gradients, and 1x1 convolutions of few pixels, as matrix products; the rest is PyTorch's.

    For training on CPUs in channels_last: in float32, and in bfloat16 for 1x1 convolutions of few pixels.
    """

    def supports(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
        return (
            eager_training()
            and x.device.type == "cpu"
            and x.dtype == weight.dtype
            and (
                (x.dtype == torch.float32 and most_patches() > 0)
                or (x.dtype == torch.bfloat16 and is_small_product(x, weight, geometry))
            )
            and len(weight) // geometry.groups >= LEAST_FILTERS
            and weight.shape[1] >= LEAST_CHANNELS
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if not is_small_product(x, weight, geometry):
            return super().forward(x, weight, bias, geometry)
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        if not is_small_product(x, weight, geometry):
            return super().input_gradient(grad, x, weight, geometry)
        rows = grad.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return rows.matmul(weight.flatten(1)).permute(0, 3, 1, 2)

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        size = (weight.shape[2], weight.shape[3])
        if size != (1, 1) and grad.numel() // grad.shape[1] > most_patches():
            return super().weight_gradient(grad, x, weight, geometry, needs=needs)
        by_weight = weight_gradient(x, grad, kernel_size=size, **geometry._asdict()) if needs[0] else None
        return by_weight, grad.sum((0, 2, 3)) if needs[1] else None


def is_small_product(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return True if a convolution is one matrix product with at most MOST_ROWS rows."""
    rows = len(x) * x.shape[2] * x.shape[3]
    return weight.shape[2:] == (1, 1) and geometry == (1, (0, 0), 1) and rows <= MOST_ROWS


def most_patches() -> float:
    """Return the limit of MOST_PATCHES on this processor."""
    return MOST_PATCHES.get(processor_kind(), math.inf)


class WinogradBackend:
    """3x3 convolutions of stride 1 by Winograd's algorithm: CPUs with AVX2, plain float32 channels_last tensors.

    Where it is faster only for some of output, input gradient and weight gradient, the others are those of `fallback`.
    """

    bypasses_dispatcher = True

    def __init__(self, fallback: TorchBackend) -> None:
        self.fallback = fallback

    def supports(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
        return can_use_winograd(x, weight, bias, geometry) and bool(
            winograd.output_side(x, weight, groups=geometry.groups)
            or winograd.weight_side(x, weight, groups=geometry.groups)
        )

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if side := winograd.output_side(x, weight, groups=geometry.groups):
            return winograd.conv2d(x, weight, bias, groups=geometry.groups, side=side)
        return self.fallback.forward(x, weight, bias, geometry)

    def input_gradient(self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        if side := winograd.output_side(x, weight, groups=geometry.groups):
            return winograd.input_gradient(grad, weight, groups=geometry.groups, side=side)
        return self.fallback.input_gradient(grad, x, weight, geometry)

    def weight_gradient(
        self, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        side = winograd.weight_side(x, weight, groups=geometry.groups)
        if not side:
            return self.fallback.weight_gradient(grad, x, weight, geometry, needs=needs)
        by_weight = winograd.weight_gradient(x, grad, groups=geometry.groups, side=side) if needs[0] else None
        return by_weight, grad.sum((0, 2, 3)) if needs[1] else None


def can_use_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """Return True if the kernels of `winograd` take these tensors, and nothing would miss the bypassed operations."""
    return (
        can_bypass_dispatcher()  # first: an export must not depend on sizes
        and tuple(weight.shape[2:]) == (3, 3)
        and geometry[:2] == (1, (1, 1))
        and is_plain_cpu_tensor(x)
        and is_plain_cpu_tensor(weight)
        and (bias is None or is_plain_cpu_tensor(bias))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


TORCH, PRODUCTS = TorchBackend(), ProductBackend()
WINOGRAD = WinogradBackend(fallback=PRODUCTS)


def choose_backend(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Backend:
    """Return the fastest backend for this convolution."""
    for backend in (WINOGRAD, PRODUCTS):
        if backend.supports(x, weight, bias, geometry):
            return backend
    return TORCH


def gradients(
    backend: Backend,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight and bias by `backend`; None for those that `needs` excludes.

    PyTorch's own gradient is used in place of `backend` for a convolution under autocast, whose result has another
    dtype than its input or its weight, and where something observes the backward pass that `backend` would bypass.
    """
    if not grad.dtype == x.dtype == weight.dtype:
        backend, x, weight = TORCH, x.to(grad.dtype), weight.to(grad.dtype)
    elif is_transformed() or (
        backend.bypasses_dispatcher and not (type(grad) is Tensor and can_bypass_dispatcher())
    ):
        backend = TORCH
    if backend is TORCH:  # one call is faster than one for each gradient
        return _convolution_backward(grad, x, weight, geometry, needs)
    by_weight = by_bias = None
    if any(needs[1:]):
        by_weight, by_bias = backend.weight_gradient(grad, x, weight, geometry, needs=needs[1:])
    by_x = backend.input_gradient(grad, x, weight, geometry) if needs[0] else None
    return by_x, by_weight, by_bias


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return PyTorch's gradients of input, weight and bias."""
    stride, padding, groups = geometry
    found: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [len(weight)],
        [stride, stride],
        padding,
        [1, 1],
        False,
        [0, 0],
        groups,
        needs,
    )
    return found
