"""Padding of convolutions and pools: XLA's SAME rule and the symmetric one.

Shapes are B C H W unless B H W C is stated. Source of the SAME rule: the reference code, which runs under XLA.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

# Columns and rows to add: left, right, top, bottom.
Border: TypeAlias = tuple[int, int, int, int]


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Return (low, high) of the SAME rule of XLA and TensorFlow: ceil(size / stride) outputs, odd padding at the end.

    >>> same_padding(8, 3, 2)
    (0, 1)
    """
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def pad_input(
    x: Tensor, kernel_size: int, stride: int, *, padding: str = "same", value: float = 0.0
) -> tuple[Tensor, tuple[int, int]]:
    """Return the padded input and the symmetric padding that the next op must add itself.

    Nothing is copied where both sides get equal padding, since the op can add that. "same" is XLA's rule; "symmetric"
    is (k - 1) // 2 on every side, as in torch and timm. Both give ceil(size / stride) outputs for odd kernel sizes; at
    stride 2 and even sizes their windows differ by one pixel.
    """
    border, sides = borders(x, kernel_size, stride, padding=padding)
    return (x if border is None else F.pad(x, border, value=value)), sides


def borders(
    x: Tensor, kernel_size: int, stride: int, *, padding: str
) -> tuple[Border | None, tuple[int, int]]:
    """Return what `pad_input` adds to `x` (None: nothing), and what the next op must add itself."""
    if padding == "symmetric":
        side = (kernel_size - 1) // 2
        return None, (side, side)
    top, bottom = same_padding(x.shape[-2], kernel_size, stride)
    left, right = same_padding(x.shape[-1], kernel_size, stride)
    if top == bottom and left == right:
        return None, (top, left)
    return (left, right, top, bottom), (0, 0)


def zero_border(x: Tensor, border: Border) -> Tensor:
    """Return `x` B H W C with `border` of zeros, without a gradient; `F.pad` would fill the whole result first."""
    left, right, top, bottom = border
    count, height, width, channels = x.shape
    padded = x.new_empty(count, top + height + bottom, left + width + right, channels)
    padded[:, :top].zero_()
    padded[:, top + height :].zero_()
    inside = padded[:, top : top + height]
    inside[:, :, :left].zero_()
    inside[:, :, left + width :].zero_()
    inside[:, :, left : left + width].copy_(x)
    return padded


def without_border(x: Tensor, border: Border) -> Tensor:
    """Return the view of `x` without its border."""
    left, right, top, bottom = border
    height, width = x.shape[-2:]
    return x[..., top : height - bottom, left : width - right]
