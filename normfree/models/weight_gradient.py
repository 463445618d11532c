"""The gradient of a convolution's kernel as matrix products, for CPUs.

oneDNN's own, for channels_last tensors, reaches half of what its forward pass does: per filter and tap it walks over
memory with the stride of a pixel. As a product of the output's gradient (filters x pixels) with the input's patches
(pixels x taps and channels) it is a matrix product as any other. A patch is a view; patches are laid out side by side
for as many images as fit in the cache. Measured on NFNet-F0's convolutions: 1.2 to 2 times as fast (docs/speed.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Filters and input channels of a group below which oneDNN's way is as fast: measured from 8 to 1536.
LEAST_FILTERS, LEAST_CHANNELS = 64, 16

#: Bytes of patches laid out at a time: a quarter of the 32 MB that a server's cores share as last cache. A half and
#: three times as much are no faster.
PATCHES = 8 << 20


def pays(x: Tensor, weight: Tensor, *, groups: int) -> bool:
    """Whether products are the faster way to the gradient of `weight` for the input `x`."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(weight) // groups >= LEAST_FILTERS
        and weight.shape[1] >= LEAST_CHANNELS
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def weight_gradient(
    x: Tensor,
    grad: Tensor,
    *,
    kernel_size: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    groups: int,
) -> Tensor:
    """Gradient O I/groups H W of the kernel of `conv2d(x, kernel, None, stride, padding, 1, groups)`, channels_last.

    x: the input B I H W; grad: the gradient of the output. Any memory format; channels_last is not copied.
    """
    x, grad = (t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for t in (x, grad))
    count, height, width, filters = grad.shape
    if kernel_size == (1, 1) and (stride, padding, groups) == (1, (0, 0), 1):
        product = grad.reshape(count * height * width, filters).t().mm(x.flatten(0, 2))
        return product[:, :, None, None].contiguous(memory_format=torch.channels_last)
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    rows, columns, own, each = *kernel_size, x.shape[-1] // groups, filters // groups
    image, row, pixel = x.stride()[:3]
    patches = x.as_strided(
        (groups, count, height, width, rows, columns, own),
        (own, image, stride * row, stride * pixel, row, pixel, 1),
    )
    total = x.new_zeros(groups, each, rows * columns * own)
    at_once = max(1, PATCHES // (height * width * rows * columns * x.shape[-1] * x.element_size()))
    for part, by_output in zip(patches.split(at_once, 1), grad.split(at_once), strict=True):
        by_filter = by_output.reshape(len(by_output) * height * width, groups, each).permute(1, 2, 0)
        total.baddbmm_(by_filter, part.reshape(groups, by_filter.shape[2], rows * columns * own))
    return total.view(filters, rows, columns, own).permute(0, 3, 1, 2)
