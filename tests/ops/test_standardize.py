"""Standardization of many weights at once, compiled and in PyTorch ops, against the formula of one weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from normfree.models.layers import standardize
from normfree.ops import standardize as many
from normfree.ops import standardize_torch
from normfree.ops.conv2d import conv2d
from normfree.ops.example_gradients import Convolution, standardized_example_gradients
from normfree.ops.standardize import standardize_all
from normfree.ops.standardize_torch import WS_EPS, standardize_backward

SCALES = [1.3, 0.7, 2.0, 1.0, 1.1]


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setattr(many, "has_kernels", lambda *_: False)
    return str(request.param)


def some_weights(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Return filters of odd and even length, in channels_last, with a power below the minimum, and of zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (4, 8, 1, 1), (4, 8, 3, 3), (3, 33, 1, 1), (2, 8, 1, 1)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    weights[3] *= 1e-4
    weights[4] *= 0.0
    gains = [torch.rand(len(w), generator=generator) + 0.5 for w in weights]
    return [w.to(dtype).requires_grad_() for w in weights], [g.to(dtype).requires_grad_() for g in gains]


def relative(got: Tensor, wanted: Tensor) -> float:
    distance = (got.detach().cpu().double() - wanted.detach()).norm()
    return float(distance / wanted.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("eps", ["floor", "add"])
def test_each_result_is_that_of_standardize(kernels: str, eps: str) -> None:
    weights, gains = some_weights()
    assert many.has_kernels(*weights, *gains) == (kernels == "compiled")
    exact_weights, exact_gains = some_weights(torch.float64)
    made = standardize_all(weights, gains, SCALES, eps=eps)
    pairs = zip(exact_weights, exact_gains, SCALES, strict=True)
    wanted = [standardize(w, g, scale=scale, eps=eps) for w, g, scale in pairs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator) for t in wanted]
    torch.autograd.backward(made, grads)
    torch.autograd.backward(wanted, [g.double() for g in grads])
    for i, weight in enumerate(weights):
        assert made[i].dtype == torch.float32
        assert made[i].stride() == weight.stride()
        assert relative(made[i], wanted[i]) < 3e-7
        assert relative(weight.grad, exact_weights[i].grad) < 3e-7
        assert relative(gains[i].grad, exact_gains[i].grad) < 3e-7


def test_the_kernels_take_only_plain_float32_tensors_on_a_cpu(compiled: None) -> None:
    weights, gains = some_weights()
    assert many.has_kernels(*weights, *gains)
    assert not many.has_kernels(*weights, gains[0].double())
    assert not many.has_kernels(weights[0].to("meta"), gains[0].to("meta"))


@pytest.mark.parametrize(("power", "share"), [(4.0, 0.0), (1.0, 0.5), (0.25, 1.0)])
def test_no_gradient_flows_through_the_power_below_its_minimum_and_half_of_it_at_equality(
    kernels: str, power: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The component along the weights is 0 above the minimum, whole below and half at it; powers of 2 are exact."""
    floor = 2.0**-14
    monkeypatch.setitem(WS_EPS, "floor", floor)
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    start = direction * math.sqrt(power * floor / 4)
    weight = start.detach().requires_grad_()
    (made,) = standardize_all([weight], [torch.ones(1)], [1.0])
    (made * start).sum().backward()
    along = float((weight.grad * start).sum())
    assert along == pytest.approx(share * power * floor / math.sqrt(max(power, 1.0) * floor), abs=1e-8)


@pytest.mark.parametrize("eps", ["floor", "add"])
def test_the_closed_form_gradients_are_those_of_autograd(eps: str) -> None:
    for weight, gain in zip(*some_weights(torch.float64), strict=True):
        grad = torch.randn_like(weight)
        wanted = torch.autograd.grad(standardize(weight, gain, scale=1.7, eps=eps), (weight, gain), grad)
        got = standardize_backward(weight.detach(), gain.detach(), grad, scale=1.7, eps=eps)
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("part", [1, 40, 1 << 20])
@pytest.mark.parametrize("eps", ["floor", "add"])
def test_results_do_not_depend_on_the_parts_or_on_gaps_in_memory(
    eps: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standardize_torch, "PART", part)
    for weight, gain in zip(*some_weights(torch.float64), strict=True):
        wide = torch.randn(len(weight), 2 * weight.shape[1], *weight.shape[2:], dtype=torch.float64)
        wide[:, ::2] = weight.detach()
        grad = torch.randn_like(weight)
        wanted = standardize(weight, gain, scale=1.7, eps=eps)
        by_autograd = torch.autograd.grad(wanted, (weight, gain), grad)
        for same in (weight.detach(), wide[:, ::2]):
            made, moments = standardize_torch.standardize_forward(same, gain.detach(), scale=1.7, eps=eps)
            torch.testing.assert_close(made, wanted.detach(), rtol=1e-12, atol=1e-14)
            for known in (moments, None):
                got = standardize_backward(same, gain.detach(), grad, scale=1.7, eps=eps, moments=known)
                for one, two in zip(got, by_autograd, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("eps", ["floor", "add"])
def test_second_derivatives_are_those_of_the_formula(eps: str) -> None:
    weights, gains = some_weights(torch.float64)
    directions = [torch.randn_like(t) for t in (*weights, *gains)]

    def second_derivatives(results: list[Tensor]) -> list[Tensor]:
        outer = sum((r.square() * r).sum() for r in results)
        first = torch.autograd.grad(outer, [*weights, *gains], create_graph=True)
        along = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        return list(torch.autograd.grad(along, [*weights, *gains]))

    found = second_derivatives(standardize_all(weights, gains, SCALES, eps=eps))
    formula = [standardize(w, g, scale=s, eps=eps) for w, g, s in zip(weights, gains, SCALES, strict=True)]
    for one, other in zip(found, second_derivatives(formula), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", ["floor", "add"])
def test_gradients_of_examples_are_those_of_each_example(eps: str) -> None:
    """`closed_form` for several gradients at once, and the convolution that gives them."""
    torch.manual_seed(0)
    for groups, size, stride, padding in ((1, 1, 2, "same"), (2, 3, 1, "symmetric"), (4, 3, 2, "same")):
        weight = torch.randn(8, 8 // groups, size, size, dtype=torch.float64, requires_grad=True)
        gain = torch.rand(8, dtype=torch.float64, requires_grad=True)
        x = torch.randn(3, 8, 7, 10, dtype=torch.float64)
        conv = Convolution(stride, groups, padding, 1.3, eps)

        def convolution(x: Tensor, weight=weight, gain=gain, conv=conv) -> Tensor:
            made = standardize(weight, gain, scale=conv.scale, eps=conv.eps)
            return conv2d(
                x, made, None, act=None, stride=conv.stride, groups=conv.groups, padding=conv.padding
            )

        grad = torch.randn_like(convolution(x))
        samples = standardized_example_gradients(x, grad, weight.detach(), gain.detach(), conv)
        for i in range(3):
            wanted = torch.autograd.grad(convolution(x[i : i + 1]), (weight, gain), grad[i : i + 1])
            for one, other in zip(samples, wanted, strict=True):
                torch.testing.assert_close(one[i], other, rtol=1e-12, atol=1e-12)
