"""What convolutions and pools see beyond the border: XLA's SAME rule and the symmetric one.

Shapes: B C H W, or B H W C where it is said. Source of the rule: the reference code, which runs under XLA.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

#: Rows and columns to add: left, right, top, bottom.
Border: TypeAlias = tuple[int, int, int, int]


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """(low, high) of XLA's and TensorFlow's SAME rule: ceil(size / stride) outputs, odd padding at the end."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def pad_input(
    x: Tensor, kernel_size: int, stride: int, *, padding: str = "same", value: float = 0.0
) -> tuple[Tensor, tuple[int, int]]:
    """Pads B C H W. Returns the tensor and the symmetric padding that the next op should add itself, so that
    nothing is copied where both sides are equal and the fill is what the op would use.

    "same" is XLA's rule; "symmetric" is (k - 1) // 2 on every side, torch's and timm's custom. Both give
    ceil(size / stride) outputs for odd kernels; at stride 2 they look at different places of even sizes.
    """
    border, sides = borders(x, kernel_size, stride, padding=padding)
    return (x if border is None else F.pad(x, border, value=value)), sides


def borders(
    x: Tensor, kernel_size: int, stride: int, *, padding: str
) -> tuple[Border | None, tuple[int, int]]:
    """What `pad_input` adds to B C H W (None: nothing), and what the next op adds itself."""
    if padding == "symmetric":
        side = (kernel_size - 1) // 2
        return None, (side, side)
    top, bottom = same_padding(x.shape[-2], kernel_size, stride)
    left, right = same_padding(x.shape[-1], kernel_size, stride)
    if top == bottom and left == right:
        return None, (top, left)
    return (left, right, top, bottom), (0, 0)


def zero_border(x: Tensor, border: Border) -> Tensor:
    """B H W C within `border` of zeros, without a gradient. `F.pad` writes zeros everywhere first."""
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
    """The inside of B C H W, a view."""
    left, right, top, bottom = border
    height, width = x.shape[-2:]
    return x[..., top : height - bottom, left : width - right]
