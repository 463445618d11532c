"""The gradient of a convolution's weight as matrix products, for CPUs.

For channels_last tensors, oneDNN computes this gradient at half the rate of its forward pass, because it reads memory
with the stride of a pixel for each filter and tap. Products of the output's gradient (filters x pixels) with patches of
the input (pixels x taps and channels) take 0.5 to 0.9 of that time (docs/speed.md).

A tap is one position in a filter. Patches hold only the taps of one row of the filter, for as many images as fit in the
cache. Rows of pixels are ordered first and images second, so the patches for the next row of taps are the same matrix
from a later row on. This writes a third of what whole patches of 3x3 filters would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.ops.padding import zero_border

# Filters and input channels of a group below which oneDNN is as fast: measured from 8 to 1536.
LEAST_FILTERS, LEAST_CHANNELS = 64, 16

# Bytes of patches written at a time: an eighth of the 32 MB of last-level cache that the cores of a server share.
# A quarter of it to twice as much is as fast for most layers of NFNet-F0 and ResNet-50, and none is better for all.
PATCHES = 4 << 20


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the gradient O I/groups h w of the weight of a convolution, in channels_last.

    Args:
        x: the input, B I H W; copied unless it is channels_last.
        grad: the gradient of the output, B O H' W'; copied unless it is channels_last.
        kernel_size: (h, w).
        stride: of rows and columns.
        padding: zeros added to (rows, columns).
        groups: of the convolution.
    """
    x, grad = (t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for t in (x, grad))
    count, height, width, filters = grad.shape
    if kernel_size == (1, 1) and (stride, padding, groups) == (1, (0, 0), 1):
        product = grad.reshape(count * height * width, filters).t().mm(x.flatten(0, 2))
        return product[:, :, None, None].contiguous(memory_format=torch.channels_last)
    if any(padding):
        x = zero_border(x, (padding[1], padding[1], padding[0], padding[0]))
    rows, columns, own, each = *kernel_size, x.shape[-1] // groups, filters // groups
    image, row, pixel = x.stride()[:3]
    total = x.new_zeros(rows, groups, each, columns * own)
    at_once = max(1, PATCHES // (stride * height * width * columns * x.shape[-1] * x.element_size()))
    for start in range(0, count, at_once):
        by_output = grad[start : start + at_once].transpose(0, 1)
        images = by_output.shape[1]
        by_filter = by_output.reshape(height * images * width, groups, each).permute(1, 2, 0)
        for phase in range(min(stride, rows)):  # rows of taps that read the same rows of pixels
            later = (rows - 1 - phase) // stride
            patches = x.as_strided(
                (groups, height + later, images, width, columns, own),
                (own, stride * row, image, stride * pixel, pixel, 1),
                x.storage_offset() + start * image + phase * row,
            ).reshape(groups, (height + later) * images * width, columns * own)  # fmt: skip
            for k in range(later + 1):
                first = k * images * width
                total[phase + k * stride].baddbmm_(
                    by_filter, patches[:, first : first + height * images * width]
                )
    return (
        total.view(rows, filters, columns, own)
        .permute(1, 3, 0, 2)
        .contiguous(memory_format=torch.channels_last)
    )
