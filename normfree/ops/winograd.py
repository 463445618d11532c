"""3x3 convolutions of stride 1 by Winograd's minimal filtering, for CPUs.

A tile of s x s outputs depends on (s + 2) x (s + 2) inputs d. With the constant matrices A, B and G of F(s x s, 3 x 3),

    y = Aᵀ [(G f Gᵀ) · (Bᵀ d B)] A        for one input channel and filter f,

takes 16 multiplications instead of 36 for s = 2, and 36 instead of 144 for s = 4. Over channels, filters and tiles
the element-wise product becomes (s + 2)² matrix products; the transforms before and after it are sums. Each of these
matrices is called a plane. Both gradients have the same form: that of the input is a convolution with filters rotated
by 180 degrees, and

    ∂f = Gᵀ [Σ (A ∂y Aᵀ) · (Bᵀ d B)] G     over the tiles.

The kernels of `native/winograd.c` compute it in blocks of tiles, so that planes stay in the cache. For s = 2 results
are as accurate as those of the plain sum, since fewer numbers are added. For s = 4 the relative error is 1e-6 to 4e-6,
three to five times that of the plain sum: the matrices contain numbers up to 8, and not only 0, ±1 and 1/2.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), sections 4.1 and 4.3.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from normfree.native.library import float32_memory, library, run
from normfree.native.processor import processor_kind

# Constants of winograd.c: channels and filters of a group are multiples of PANEL, blocks of tiles of ROWS; PAD numbers
# separate the planes.
PANEL, ROWS, PAD = 16, 12, 16

# Tiles of a block. 48 are as fast for few channels, and slower where the planes of a block no longer fit in the cache.
BLOCK = 24

# It is not faster with fewer channels or filters of a group, on any processor; measured from 16 to 512.
LEAST_CHANNELS = 32


class TileLimits(NamedTuple):
    """Sizes at which tiles become faster than PyTorch's convolution; `matrix`: channels times filters of a group.

    Attributes:
        large: tiles of 4 x 4 from which on they are used for outputs and the gradient of the input.
        small: tiles of 2 x 2 from which on they are used instead.
        small_channels: channels of a group from which on tiles of 2 x 2 are used.
        packed: as `small`, if the planes of the filters have been computed already.
        matrix: largest matrix for outputs and the gradient of the input.
        weight_large, weight_small: as `large` and `small`, for the gradient of the weight.
        weight_channels: channels and filters of a group from which on it uses tiles.
        weight_matrix: largest matrix for the gradient of the weight.
    """

    large: int
    small: int
    small_channels: int
    packed: int
    matrix: int
    weight_large: int
    weight_small: int
    weight_channels: int
    weight_matrix: int


# By the kind of processor: docs/speed.md has the measurements.
LIMITS = {
    "AVX2": TileLimits(64, 64, 32, 36, 256 * 256, 64, 64, 32, 256 * 256),
    "AVX512": TileLimits(144, 320, 64, 64, 256 * 256, sys.maxsize, 64, 32, 192 * 192),
    "AVX512 AMD": TileLimits(48, 64, 128, 64, 256 * 256, 48, 36, 64, 384 * 384),
}


def limits() -> TileLimits | None:
    """Return the limits of this processor, or None if it has no AVX2 or the kernels are not installed.

    On Windows they are compiled without AVX2.
    """
    if library() is None or sys.platform == "win32":
        return None
    return LIMITS.get(processor_kind())


def output_side(x: Tensor, weight: Tensor, *, groups: int, packed: bool = False) -> int:
    """Return the side of the tiles that compute outputs or the gradient of the input fastest; 0: PyTorch is faster.

    Args:
        x: B C H W.
        weight: O I/groups 3 3.
        groups: of the convolution.
        packed: whether the planes of the filters have been computed already.
    """
    own, each, found = weight.shape[1], len(weight) // groups, limits()
    if found is None or not _fits(own, each) or own * each > found.matrix:
        return 0
    if count_tiles(x, 4) >= found.large:
        return 4
    enough = count_tiles(x, 2) >= (found.packed if packed else found.small)
    return 2 if enough and min(own, each) >= found.small_channels else 0


def weight_side(x: Tensor, weight: Tensor, *, groups: int) -> int:
    """Return the side of the tiles that compute the gradient of the weight fastest; 0: PyTorch is faster."""
    own, each, found = weight.shape[1], len(weight) // groups, limits()
    if found is None or not _fits(own, each) or own * each > found.weight_matrix:
        return 0
    if min(own, each) < found.weight_channels:
        return 0
    if count_tiles(x, 4) >= found.weight_large:
        return 4
    return 2 if count_tiles(x, 2) >= found.weight_small else 0


def _fits(own: int, each: int) -> bool:
    """Return True for numbers of channels and filters of a group that the kernels take and are not too small."""
    return all(n >= LEAST_CHANNELS and n % PANEL == 0 for n in (own, each))


class _Scratch(threading.local):
    """Memory that calls of one thread reuse: the pages of a new large tensor cost as much as writing it."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def numbers(self, purpose: str, count: int) -> Tensor:
        """Return a float32 tensor of at least `count` numbers, which the next call for the same purpose overwrites."""
        kept = self.kept.get(purpose)
        if kept is None or len(kept) < count:
            kept = self.kept[purpose] = float32_memory(count)
        return kept


