"""Triton kernels of one optimizer step: a program is a unit of AGC, whatever the number of tensors.

Imported by `normfree.optim.fused` alone, and only there where Triton is; `clip_grad_`, `SGD.step` and `Ema.update_`
are the same in plain torch. Pointers come from a table, so that one launch serves all tensors:

    table    int64 T x 8    per tensor: addresses of weights, gradient, momentum and average, elements in a unit,
                            index of its first unit, its group, nothing
    owner    int32 U        which tensor a unit belongs to
    numbers  float32        weight of the average's step; then per group what `GROUP_NUMBERS` lists

A unit is one run of memory, which holds for contiguous tensors and for channels_last ones. The hints of `ALIGNED` are
what makes the compiler use 16-byte accesses; they are promises, so units that cannot keep them have a launch of
their own.
"""

from __future__ import annotations

import triton  # type: ignore
import triton.language as tl  # type: ignore

from normfree.optim.agc import GRADIENT_FLOOR

WIDTH = tl.constexpr(8)
FLOOR = tl.constexpr(GRADIENT_FLOOR)
INFINITY = tl.constexpr(float("inf"))

#: Columns of `numbers` for each group, after the first element.
GROUP_NUMBERS = ("lr", "weight_decay", "momentum", "nesterov", "clipping")
STRIDE = tl.constexpr(len(GROUP_NUMBERS))


@triton.jit(do_not_specialize=["start"])
def unit_squares(
    table: tl.tensor,
    owner: tl.tensor,
    squares: tl.tensor,
    start: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """squares[unit] = sum of g² over the unit, for the units from `start` on."""
    unit = tl.program_id(0) + start
    entry = table + tl.load(owner + unit).to(tl.int64) * WIDTH
    length = tl.load(entry + 4)
    offset = (unit - tl.load(entry + 5)) * length
    grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + offset
    if ALIGNED:
        length = tl.multiple_of(length, 4)
        grads = tl.multiple_of(grads, 16)
    total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        g = tl.load(grads + at, mask=at < length, other=0.0)
        total += g * g
    tl.store(squares + unit, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["start", "eps"])
def update(
    table: tl.tensor,
    owner: tl.tensor,
    numbers: tl.tensor,
    squares: tl.tensor,
    grad_norm: tl.tensor,
    clipped: tl.tensor,
    start: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMA: tl.constexpr,
) -> None:
    """Clipping, decay, momentum, step and average of the units from `start` on; clipped[unit] says who was over.

    Where the global norm is not finite, no weight, momentum or average is written, and nobody was clipped. The
    gradients stay as they are in any case: what is clipped is what enters the momentum.
    """
    unit = tl.program_id(0) + start
    if tl.load(grad_norm) < INFINITY:
        entry = table + tl.load(owner + unit).to(tl.int64) * WIDTH
        length = tl.load(entry + 4)
        offset = (unit - tl.load(entry + 5)) * length
        weights = tl.load(entry).to(tl.pointer_type(tl.float32)) + offset
        grads = tl.load(entry + 1).to(tl.pointer_type(tl.float32)) + offset
        momenta = tl.load(entry + 2).to(tl.pointer_type(tl.float32)) + offset
        averages = tl.load(entry + 3).to(tl.pointer_type(tl.float32)) + offset
        if ALIGNED:
            length = tl.multiple_of(length, 4)
            weights = tl.multiple_of(weights, 16)
            grads = tl.multiple_of(grads, 16)
            momenta = tl.multiple_of(momenta, 16)
            averages = tl.multiple_of(averages, 16)
        group = numbers + 1 + tl.load(entry + 6) * STRIDE
        lr = tl.load(group)
        decay = tl.load(group + 1)
        momentum = tl.load(group + 2)
        nesterov = tl.load(group + 3)
        clipping = tl.load(group + 4)

        total = tl.full((BLOCK,), 0.0, dtype=tl.float32)
        for begin in range(0, tl.where(clipping > 0.0, length, 0), BLOCK):
            at = begin + tl.arange(0, BLOCK)
            p = tl.load(weights + at, mask=at < length, other=0.0)
            total += p * p
        limit = tl.maximum(tl.sqrt(tl.sum(total, axis=0)), eps) * clipping
        norm = tl.sqrt(tl.load(squares + unit))
        over = (norm > limit) & (clipping > 0.0)
        scale = tl.where(over, limit / tl.maximum(norm, FLOOR), 1.0)
        tl.store(clipped + unit, over.to(tl.int8))

        step = tl.load(numbers)
        for begin in range(0, length, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            here = at < length
            p = tl.load(weights + at, mask=here)
            g = tl.load(grads + at, mask=here) * scale + decay * p
            m = momentum * tl.load(momenta + at, mask=here) + g
            p -= lr * tl.where(nesterov > 0.0, g + momentum * m, m)
            tl.store(weights + at, p, mask=here)
            tl.store(momenta + at, m, mask=here)
            if EMA:
                e = tl.load(averages + at, mask=here)
                # torch.lerp's two forms: each is exact at its end of [0, 1].
                e = tl.where(step < 0.5, e + step * (p - e), p - (p - e) * (1.0 - step))
                tl.store(averages + at, e, mask=here)
    else:
        tl.store(clipped + unit, 0)
