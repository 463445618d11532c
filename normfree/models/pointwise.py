"""1x1 convolutions as matrix products, for CUDA devices.

In channels_last the pixels of a batch are the rows of a matrix, N·H·W x C, as they lie in memory. A 1x1 convolution is
its product with the weights, and so are both gradients; nothing is copied, and weights stay O I 1 1. Half of the
multiplications of an NFNet are of this kind.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Whether networks take the products on a CUDA device. False: it is not yet measured on a GPU.
PRODUCTS = False


def is_product(x: Tensor, weight: Tensor, *, stride: int, groups: int) -> bool:
    """Whether the convolution of `x` B I H W with `weight` O I h w is to be a product: on a CUDA device, of matrices
    that lie as they should. On a CPU it is the library's own way already."""
    return PRODUCTS and x.is_cuda and _is_pointwise(x, weight, stride=stride, groups=groups)


def _is_pointwise(x: Tensor, weight: Tensor, *, stride: int, groups: int) -> bool:
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and stride == groups == 1
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(x, weight, bias) for `x` B I H W and `weight` O I 1 1: B O H W, channels_last. Differentiable."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def pointwise_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, *, needs_x: bool = True, needs_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x` and `weight` of `pointwise` from that of its result, `grad` B O H W; None where not needed.

    All three of one type. For backward passes written by hand; autograd finds the same.
    """
    rows = grad.permute(0, 2, 3, 1)
    by_x = by_weight = None
    if needs_x:
        by_x = (rows @ weight.flatten(1)).permute(0, 3, 1, 2)
    if needs_weight:
        by_weight = (rows.flatten(0, 2).t() @ x.permute(0, 2, 3, 1).flatten(0, 2))[:, :, None, None]
    return by_x, by_weight
