"""Weight standardization of one weight, forward and backward, for `normfree.ops.standardize`.

The PyTorch twin of the Triton kernels in `standardize_triton`, with as few passes over memory as
possible. A filter is one row, in memory order, whatever the memory format.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normfree.native.dispatch import is_dense, laid_out_as

#: Elements worked on at a time in the forward pass on a CPU, so that they stay in the cache from one operation to the
#: next: 8 MB in float32. An eighth as many lose to calls what the cache saves (NFNet-F0's weights, two cores that share
#: 32 MB).
PART = 1 << 21


class FilterMoments(NamedTuple):
    """Per filter, O: the mean, and v·N with what is added to it."""

    mean: Tensor
    power: Tensor


def constants(weight: Tensor, eps: str) -> tuple[float, float]:
    """What is added to v·N and the floor under it; one of them is 0."""
    return (0.0, WS_EPS["floor"]) if eps == "floor" else (WS_EPS["add"] * weight[0].numel(), 0.0)


@torch.no_grad()
def standardize_forward(
    weight: Tensor, gain: Tensor, *, scale: float = 1.0, eps: str = "floor"
) -> tuple[Tensor, FilterMoments]:
    """`layers.standardize`, and what the backward pass needs of it.

    Computed, and returned, in float32 at least, in the memory format of `weight`.
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
        torch.linalg.vector_norm(out, dim=1, out=power)  # a third of the time of a product and a sum
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
    """Gradients of weight and gain of `standardize` from that of its result.

    That of torch's batch norm, for which a filter is a channel of a batch of one: one pass over memory after one for
    the sums. Filters at the floor or under it, which it does not know, are computed by the formula. In float32 at
    least, returned in the types of weight and gain. moments: from `standardize_forward`; None: computed here.
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
    if type(low) is Tensor and low.any():  # a tensor that only stands for one has no values to look at
        low = low.nonzero().flatten()
        by_weight[0, low], by_gain[low] = closed_form(rows[low], wide[low], back[low], scale=scale, eps=eps)
    return _from_rows(by_weight[0], weight).to(weight.dtype), by_gain.to(gain.dtype)


def closed_form(rows: Tensor, gain: Tensor, grad: Tensor, *, scale: float, eps: str) -> tuple[Tensor, Tensor]:
    """The same gradients for filters O x N, in closed form.

    With d = w - μ, r = max(Σd², 1e-4) ** -0.5 and G the incoming gradient, per filter: ∂gain = scale·r·ΣGd and
    ∂w = gain·scale·r·(G - mean(G) - h·d·r²·ΣGd). h is 1 above the floor, 1/2 at it and 0 below it, where r is
    constant; with `eps="add"` it is 1.
    """
    centered = rows - rows.mean(1, keepdim=True)
    added, floor = constants(rows, eps)
    power = centered.square().sum(1) + added
    along = (grad * centered).sum(1)
    inverse = torch.rsqrt(power.clamp(min=floor))
    passes = torch.heaviside(power - floor, power.new_full((), 0.5))
    by_rows = grad - grad.mean(1, keepdim=True) - centered * (along * inverse.square() * passes)[:, None]
    return by_rows * (gain * inverse * scale)[:, None], along * inverse * scale


def _dense(tensor: Tensor) -> Tensor:
    return tensor if is_dense(tensor) else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """O x elements of a filter, in the order of memory; a view."""
    in_order = tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)
    return in_order.view(len(tensor), -1)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Of what shape and memory format `like` is; the reverse of `_rows`."""
    if like.is_contiguous():
        return rows.view(like.shape)
    o, i, h, w = like.shape
    return rows.view(o, h, w, i).permute(0, 3, 1, 2)


def _parts(weight: Tensor) -> list[slice]:
    at_once = max(1, PART // weight[0].numel()) if weight.device.type == "cpu" else len(weight)
    return [slice(start, start + at_once) for start in range(0, len(weight), at_once)]


#: How a standardized filter is kept from dividing by zero, and the constant. "floor": under variance * fan-in
#: (reference code, `WSConv2D`); "add": to the variance (timm, `std_conv_eps`).
WS_EPS = {"floor": 1e-4, "add": 1e-5}
