"""Weight standardization of many convolutions at once, and once per optimizer step.

`standardize_all` is `layers.standardize` for a list of weights, as one op: on CUDA devices with Triton one launch each
way (two if some filters do not lie on 16-byte boundaries), on CPUs the compiled kernels of `normfree.native`, elsewhere
plain torch with the gradient in closed form.
`standardized_once` lets all micro-batches of a step share the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normfree.native.dispatch import can_bypass_dispatcher, is_dense, is_plain_cpu_tensor, laid_out_as
from normfree.native.library import library, run
from normfree.native.table import TableEntry, is_aligned, pointer_table, upload
from normfree.ops.standardize_torch import constants, standardize_backward, standardize_forward

#: Elements that a program takes at a time, and its warps.
BLOCK, WARPS = 2048, 8


# --- many at once ------------------------------------------------------------------------------------


def standardize_all(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    scales: Sequence[float],
    *,
    eps: str = "floor",
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`standardize(weight, gain, scale=scale, eps=eps)` of every weight, in the memory format of the weight.

    dtype: of the results; None is that of each weight. Gradients of first order flow to weights and gains; kept for
    them are those themselves, and two numbers a filter.
    """
    return list(_Standardize.apply(tuple(scales), eps, dtype, *weights, *gains))


class _Standardize(torch.autograd.Function):
    """Of all weights and gains, one list behind the other."""

    @staticmethod
    def forward(
        ctx: Any, scales: tuple[float, ...], eps: str, dtype: torch.dtype | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.eps, ctx.moments = scales, eps, None
        weights, gains = tensors[: len(scales)], tensors[len(scales) :]
        engine = _engine(tensors, dtype)
        if engine != "torch":
            outs = [torch.empty_like(w, dtype=dtype) for w in weights]
            _launch(engine, "forward", [weights, gains, outs], scales, eps)
            return tuple(outs)
        made = [
            standardize_forward(w, g, scale=scale, eps=eps)
            for w, g, scale in zip(weights, gains, scales, strict=True)
        ]
        ctx.moments = [moments for _, moments in made]
        return tuple(kernel.to(dtype or w.dtype) for w, (kernel, _) in zip(weights, made, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """A kernel that was not used has no gradient, and its weight gets none."""
        count = len(grads)
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        weights, gains = ([ctx.saved_tensors[i + shift] for i, _ in found] for shift in (0, count))
        scales = [ctx.scales[i] for i, _ in found]
        arrived = [laid_out_as(w, grad) for w, (_, grad) in zip(weights, found, strict=True)]
        results: list[Tensor | None] = [None] * (2 * count)
        engine = _engine([*weights, *gains], arrived[0].dtype) if found else "torch"
        if engine != "torch":
            outs = [[torch.empty_like(t) for t in column] for column in (weights, gains)]
            _launch(engine, "backward", [weights, gains, arrived, *outs], scales, ctx.eps)
            pairs = list(zip(*outs, strict=True))
        else:
            moments = [ctx.moments[i] if ctx.moments else None for i, _ in found]
            pairs = [
                standardize_backward(w, g, up, scale=scale, eps=ctx.eps, moments=own)
                for w, g, up, scale, own in zip(weights, gains, arrived, scales, moments, strict=True)
            ]
        for (i, _), (by_weight, by_gain) in zip(found, pairs, strict=True):
            results[i], results[count + i] = by_weight, by_gain
        return None, None, None, *results


def _engine(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> str:
    """What computes on them. Kernels take float32 without gaps, dimension 0 outermost: "triton" on CUDA; "compiled", of
    `normfree.native`, on CPUs, with results in float32; else "torch"."""
    if can_bypass_dispatcher() and all(map(is_plain_cpu_tensor, tensors)):
        return "compiled" if dtype in (None, torch.float32) and library() is not None else "torch"
    fits = all(t.is_cuda and t.dtype == torch.float32 and is_dense(t) for t in tensors)
    known = dtype in (None, torch.float32, torch.bfloat16)
    return "triton" if fits and known and importlib.util.find_spec("triton") is not None else "torch"


def _launch(
    engine: str, direction: str, columns: Sequence[Sequence[Tensor]], scales: Sequence[float], eps: str
) -> None:
    """Run one kernel over all filters. `columns`: weights, gains, results or their gradients, then outputs."""
    weights, kind = columns[0], columns[2][0].dtype
    entries, numbers = [], []
    for weight, scale, tensors in zip(weights, scales, zip(*columns, strict=True), strict=True):
        w, gain, result, *outs = (t.data_ptr() for t in tensors)
        length = weight[0].numel()
        by_weight, by_gain = outs or (0, 0)
        fits = is_aligned(w, result, by_weight, length * kind.itemsize)
        entries.append(TableEntry((w, gain, result, by_weight), len(weight), length, by_gain, fits))
        numbers.append([scale, constants(weight, eps)[0]])
    device = weights[0].device
    made = pointer_table(entries, device)
    tables = [made.table, made.owner, upload([numbers[i] for i in made.order], torch.float32, device)]
    floor = constants(weights[0], eps)[1]
    if engine == "compiled":
        elements = sum(w.numel() for w in weights)
        run(f"standardize_{direction}", *tables, floor, count=made.units, elements=elements)
        return
    from normfree.ops import standardize_triton

    aligned = made.aligned_units
    with torch.cuda.device_of(weights[0]):
        for start, count, hint in ((0, aligned, True), (aligned, made.units - aligned, False)):
            if count:
                getattr(standardize_triton, direction)[(count,)](
                    *tables, start, floor, BLOCK=BLOCK, ALIGNED=hint, OUT=standardize_triton.TYPES[kind],
                    num_warps=WARPS, enable_fp_fusion=False,
                )  # fmt: skip
