"""The fused update on CUDA devices, by Triton kernels in which each program processes one unit of AGC.

Off unless it is requested (`Update(..., engine="triton")`): it has not been measured on a GPU. Its arithmetic is tested
through Triton's interpreter, its memory accesses as compiled for sm_90. Pointers come from `normfree.native.table`; in
its rows, the four addresses are those of weights, gradient, momentum and average, and the extra number is the group.

    numbers  float32        1 - d of the average's update; then `GROUP_NUMBERS` for each group

A unit is one range of memory, in contiguous tensors and in channels_last ones. `ALIGNED` promises the compiler 16-byte
accesses, so units that cannot keep the promise have a launch of their own.
"""

from __future__ import annotations

import torch
import triton  # type: ignore
import triton.language as tl  # type: ignore
from torch import Tensor

from normfree.native.table import PointerTable
from normfree.optim.agc import GRADIENT_FLOOR
from normfree.optim.fused import GROUP_NUMBERS, FusedUpdate

WIDTH = tl.constexpr(8)
FLOOR = tl.constexpr(GRADIENT_FLOOR)
INFINITY = tl.constexpr(float("inf"))

# Elements that a program processes at a time, and its warps: eight elements for each lane, two 16-byte accesses per
# tensor.
BLOCK, WARPS = 2048, 8

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
    """Clip, decay, step and average the units from `start` on; clipped[unit] = 1 if the unit was clipped.

    If the global norm is not finite, no weight, momentum or average is written, and no unit is clipped. Gradients are
    only read: the clipped gradient enters the momentum.
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
                # The two formulas of torch.lerp; each is exact at one end of [0, 1].
                e = tl.where(step < 0.5, e + step * (p - e), p - (p - e) * (1.0 - step))
                tl.store(averages + at, e, mask=here)
    else:
        tl.store(clipped + unit, 0)


class TritonUpdate(FusedUpdate):
    """`FusedUpdate` for float32 parameters on a CUDA device, or on any device if Triton interprets the kernels."""

    # Elements that a program processes at a time.
    block = BLOCK

    @classmethod
    def supports_device(cls, kind: str) -> bool:
        interpreted = not isinstance(update, triton.JITFunction)
        return kind == "cuda" or interpreted

    def _square_(self, table: PointerTable, squares: Tensor) -> None:
        with torch.cuda.device_of(squares):
            for start, count, hint in _launches(table):
                unit_squares[(count,)](
                    table.table, table.owner, squares, start,
                    BLOCK=self.block, ALIGNED=hint, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip

    def _update_(
        self, table: PointerTable, numbers: Tensor, squares: Tensor, grad_norm: Tensor, clipped: Tensor
    ) -> None:
        with torch.cuda.device_of(squares):
            for start, count, hint in _launches(table):
                update[(count,)](
                    table.table, table.owner, numbers, squares, grad_norm, clipped, start, self.eps,
                    BLOCK=self.block, ALIGNED=hint, EMA=self.ema is not None, num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip


def _launches(table: PointerTable) -> list[tuple[int, int, bool]]:
    """Return the first unit and the number of units of each launch, and whether its accesses are aligned."""
    halves = [(0, table.aligned_units, True), (table.aligned_units, table.units - table.aligned_units, False)]
    return [half for half in halves if half[1]]
