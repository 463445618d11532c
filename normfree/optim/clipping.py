"""normfree.optim.clipping."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor

from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.dtensor import is_sharded, local, norms_for
from normfree.optim.named_gradients import (
    Clippable,
    ClipReport,
    NamedGradient,
    check_limit,
    named_gradients,
    raise_if_nonfinite,
)

MODES = ("agc", "norm", "value", "off")


def clip_grad_(
    model_or_parameters: Clippable,
    *,
    mode: str,
    clipping: float,
    eps: float = 1e-3,
    error_if_nonfinite: bool = True,
) -> ClipReport:
    """Clip gradients in place by one of four rules, so that they can be compared under one option.

    mode: "agc" is `adaptive_clip_grad_`. "norm" and "value" are torch's clipping of the global norm (one
        unit) and of every element (each a unit); `clipping` is then the bound in gradient units, and applies
        to all parameters, since the groups' own values are meant for "agc". "off" changes nothing.
    In every mode Inf and NaN raise NonFiniteGradientError first. With `error_if_nonfinite=False`, "norm" and
    "value" treat them as torch does. Other arguments, result and errors as for `adaptive_clip_grad_`; an
    unknown mode raises ValueError, and so does `clipping=0` for "norm" and "value": it would erase the gradient.
    """
    if mode not in MODES:
        near = get_close_matches(mode, MODES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"Clipping mode {mode!r} is unknown. Allowed: {', '.join(map(repr, MODES))}. Nearest: {near!r}."
        )
    if mode == "agc":
        return adaptive_clip_grad_(
            model_or_parameters, clipping, eps=eps, error_if_nonfinite=error_if_nonfinite
        )
    check_limit("clipping", clipping)
    if clipping == 0.0 and mode != "off":
        raise ValueError(
            f"clipping is 0 with mode {mode!r}. It must be above 0, or every gradient is erased. "
            "Pass mode='off'."
        )
    entries = named_gradients(model_or_parameters, clipping)
    norms = norms_for(e.grad for e in entries)
    grad_norm = torch.zeros(())
    if entries:
        grad_norm = norms.global_norm([], norms.tensor_norms([e.grad for e in entries]), entries[0].grad)
    if error_if_nonfinite:
        raise_if_nonfinite(grad_norm, entries, norms)
    parameters = [_plain(e) for e in entries]
    fraction, units = torch.zeros_like(grad_norm, dtype=torch.float32), 0
    if mode == "norm" and entries:
        fraction, units = (grad_norm > clipping).to(torch.float32), 1
        torch.nn.utils.clip_grads_with_norm_(parameters, clipping, grad_norm)
    elif mode == "value" and entries:
        units = sum(e.grad.numel() for e in entries)
        above = [norms.count_above(e.grad, clipping).to(grad_norm.device) for e in entries]
        fraction = (norms.total(above) / units).to(torch.float32)
        torch.nn.utils.clip_grad_value_(parameters, clipping)
    return ClipReport(fraction, units, grad_norm)


def _plain(entry: NamedGradient) -> Tensor:
    """The parameter with its gradient as torch's own functions take them: of a DTensor, the rows that lie here."""
    if not is_sharded(entry.parameter):
        return entry.parameter
    rows = local(entry.parameter).detach()
    rows.grad = local(entry.grad)
    return rows
