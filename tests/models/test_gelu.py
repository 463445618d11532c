"""GELU with tanh by the kernel in C, against its formula in float64 and against torch's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.models import gelu
from normfree.models.gelu import gelu_tanh
from normfree.native.library import library

pytestmark = pytest.mark.skipif(
    library() is None, reason="no C compiler was there when the package was installed"
)


def numbers() -> Tensor:
    """Dense where the function bends, sparse to the ends of float32, and not a multiple of any register."""
    ends = torch.logspace(-38, 38, 2001)
    return torch.cat([torch.linspace(-15.0, 15.0, 300_001), ends, -ends, torch.zeros(1)])


def test_values_and_slopes_are_those_of_the_formula() -> None:
    """Relative to the larger of the result and the part of x that float32 resolves: torch's own are as far off."""
    x = numbers().requires_grad_()
    y = gelu_tanh(x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "_GeluTanhBackward"
    up = torch.cos(torch.arange(len(x)))
    (by_x,) = torch.autograd.grad(y, x, up)
    wide = x.detach().double().requires_grad_()
    wanted = F.gelu(wide, approximate="tanh")
    (by_wide,) = torch.autograd.grad(wanted, wide, up.double())
    near = x.detach().abs() <= 15.0
    error = (y.detach().double() - wanted.detach()).abs()
    assert float(error[near].max()) < 6e-7  # float32 resolves 4.8e-7 around 4 to 8
    assert float((error / wide.detach().abs().clamp(min=1e-38))[~near].max()) < 2e-7
    slope_error = ((by_x.double() - by_wide) / up.double().abs().clamp(min=1e-3)).abs()
    assert float(slope_error[near].max()) < 4e-7
    assert float(slope_error[~near & (wide.detach().abs() < 1e18)].max()) < 4e-7


def test_the_left_tail_keeps_its_digits() -> None:
    """Where 1 + tanh has lost them: at -5 torch's is 10 % off."""
    x = torch.linspace(-8.0, -1.0, 10_001)
    u = math.sqrt(2.0 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() / (1.0 + torch.exp(-2.0 * u))
    error = ((gelu_tanh(x).double() - exact) / exact).abs()
    assert float(error.max()) < 2e-5
    assert float(error[x > -4.0].max()) < 5e-6


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_so(special: float) -> None:
    y = gelu_tanh(torch.tensor([special, 1.0]))
    assert torch.equal(y.isnan(), torch.tensor([math.isnan(special), False]))
    assert math.isnan(special) or float(y[0]) == special


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads_or_memory_format(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 70, 71)
    grad = torch.randn(3, 5, 70, 71)

    def both(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = gelu_tanh(x)
        y.backward(grad)
        assert y.stride() == x.stride() == x.grad.stride()
        return y.detach(), x.grad

    one = both(x, grad)
    torch.set_num_threads(threads)
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert all(map(torch.equal, both(x.to(memory_format=layout), grad), one))


def test_it_can_be_differentiated_twice_and_forwards() -> None:
    x = torch.randn(20, requires_grad=True)
    (first,) = torch.autograd.grad(gelu_tanh(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.gelu(wide, approximate="tanh").sum(), wide, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(second.double(), wanted, rtol=1e-5, atol=1e-6)
    slope = torch.func.jvp(gelu_tanh, (x.detach(),), (torch.ones(20),))[1]
    torch.testing.assert_close(slope, first.detach(), rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(20))
        forwards = torch.autograd.forward_ad.unpack_dual(gelu_tanh(dual)).tangent
    torch.testing.assert_close(forwards, slope)


def test_without_the_kernels_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gelu, "library", lambda: None)
    x = torch.randn(100)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


def test_nothing_is_computed_for_nothing() -> None:
    assert gelu_tanh(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
