"""3x3 convolutions of stride 1 by Winograd's minimal filtering, for CPUs.

Each tile of 2 x 2 outputs sees 4 x 4 inputs d. With the matrices A, B and G of F(2 x 2, 3 x 3), all 0, ±1 and 1/2,

    y = Aᵀ [(G f Gᵀ) · (Bᵀ d B)] A        for one input channel and filter f,

takes 16 multiplications instead of 36. Over channels, filters and tiles the middle is 16 matrix products; the maps
around it are sums. Both gradients are of the same form: that of the input is a convolution with filters turned by half
a circle, and

    ∂f = Gᵀ [Σ (A ∂y Aᵀ) · (Bᵀ d B)] G     over the tiles.

The kernels of `normfree.native` do all of it, a block of tiles at a time, so that planes stay in the cache. Results are
no less exact than those of the plain sum, since fewer numbers are added up.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.1.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from normfree.native.library import library, run

#: Of winograd.c: channels and filters of a group are multiples of the first, blocks of tiles of the second; the third
#: is how many numbers lie between planes.
PANEL, ROWS, PAD = 16, 6, 16

#: Below these it is not faster: channels and filters of a group; tiles; with planes at hand, tiles times groups.
#: Measured from 16 to 512 channels and from 9 to 65,000 tiles.
LEAST_CHANNELS, LEAST_TILES, LEAST_WITH_PLANES = 32, 64, 96

#: Tiles of a block: 24 to 96 are as fast.
BLOCK = 48


@cache
def is_fast() -> bool:
    """Whether this processor is one that it is made for. Its products are for AVX2; with wider registers oneDNN's plain
    sum has twice the speed, and nobody has compared the two."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and library() is not None


def count_tiles(x: Tensor) -> int:
    """Of all images B C H W."""
    count, _, height, width = x.shape
    return int(count * -(-height // 2) * -(-width // 2))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """conv2d(x, weight, bias, padding=1, groups=groups): B O H W, channels_last. No gradient."""
    return convolve(x, filter_planes(weight, groups=groups), bias, groups=groups)


def input_gradient(grad: Tensor, weight: Tensor, *, groups: int) -> Tensor:
    """Gradient B I H W of the input of `conv2d`, channels_last, from that of its result, `grad` B O H W."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    return convolve(grad, filter_planes(weight, groups=groups, turned=True), None, groups=groups)


def weight_gradient(x: Tensor, grad: Tensor, *, groups: int) -> Tensor:
    """Gradient O I/groups 3 3 of the filters of `conv2d`, channels_last."""
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


def filter_planes(weight: Tensor, *, groups: int, turned: bool = False) -> Tensor:
    """G f Gᵀ of all filters f, for `convolve`: 16·groups matrices N x K, of a convolution from K to N channels in each
    group. In memory a matrix is N/PANEL x K x PANEL.

    turned: of the filters turned by half a circle, for the convolution that is the gradient of the input.
    """
    weight = weight.contiguous(memory_format=torch.channels_last)
    filters, inputs = weight.shape[:2]
    each = filters // groups
    matrix = (inputs, each) if turned else (each, inputs)
    planes = weight.new_empty(16 * groups, each * inputs + PAD)[:, :-PAD].unflatten(1, matrix)
    run(
        "winograd_filters", weight, planes, inputs, each, planes.stride(0), int(turned),
        count=filters // PANEL, elements=planes.numel(),
    )  # fmt: skip
    return planes


def convolve(x: Tensor, planes: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """`conv2d` with the filters whose planes these are."""
    images, inputs, height, width = x.shape
    outputs = groups * planes.shape[1]
    y = x.new_empty(images, height, width, outputs).permute(0, 3, 1, 2)
    threads, tiles = torch.get_num_threads(), count_tiles(x)
    blocks = -(-tiles // BLOCK)
    if groups < threads:  # so that each has as much to do
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
