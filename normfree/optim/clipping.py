"""Gradient clipping by one of four rules, so that adaptive clipping can be compared with the common ones."""

from __future__ import annotations

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
from normfree.suggest import problem, unknown

MODES = ("agc", "norm", "value", "off")


def clip_grad_(
    model_or_parameters: Clippable,
    *,
    mode: str,
    clipping: float,
    eps: float = 1e-3,
    error_if_nonfinite: bool = True,
) -> ClipReport:
    """Clip gradients in place by one of four rules.

    Args:
        model_or_parameters: as for `adaptive_clip_grad_`.
        mode: the rule.
            "agc": `adaptive_clip_grad_`.
            "norm": scale all gradients down to a global norm of at most `clipping`, as `clip_grad_norm_` of PyTorch.
            "value": limit every element to [-clipping, clipping], as `clip_grad_value_` of PyTorch.
            "off": change nothing, only report.
        clipping: for "agc", the ratio λ. For "norm" and "value", a bound in the units of the gradient, which applies to
            all parameters: the `clipping` of parameter groups is meant for "agc".
        eps: for "agc", lower bound of the weight norm.
        error_if_nonfinite: raise for Inf and NaN before anything changes, in every mode. If False, "norm" and "value"
            treat them as PyTorch does.

    Returns:
        A `ClipReport`. The global norm counts as one unit for "norm", every element as a unit for "value".

    Raises:
        NonFiniteGradientError: a gradient contains Inf or NaN; no gradient was changed.
        ValueError: the mode is unknown, `clipping` is negative, or it is 0 for "norm" or "value", which would erase the
            gradient.

    Examples:
        >>> import torch
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> report = normfree.clip_grad_(weight, mode="norm", clipping=1.0)
        >>> weight.grad, report.grad_norm
        (tensor([0.6000, 0.8000]), tensor(5.))
    """
    if mode not in MODES:
        raise ValueError(unknown("clipping mode", mode, MODES))
    if mode == "agc":
        return adaptive_clip_grad_(
            model_or_parameters, clipping, eps=eps, error_if_nonfinite=error_if_nonfinite
        )
    check_limit("clipping", clipping)
    if clipping == 0.0 and mode != "off":
        given = f"clipping is 0 with mode {mode!r}, which would erase every gradient"
        raise ValueError(problem(given, allowed="above 0", fix="pass mode='off' to clip nothing"))
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
    """Return a plain tensor with its gradient for PyTorch's functions: the local rows of a DTensor."""
    if not is_sharded(entry.parameter):
        return entry.parameter
    rows = local(entry.parameter).detach()
    rows.grad = local(entry.grad)
    return rows
