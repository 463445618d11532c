"""Weight standardization of one weight in PyTorch ops, forward and backward, for `normfree.ops.standardize`.

The equivalent of the kernels in `native/standardize.c`, with as few passes over memory as possible. A filter is one row
of a matrix, in memory order, for any memory format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normfree.native.dispatch import is_dense, laid_out_as

# Constants that keep standardization from dividing by zero. "floor": lower bound of variance · fan-in (reference code,
# `WSConv2D`); "add": added to the variance (timm, `std_conv_eps`).
WS_EPS = {"floor": 1e-4, "add": 1e-5}

# Elements processed at a time in the forward pass on a CPU, so that they stay in the cache between operations: 8 MB in
# float32. With an eighth of that, the overhead of calls outweighs the gain (measured with the weights of NFNet-F0 on
# two cores that share 32 MB of cache).
PART = 1 << 21


class FilterMoments(NamedTuple):
    """Mean, and v·N plus the constant that is added to it, of each filter: O each."""

    mean: Tensor
    power: Tensor


def constants(weight: Tensor, eps: str) -> tuple[float, float]:
    """Return the constant added to v·N and the lower bound of v·N; one of them is 0."""
    return (0.0, WS_EPS["floor"]) if eps == "floor" else (WS_EPS["add"] * weight[0].numel(), 0.0)


@torch.no_grad()
def standardize_forward(
    weight: Tensor, gain: Tensor, *, scale: float = 1.0, eps: str = "floor"
) -> tuple[Tensor, FilterMoments]:
    """Return the result of `layers.standardize` and what the backward pass needs.

    Both are computed and returned in float32 or wider, in the memory format of `weight`.
    """
    weight, kind = _dense(weight), torch.promote_types(weight.dtype, torch.float32)
    added, floor = constants(weight, eps)
    result = torch.empty_like(weight, dtype=kind)
    moments = FilterMoments(*torch.empty(2, len(weight), dtype=kind, device=weight.device))
    columns = (_rows(weight), _rows(result), gain.to(kind), *moments)
    for part in _parts(weight):
        w, out, g, mean, power = (column[part] for column in columns)
        torch.mean(w.to(kind), 1, out=mean)
        torch.sub(w, mean[:, None], out=out)
        torch.linalg.vector_norm(out, dim=1, out=power)  # in a third of the time of square and sum
        power.square_().add_(added)
        out.mul_((g * torch.rsqrt(power.clamp(min=floor)) * scale)[:, None])
    return result, moments


@torch.no_grad()
def standardize_backward(
    weight: Tensor,
    gain: Tensor,
    grad: Tensor,
    *,
    scale: float = 1.0,
    eps: str = "floor",
    moments: FilterMoments | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and gain of `standardize` from `grad`, that of its result.

    It is the gradient of PyTorch's batch norm, for which a filter is a channel of a batch of one image: one pass over
    memory after one for the sums. Batch norm has no lower bound, so filters at or below it use `closed_form`. The
    gradients are computed in float32 or wider and returned in the dtypes of weight and gain. `moments` are those of
    `standardize_forward`; None computes them here.
    """
    weight, kind = _dense(weight), torch.promote_types(weight.dtype, torch.float32)
    if moments is None:
        moments = standardize_forward(weight, gain, scale=scale, eps=eps)[1]
    rows, back, wide = _rows(weight).to(kind), _rows(laid_out_as(weight, grad)).to(kind), gain.to(kind)
    floor, root = constants(weight, eps)[1], rows.shape[1] ** 0.5
    inverse = root * torch.rsqrt(moments.power.clamp(min=floor))  # (v + ε) ** -0.5
    by_weight, by_gain, _ = torch.ops.aten.native_batch_norm_backward(
        back[None], rows[None], wide * (scale / root), None, None, moments.mean, inverse, True, 0.0,
        (True, True, False),
    )  # fmt: skip
    by_gain.mul_(scale / root)
    low = moments.power <= floor
    if type(low) is Tensor and low.any():  # fake tensors have no values to read
        low = low.nonzero().flatten()
        by_weight[0, low], by_gain[low] = closed_form(rows[low], wide[low], back[low], scale=scale, eps=eps)
    return _from_rows(by_weight[0], weight).to(weight.dtype), by_gain.to(gain.dtype)


def closed_form(rows: Tensor, gain: Tensor, grad: Tensor, *, scale: float, eps: str) -> tuple[Tensor, Tensor]:
    """Return the same gradients for filters O x N, in closed form made of differentiable operations.

    `grad` may have leading dimensions (B O x N), for which each gradient then has them too.

    With d = w - μ, r = max(Σd², 1e-4) ** -0.5 and G the incoming gradient, per filter: ∂gain = scale·r·ΣGd and
    ∂w = gain·scale·r·(G - mean(G) - h·d·r²·ΣGd). h is 1 if Σd² is above the lower bound 1e-4, 1/2 if it is equal and
    0 if it is below, where r is constant; with `eps="add"` h is 1.
    """
    centered = rows - rows.mean(1, keepdim=True)
    added, floor = constants(rows, eps)
    power = centered.square().sum(1) + added
    along = (grad * centered).sum(-1)
    inverse = torch.rsqrt(power.clamp(min=floor))
    passes = 0.5 * ((power > floor).to(power.dtype) + (power >= floor).to(power.dtype))
    by_rows = grad - grad.mean(-1, keepdim=True) - centered * (along * inverse.square() * passes)[..., None]
    return by_rows * (gain * inverse * scale)[:, None], along * inverse * scale


def _dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """Return a view O x N of the filters, in memory order."""
    in_order = tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)
    return in_order.view(len(tensor), -1)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_rows`: restore the shape and memory format of `like`."""
    if like.is_contiguous():
        return rows.view(like.shape)
    o, i, h, w = like.shape
    return rows.view(o, h, w, i).permute(0, 3, 1, 2)


def _parts(weight: Tensor) -> list[slice]:
    at_once = max(1, PART // weight[0].numel()) if weight.device.type == "cpu" else len(weight)
    return [slice(start, start + at_once) for start in range(0, len(weight), at_once)]