_SCRATCH = _Scratch()


def count_tiles(x: Tensor, side: int) -> int:
    """Return the number of tiles of `side` x `side` outputs in all images of `x` B C H W."""
    count, _, height, width = x.shape
    return int(count * -(-height // side) * -(-width // side))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *, groups: int, side: int) -> Tensor:
    """Return F.conv2d(x, weight, bias, padding=1, groups=groups), B O H W in channels_last, without a gradient."""
    planes = filter_planes(weight, groups=groups, side=side, reuse=True)
    return conv2d_with_planes(x, planes, bias, groups=groups)


def input_gradient(grad: Tensor, weight: Tensor, *, groups: int, side: int) -> Tensor:
    """Return the gradient of the input of `conv2d`, B I H W in channels_last, from that of its result, B O H W."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    planes = filter_planes(weight, groups=groups, side=side, rotated=True, reuse=True)
    return conv2d_with_planes(grad, planes, None, groups=groups)


def weight_gradient(x: Tensor, grad: Tensor, *, groups: int, side: int) -> Tensor:
    """Return the gradient of the weight of `conv2d`, O I/groups 3 3 in channels_last."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    (_, inputs, height, width), outputs, threads = x.shape, grad.shape[1], torch.get_num_threads()
    own, each, parts = inputs // groups, outputs // groups, 1
    while groups * parts < threads and each // parts % (2 * PANEL) == 0:
        parts *= 2
    each //= parts
    rows, positions = -(-each // ROWS) * ROWS, (side + 2) ** 2
    numbers = positions * (rows * own + PAD + own * (BLOCK + 1) + BLOCK * each + PAD) + ROWS
    scratch = _SCRATCH.numbers("scratch", threads * numbers)
    zeros = x.new_zeros(max(inputs, outputs))
    found = x.new_empty(outputs, 3, 3, own).permute(0, 3, 1, 2)
    run(
        "winograd_weight_gradient", x, grad, found, zeros, scratch, height, width, inputs, outputs, groups, parts,
        count_tiles(x, side), BLOCK, side, count=groups * parts, elements=grad.numel(),
    )  # fmt: skip
    return found


def filter_planes(
    weight: Tensor, *, groups: int, side: int, rotated: bool = False, reuse: bool = False
) -> Tensor:
    """Return the planes G f Gᵀ of all filters f, for `conv2d_with_planes`.

    Args:
        weight: O I/groups 3 3.
        groups: of the convolution.
        side: of the tiles of outputs, 2 or 4.
        rotated: rotate the filters by 180 degrees, for the gradient of the input.
        reuse: write them to memory that the next such call of this thread overwrites.

    Returns:
        (side + 2)²·groups matrices N x K, for a convolution from K to N channels in each group. In memory a matrix is
        N/PANEL x K x PANEL.
    """
    weight = weight.contiguous(memory_format=torch.channels_last)
    filters, inputs = weight.shape[:2]
    each = filters // groups
    matrix = (inputs, each) if rotated else (each, inputs)
    count, distance = (side + 2) ** 2 * groups, each * inputs + PAD
    memory = _SCRATCH.numbers("planes", count * distance) if reuse else float32_memory(count * distance)
    planes = memory[: count * distance].view(count, distance)[:, :-PAD].unflatten(1, matrix)
    run(
        "winograd_filters", weight, planes, inputs, each, planes.stride(0), int(rotated), side,
        count=filters // PANEL, elements=planes.numel(),
    )  # fmt: skip
    return planes


def conv2d_with_planes(x: Tensor, planes: Tensor, bias: Tensor | None, *, groups: int) -> Tensor:
    """Return `conv2d` of `x` with the filters that `planes` were computed from."""
    images, inputs, height, width = x.shape
    positions, outputs = len(planes) // groups, groups * planes.shape[1]
    side = math.isqrt(positions) - 2
    y = x.new_empty(images, height, width, outputs).permute(0, 3, 1, 2)
    threads, tiles = torch.get_num_threads(), count_tiles(x, side)
    blocks = -(-tiles // BLOCK)
    if groups < threads:  # balance the work between threads
        blocks = -(-blocks // threads) * threads
    block = -(-tiles // (blocks * ROWS)) * ROWS
    scratch = _SCRATCH.numbers(
        "scratch", threads * positions * (block * (inputs + outputs) // groups + 2 * PAD)
    )
    zeros = x.new_zeros(max(inputs, outputs))
    run(
        "winograd_convolve", x, y, planes, zeros, zeros if bias is None else bias, scratch,
        height, width, inputs, outputs, groups, planes.stride(0), tiles, block, side,
        count=groups * -(-tiles // block), elements=y.numel(),
    )  # fmt: skip
    return y
