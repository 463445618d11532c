"""3x3 convolutions of stride 1 by Winograd's minimal filtering, for CPUs.

A tile of 2 x 2 outputs depends on 4 x 4 inputs d. With the matrices A, B and G of F(2 x 2, 3 x 3), all 0, ±1 and 1/2,

    y = Aᵀ [(G f Gᵀ) · (Bᵀ d B)] A        for one input channel and filter f,

takes 16 multiplications instead of 36. Over channels, filters and tiles the element-wise product becomes 16 matrix
products; the transforms before and after it are sums. Each of the 16 matrices is called a plane. Both gradients have
the same form: that of the input is a convolution with filters rotated by 180 degrees, and

    ∂f = Gᵀ [Σ (A ∂y Aᵀ) · (Bᵀ d B)] G     over the tiles.

The kernels of `native/winograd.c` compute it in blocks of tiles, so that planes stay in the cache. Results are as
accurate as those of the plain sum, since fewer numbers are added.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.1.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from normfree.native.library import library, run

# Constants of winograd.c: channels and filters of a group are multiples of PANEL, blocks of tiles of ROWS; PAD numbers
# separate the planes.
PANEL, ROWS, PAD = 16, 6, 16

# It is not faster below these: channels and filters of a group; tiles; tiles times groups if planes are given. Measured
# from 16 to 512 channels and from 9 to 65,000 tiles.
LEAST_CHANNELS, LEAST_TILES, LEAST_WITH_PLANES = 32, 64, 96

# Tiles of a block: 24 to 96 are as fast.
BLOCK = 48


@cache
def is_fast() -> bool:
    """Return True on processors with AVX2 and no wider registers, which the matrix products are written for.

    With wider registers oneDNN's plain sum is twice as fast, and the two have not been compared.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and library() is not None


def count_tiles(x: Tensor) -> int:
    """Return the number of tiles in all images of `x` B C H W."""
    count, _, height, width = x.shape
    return int(count * -(-height // 2) * -(-width // 2))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """Return F.conv2d(x, weight, bias, padding=1, groups=groups), B O H W in channels_last, without a gradient."""
    return conv2d_with_planes(x, filter_planes(weight, groups=groups), bias, groups=groups)


def input_gradient(grad: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """Return the gradient of the input of `conv2d`, B I H W in channels_last, from that of its result, B O H W."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    return conv2d_with_planes(grad, filter_planes(weight, groups=groups, rotated=True), None, groups=groups)


def weight_gradient(x: Tensor, grad: Tensor, *, groups: int) -> Tensor:
    """Return the gradient of the weight of `conv2d`, O I/groups 3 3 in channels_last."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    (_, inputs, height, width), outputs, threads = x.shape, grad.shape[1], torch.get_num_threads()
    own, each, parts = inputs // groups, outputs // groups, 1
    while groups * parts < threads and each // parts % (2 * PANEL) == 0:
        parts *= 2
    each //= parts
    rows = -(-each // ROWS) * ROWS
    scratch = x.new_empty(threads, 16 * (rows * own + PAD + own * (BLOCK + 1) + BLOCK * each + PAD) + PANEL)
    zeros = x.new_zeros(max(inputs, outputs))
    found = x.new_empty(outputs, 3, 3, own).permute(0, 3, 1, 2)
    run(
        "winograd_weight_gradient", x, grad, found, zeros, scratch, height, width, inputs, outputs, groups, parts,
        count_tiles(x), BLOCK, count=groups * parts, elements=grad.numel(),
    )  # fmt: skip
    return found


def filter_planes(weight: Tensor, *, groups: int, rotated: bool = False) -> Tensor:
    """Return the planes G f Gᵀ of all filters f, for `conv2d_with_planes`.

    Args:
        weight: O I/groups 3 3.
        groups: of the convolution.
        rotated: rotate the filters by 180 degrees, for the gradient of the input.

    Returns:
        16·groups matrices N x K, for a convolution from K to N channels in each group. In memory a matrix is
        N/PANEL x K x PANEL.
    """
    weight = weight.contiguous(memory_format=torch.channels_last)
    filters, inputs = weight.shape[:2]
    each = filters // groups
    matrix = (inputs, each) if rotated else (each, inputs)
    planes = weight.new_empty(16 * groups, each * inputs + PAD)[:, :-PAD].unflatten(1, matrix)
    run(
        "winograd_filters", weight, planes, inputs, each, planes.stride(0), int(rotated),
        count=filters // PANEL, elements=planes.numel(),
    )  # fmt: skip
    return planes


def conv2d_with_planes(x: Tensor, planes: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """Return `conv2d` of `x` with the filters that `planes` were computed from."""
    images, inputs, height, width = x.shape
    outputs = groups * planes.shape[1]
    y = x.new_empty(images, height, width, outputs).permute(0, 3, 1, 2)
    threads, tiles = torch.get_num_threads(), count_tiles(x)
    blocks = -(-tiles // BLOCK)
    if groups < threads:  # balance the work between threads
        blocks = -(-blocks // threads) * threads
    block = -(-tiles // (blocks * ROWS)) * ROWS
    scratch = x.new_empty(threads, 16 * (block * (inputs + outputs) // groups + 2 * PAD))
    zeros = x.new_zeros(max(inputs, outputs))
    run(
        "winograd_convolve", x, y, planes, zeros, zeros if bias is None else bias, scratch,
        height, width, inputs, outputs, groups, planes.stride(0), tiles, block,
        count=groups * -(-tiles // block), elements=y.numel(),
    )  # fmt: skip
    return y
