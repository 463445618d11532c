"""GELU in its tanh form, and SiLU, by the compiled kernels, against PyTorch's in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.native.library import library
from normfree.ops import gelu
from normfree.ops.gelu import activation_gradient, gelu_erf, gelu_tanh, silu

pytestmark = pytest.mark.skipif(
    library() is None, reason="no C compiler was found when the package was installed"
)

# (our function, PyTorch's function)
PAIRS = [(gelu_tanh, partial(F.gelu, approximate="tanh")), (silu, F.silu)]
both = pytest.mark.parametrize(("function", "reference"), PAIRS, ids=["gelu", "silu"])
Function = Callable[[Tensor], Tensor]


def numbers() -> Tensor:
    """Return numbers, dense where the function bends and sparse up to the limits of float32.

    Their count is no multiple of the width of a register.
    """
    ends = torch.logspace(-38, 38, 2001)
    return torch.cat([torch.linspace(-15.0, 15.0, 300_001), ends, -ends, torch.zeros(1)])


@both
def test_values_and_slopes_equal_the_formula(function: Function, reference: Function) -> None:
    """Errors are relative to x, of which float32 resolves 1.2e-7, or to 1; those of PyTorch are as large."""
    x = numbers().requires_grad_()
    y = function(x)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "_GatedBackward"
    up = torch.cos(torch.arange(len(x)))
    (by_x,) = torch.autograd.grad(y, x, up)
    wide = x.detach().double().requires_grad_()
    wanted = reference(wide)
    (by_wide,) = torch.autograd.grad(wanted, wide, up.double())
    near = x.detach().abs() <= 15.0
    error = (y.detach().double() - wanted.detach()).abs()
    assert float((error / wide.detach().abs().clamp(min=1.0)).max()) < 2e-7
    slope_error = ((by_x.double() - by_wide) / up.double().abs().clamp(min=1e-3)).abs()
    assert float(slope_error[near].max()) < 4e-7
    assert float(slope_error[~near & (wide.detach().abs() < 1e18)].max()) < 4e-7


def test_the_left_tail_is_accurate() -> None:
    """1 + tanh loses its digits there: at -5 the error of PyTorch is 10 %."""
    x = torch.linspace(-8.0, -1.0, 10_001)
    u = math.sqrt(2.0 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)
    exact = x.double() / (1.0 + torch.exp(-2.0 * u))
    error = ((gelu_tanh(x).double() - exact) / exact).abs()
    assert float(error.max()) < 2e-5
    assert float(error[x > -4.0].max()) < 5e-6


@both
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_infinity_are_kept(function: Function, reference: Function, special: float) -> None:
    y = function(torch.tensor([special, 1.0]))
    assert torch.equal(y.isnan(), torch.tensor([math.isnan(special), False]))
    assert math.isnan(special) or float(y[0]) == special


@both
@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads_or_memory_format(
    function: Function, reference: Function, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 70, 71)
    grad = torch.randn(3, 5, 70, 71)

    def run(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = function(x)
        y.backward(grad)
        assert y.stride() == x.stride() == x.grad.stride()
        return y.detach(), x.grad

    one = run(x, grad)
    torch.set_num_threads(threads)
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert all(map(torch.equal, run(x.to(memory_format=layout), grad), one))


@both
def test_second_derivatives_and_forward_mode(function: Function, reference: Function) -> None:
    x = torch.randn(20, requires_grad=True)
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(wide).sum(), wide, create_graph=True)
    (wanted,) = torch.autograd.grad(wanted.sum(), wide)
    torch.testing.assert_close(second.double(), wanted, rtol=1e-5, atol=1e-6)
    slope = torch.func.jvp(function, (x.detach(),), (torch.ones(20),))[1]
    torch.testing.assert_close(slope, first.detach(), rtol=1e-5, atol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(20))
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(tangent, slope)


@both
def test_without_the_kernels_the_functions_are_those_of_torch(
    function: Function, reference: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gelu, "library", lambda: None)
    x = torch.randn(100)
    assert torch.equal(function(x), reference(x))


@both
def test_an_empty_tensor_gives_an_empty_tensor(function: Function, reference: Function) -> None:
    assert function(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


# Large enough for the permuted form, which has sides of 1 here: such tensors are in both memory formats at once.
SIDES_OF_1 = [
    (128, 1024, 1, 1),
    (1 << 17, 1, 1, 1),
    (2, 1, 1, 1 << 16),
    (2, 1, 1 << 16, 1),
    (2, 1 << 16, 1, 1),
]


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), *SIDES_OF_1], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("function", [gelu_tanh, gelu_erf, silu, torch.tanh, F.elu], ids=lambda f: f.__name__)
def test_the_gradient_by_a_direct_call_has_the_bits_of_autograd(
    function: Function, memory_format: torch.memory_format, kind: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, up = (torch.randn(shape, dtype=kind).contiguous(memory_format=memory_format) for _ in range(2))
    (wanted,) = torch.autograd.grad(function(source := x.clone().requires_grad_()), source, up)
    with torch.no_grad():
        found = activation_gradient(function, x, up)
    assert torch.equal(found, wanted)
    assert found.stride() == wanted.stride()
