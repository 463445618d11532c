"""Triton kernels of weight standardization: one program per filter, one launch for all convolutions of a network.

Only `normfree.ops.standardize` imports this file, when engine="triton" is requested: the kernels are tested in Triton's
interpreter, but were never measured on a GPU. Pointers come from the tables of `normfree.native.table`:

    table    int64 T x 8    per weight: addresses of weight, gain, result (or its gradient) and the weight's gradient,
                            elements in a filter, index of its first filter, address of the gain's gradient, 0
    owner    int32 U        index of the weight that each filter belongs to
    numbers  float32 T x 2  per weight: scale; the constant that is added to v·N

A filter is one run of memory, as in contiguous and channels_last weights. The hints under `ALIGNED` make the compiler
use 16-byte accesses. They are promises, so filters that cannot keep them get a launch of their own. In each kernel the
first two loops compute mean and power, and the last one writes; the repeated reads are cached.
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore

WIDTH = tl.constexpr(8)

# Dtypes of results that a program can write or read.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["start", "floor"])
def forward(
    table: tl.tensor,
    owner: tl.tensor,
    numbers: tl.tensor,
    start: tl.tensor,
    floor: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT: tl.constexpr,
) -> None:
    """Write the standardized weights in the type `OUT`."""
    row = tl.program_id(0) + start
    which = tl.load(owner + row).to(tl.int64)
    entry = table + which * WIDTH
    length = tl.load(entry + 4)
    index = row - tl.load(entry + 5)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32)) + index * length
    gain = tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + index)
    out = tl.load(entry + 2).to(tl.pointer_type(OUT)) + index * length
    if ALIGNED:
        length = tl.multiple_of(length, 4)
        weights = tl.multiple_of(weights, 16)
        out = tl.multiple_of(out, 16)
    scale = tl.load(numbers + which * 2)
    added = tl.load(numbers + which * 2 + 1)

    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(weights + at, mask=at < length, other=0.0)
    mean = tl.sum(total, axis=0) / length
    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        d = tl.where(at < length, tl.load(weights + at, mask=at < length, other=0.0) - mean, 0.0)
        total += d * d
    power = tl.maximum(tl.sum(total, axis=0) + added, floor)
    factor = gain * scale / tl.sqrt(power)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        d = tl.load(weights + at, mask=at < length) - mean
        tl.store(out + at, (d * factor).to(OUT), mask=at < length)


@triton.jit(do_not_specialize=["start", "floor"])
def backward(
    table: tl.tensor,
    owner: tl.tensor,
    numbers: tl.tensor,
    start: tl.tensor,
    floor: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    OUT: tl.constexpr,
) -> None:
    """Write the gradients of weights and gains from those of the standardized weights, which have the type `OUT`."""
    row = tl.program_id(0) + start
    which = tl.load(owner + row).to(tl.int64)
    entry = table + which * WIDTH
    length = tl.load(entry + 4)
    index = row - tl.load(entry + 5)
    weights = tl.load(entry).to(tl.pointer_type(tl.float32)) + index * length
    gain = tl.load(tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + index)
    grads = tl.load(entry + 2).to(tl.pointer_type(OUT)) + index * length
    out = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + index * length
    if ALIGNED:
        length = tl.multiple_of(length, 4)
        weights = tl.multiple_of(weights, 16)
        grads = tl.multiple_of(grads, 16)
        out = tl.multiple_of(out, 16)
    scale = tl.load(numbers + which * 2)
    added = tl.load(numbers + which * 2 + 1)

    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    grad_total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(weights + at, mask=at < length, other=0.0)
        grad_total += tl.load(grads + at, mask=at < length, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / length
    grad_mean = tl.sum(grad_total, axis=0) / length
    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    grad_total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        d = tl.where(at < length, tl.load(weights + at, mask=at < length, other=0.0) - mean, 0.0)
        total += d * d
        grad_total += d * tl.load(grads + at, mask=at < length, other=0.0).to(tl.float32)
    power = tl.sum(total, axis=0) + added
    along = tl.sum(grad_total, axis=0)  # component of the gradient along the weights
    inverse = 1.0 / tl.sqrt(tl.maximum(power, floor))
    # the gradient through the power: all of it above the lower bound, half at equality, none below
    open_ = tl.where(power > floor, 1.0, tl.where(power == floor, 0.5, 0.0))
    back = along * inverse * inverse * open_
    factor = gain * scale * inverse
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        d = tl.load(weights + at, mask=at < length) - mean
        g = tl.load(grads + at, mask=at < length).to(tl.float32)
        tl.store(out + at, factor * (g - grad_mean - d * back), mask=at < length)
    tl.store(tl.load(entry + 6).to(tl.pointer_type(tl.float32)) + index, along * inverse * scale)
