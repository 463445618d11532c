"""Weight standardization of many weights as one op.

`standardize_all` is `models.layers.standardize` for a list of weights. On CPUs it is one call of the compiled kernels
of `normfree.native` in each direction; elsewhere plain PyTorch ops, with the gradient in closed form. The Triton
kernels of `standardize_triton` were never measured on a GPU and run only on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from normfree.native.dispatch import can_bypass_dispatcher, is_dense, is_plain_cpu_tensor, laid_out_as
from normfree.native.library import library, run
from normfree.native.table import TableEntry, is_aligned, pointer_table, upload
from normfree.ops.standardize_torch import (
    closed_form,
    constants,
    standardize_backward,
    standardize_forward,
)
from normfree.suggest import problem, unknown

# What computes: PyTorch ops, the compiled kernels for CPUs, or the Triton kernels for GPUs.
Engine: TypeAlias = Literal["torch", "compiled", "triton"]

# Elements that a Triton program reads at a time, and its number of warps.
BLOCK, WARPS = 2048, 8


def standardize_all(
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    scales: Sequence[float],
    *,
    eps: str = "floor",
    dtype: torch.dtype | None = None,
    engine: Engine | None = None,
) -> list[Tensor]:
    """Return `standardize(weight, gain, scale=scale, eps=eps)` of every weight, in the memory format of the weight.

    Gradients of any order flow to weights and gains. Only those and two numbers per filter are saved for them.

    Args:
        weights: O I H W each.
        gains: O each.
        scales: one number for each weight.
        eps: "floor" or "add", see `standardize`.
        dtype: of the results; None means the dtype of each weight.
        engine: None chooses "compiled" where it can compute the results, and "torch" elsewhere.

    Raises:
        ValueError: the engine is unknown or cannot compute these results.
    """
    tensors = [*weights, *gains]
    if engine is None:
        engine = "compiled" if _supports("compiled", tensors, dtype) else "torch"
    elif engine not in get_args(Engine):
        raise ValueError(unknown("engine", engine, get_args(Engine)))
    elif not _supports(engine, tensors, dtype):
        raise ValueError(problem(f"engine={engine!r}", allowed=_NEEDS[engine], fix="pass engine=None"))
    return list(_Standardize.apply(tuple(scales), eps, dtype, engine, *tensors))


_NEEDS: dict[str, str] = {
    "compiled": "plain float32 tensors on a CPU, float32 results, and the compiled kernels installed",
    "triton": "dense float32 tensors, float32 or bfloat16 results, and Triton installed",
}


def _supports(engine: Engine, tensors: Sequence[Tensor], dtype: torch.dtype | None) -> bool:
    """Return True if `engine` can process these weights and gains into results of `dtype`.

    Kernels need float32 without gaps in memory, dimension 0 outermost.
    """
    if engine == "compiled":
        return has_kernels(*tensors) and dtype in (None, torch.float32)
    if engine == "triton":
        known = dtype in (None, torch.float32, torch.bfloat16)
        return known and all(t.dtype == torch.float32 and is_dense(t) for t in tensors)
    return True


def has_kernels(*tensors: Tensor) -> bool:
    """Return True if the compiled kernels can standardize these weights with these gains, unobserved."""
    return can_bypass_dispatcher() and all(map(is_plain_cpu_tensor, tensors)) and library() is not None


class _Standardize(torch.autograd.Function):
    """`tensors` are all weights, then all gains."""

    @staticmethod
    def forward(
        ctx: Any,
        scales: tuple[float, ...],
        eps: str,
        dtype: torch.dtype | None,
        engine: Engine,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.eps, ctx.engine, ctx.moments = scales, eps, engine, None
        weights, gains = tensors[: len(scales)], tensors[len(scales) :]
        if engine != "torch":
            outs = [torch.empty_like(w, dtype=dtype) for w in weights]
            _launch(engine, "forward", [weights, gains, outs], scales, eps)
            return tuple(outs)
        made = [
            standardize_forward(w, g, scale=scale, eps=eps)
            for w, g, scale in zip(weights, gains, scales, strict=True)
        ]
        ctx.moments = [moments for _, moments in made]
        return tuple(result.to(dtype or w.dtype) for w, (result, _) in zip(weights, made, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """A result that was not used has no gradient, and its weight gets none."""
        count = len(grads)
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        saved = ctx.saved_tensors  # read once, as gradient checkpointing requires
        weights, gains = ([saved[i + shift] for i, _ in found] for shift in (0, count))
        scales = [ctx.scales[i] for i, _ in found]
        results: list[Tensor | None] = [None] * (2 * count)
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated again
            for (i, grad), weight, gain, scale in zip(found, weights, gains, scales, strict=True):
                results[i], results[count + i] = _differentiable(weight, gain, grad, scale=scale, eps=ctx.eps)
            return None, None, None, None, *results
        arrived = [laid_out_as(w, grad) for w, (_, grad) in zip(weights, found, strict=True)]
        engine = ctx.engine
        if engine == "compiled" and not can_bypass_dispatcher():
            engine = "torch"
        if found and engine != "torch":
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
        return None, None, None, None, *results


def _differentiable(
    weight: Tensor, gain: Tensor, grad: Tensor, *, scale: float, eps: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and gain as functions of weight, gain and `grad` made of plain operations."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    rows, wide, back = weight.flatten(1).to(kind), gain.to(kind), grad.flatten(1).to(kind)
    by_rows, by_gain = closed_form(rows, wide, back, scale=scale, eps=eps)
    return by_rows.view_as(weight).to(weight.dtype), by_gain.to(gain.dtype)


def _launch(
    engine: str,
    direction: str,
    columns: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    eps: str,
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
