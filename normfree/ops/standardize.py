"""Weight standardization of many weights as one op.

`standardize_all` is `models.layers.standardize` for a list of weights. On CPUs it is one call of the compiled kernels
of `normfree.native` in each direction; elsewhere plain PyTorch ops, with the gradient in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normfree.native.dispatch import can_bypass_dispatcher, is_plain_cpu_tensor, is_transformed, laid_out_as
from normfree.native.library import library, run
from normfree.native.table import TableEntry, pointer_table
from normfree.ops.standardize_torch import (
    closed_form,
    constants,
    standardize_backward,
    standardize_forward,
)


def standardize_all(
    weights: Sequence[Tensor], gains: Sequence[Tensor], scales: Sequence[float], *, eps: str = "floor"
) -> list[Tensor]:
    """Return `standardize(weight, gain, scale=scale, eps=eps)` of every weight, in the memory format of the weight.

    Gradients of any order flow to weights and gains. Only those and two numbers per filter are saved for them.

    Args:
        weights: O I H W each.
        gains: O each.
        scales: one number for each weight.
        eps: "floor" or "add", see `standardize`.
    """
    return list(_Standardize.apply(tuple(scales), eps, *weights, *gains))


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
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.scales, ctx.eps, ctx.compiled, ctx.moments = scales, eps, has_kernels(*tensors), None
        weights, gains = tensors[: len(scales)], tensors[len(scales) :]
        if ctx.compiled:
            outs = [torch.empty_like(w) for w in weights]
            _run("standardize_forward", [weights, gains, outs], scales, eps)
            return tuple(outs)
        made = [
            standardize_forward(w, g, scale=scale, eps=eps)
            for w, g, scale in zip(weights, gains, scales, strict=True)
        ]
        ctx.moments = [moments for _, moments in made]
        return tuple(result.to(w.dtype) for w, (result, _) in zip(weights, made, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """A result that was not used has no gradient, and its weight gets none."""
        count = len(grads)
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        saved = ctx.saved_tensors  # read once, as gradient checkpointing requires
        weights, gains = ([saved[i + shift] for i, _ in found] for shift in (0, count))
        scales = [ctx.scales[i] for i, _ in found]
        results: list[Tensor | None] = [None] * (2 * count)
        # create_graph=True: the gradients will be differentiated again; or batched gradients
        if torch.is_grad_enabled() or is_transformed():
            for (i, grad), weight, gain, scale in zip(found, weights, gains, scales, strict=True):
                results[i], results[count + i] = _differentiable(weight, gain, grad, scale=scale, eps=ctx.eps)
            return None, None, *results
        arrived = [laid_out_as(w, grad) for w, (_, grad) in zip(weights, found, strict=True)]
        if found and ctx.compiled and can_bypass_dispatcher():
            outs = [[torch.empty_like(t) for t in column] for column in (weights, gains)]
            _run("standardize_backward", [weights, gains, arrived, *outs], scales, ctx.eps)
            pairs = list(zip(*outs, strict=True))
        else:
            moments = [ctx.moments[i] if ctx.moments else None for i, _ in found]
            pairs = [
                standardize_backward(w, g, up, scale=scale, eps=ctx.eps, moments=own)
                for w, g, up, scale, own in zip(weights, gains, arrived, scales, moments, strict=True)
            ]
        for (i, _), (by_weight, by_gain) in zip(found, pairs, strict=True):
            results[i], results[count + i] = by_weight, by_gain
        return None, None, *results


def _differentiable(
    weight: Tensor, gain: Tensor, grad: Tensor, *, scale: float, eps: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and gain as functions of weight, gain and `grad` made of plain operations."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    rows, wide = weight.flatten(1).to(kind), gain.to(kind)
    back = grad.reshape(rows.shape).to(kind)  # batched gradients have no `flatten`
    by_rows, by_gain = closed_form(rows, wide, back, scale=scale, eps=eps)
    return by_rows.reshape(weight.shape).to(weight.dtype), by_gain.to(gain.dtype)


def _run(name: str, columns: Sequence[Sequence[Tensor]], scales: Sequence[float], eps: str) -> None:
    """Run one kernel over all filters. `columns`: weights, gains, results or their gradients, then outputs.

    In a row of the table, the four addresses are those of weight, gain, result (or its gradient) and the weight's
    gradient; the extra number is the address of the gain's gradient.
    """
    weights = columns[0]
    entries, numbers = [], []
    for weight, scale, tensors in zip(weights, scales, zip(*columns, strict=True), strict=True):
        w, gain, result, *outs = (t.data_ptr() for t in tensors)
        by_weight, by_gain = outs or (0, 0)
        entries.append(TableEntry((w, gain, result, by_weight), len(weight), weight[0].numel(), by_gain))
        numbers.append([scale, constants(weight, eps)[0]])
    made, floor = pointer_table(entries), constants(weights[0], eps)[1]
    values = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    elements = sum(w.numel() for w in weights)
    run(name, made.table, made.owner, values, floor, count=made.units, elements=elements)
