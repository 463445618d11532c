"""Tests of the clipping modes that adaptive clipping is compared with."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.clipping import clip_grad_
from normfree.optim.named_gradients import NonFiniteGradientError


def net() -> nn.Module:
    torch.manual_seed(0)
    result = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    result(torch.randn(5, 6)).square().sum().backward()
    return result


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_agc_mode_is_adaptive_clipping() -> None:
    a, b = net(), net()
    first, second = clip_grad_(a, mode="agc", clipping=0.02, eps=1e-2), adaptive_clip_grad_(b, 0.02, eps=1e-2)
    assert torch.equal(flat(a), flat(b))
    assert 0 < float(first) == float(second)


@pytest.mark.parametrize("clipping", [0.5, 1e6])
def test_norm_mode_equals_torch(clipping: float) -> None:
    a, b = net(), net()
    norm = float(flat(a).norm())
    report = clip_grad_(a, mode="norm", clipping=clipping)
    torch.nn.utils.clip_grad_norm_(b.parameters(), clipping)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-6, atol=0.0)
    assert float(report.grad_norm) == pytest.approx(norm, rel=1e-6)
    assert (float(report), report.units) == (float(norm > clipping), 1)


def test_value_mode_equals_torch_and_counts_elements() -> None:
    a, b = net(), net()
    clipping = float(flat(a).abs().quantile(0.8))
    expected = float((flat(a).abs() > clipping).float().mean())
    report = clip_grad_(a, mode="value", clipping=clipping)
    torch.nn.utils.clip_grad_value_(b.parameters(), clipping)
    assert torch.equal(flat(a), flat(b))
    assert 0.1 < expected < 0.3
    assert float(report) == pytest.approx(expected)
    assert report.units == flat(a).numel()


def test_off_changes_nothing_and_reports_the_norm() -> None:
    a = net()
    before = flat(a)
    report = clip_grad_(a, mode="off", clipping=0.0)
    assert torch.equal(flat(a), before)
    assert (float(report), report.units) == (0.0, 0)
    assert float(report.grad_norm) == pytest.approx(float(before.norm()), rel=1e-6)


def test_norm_and_value_ignore_the_clipping_of_groups() -> None:
    a, b = net(), net()
    groups = [{"params": list(a.parameters()), "clipping": 0.0}]
    clip_grad_(groups, mode="norm", clipping=0.5)
    torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5)
    torch.testing.assert_close(flat(a), flat(b), rtol=1e-6, atol=0.0)


def test_float16_gradients_have_a_float32_total_norm() -> None:
    p = nn.Parameter(torch.zeros(400, dtype=torch.float16))
    p.grad = torch.full((400,), 6e4, dtype=torch.float16)  # norm 1.2e6, beyond float16
    report = clip_grad_(p, mode="norm", clipping=1.0)
    assert float(report.grad_norm) == pytest.approx(20 * float(torch.tensor(6e4, dtype=torch.float16)))
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.05), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("mode", ["agc", "norm", "value", "off"])
def test_every_mode_refuses_nan_before_it_changes_anything(mode: str) -> None:
    a = net()
    a[0].bias.grad[0] = float("nan")
    before = copy.deepcopy(flat(a))
    with pytest.raises(
        NonFiniteGradientError, match=r"^1 of 4 gradients are not finite: '0\.bias'; none was changed\. "
    ):
        clip_grad_(a, mode=mode, clipping=0.01)
    assert torch.equal(flat(a).nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("mode", "clipping", "message"),
    [
        (
            "nrom",
            1.0,
            "unknown clipping mode 'nrom'. Did you mean 'norm'? Allowed: 'agc', 'norm', 'value', 'off'.",
        ),
        (
            "norm",
            0.0,
            "clipping is 0 with mode 'norm', which would erase every gradient. Allowed: above 0. "
            "Fix: pass mode='off' to clip nothing.",
        ),
        (
            "value",
            -2.0,
            "clipping is -2.0. Allowed: 0 or more. Fix: pass clipping=0.01, the published value.",
        ),
    ],
)
def test_wrong_arguments(mode: str, clipping: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        clip_grad_(net(), mode=mode, clipping=clipping)
