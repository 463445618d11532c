"""Standardization of many weights at once: every engine against the formula of one weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from normfree.models.layers import standardize
from normfree.native.library import library
from normfree.ops import standardize as many
from normfree.ops import standardize_torch
from normfree.ops.conv2d import conv2d
from normfree.ops.example_gradients import Convolution, standardized_example_gradients
from normfree.ops.standardize import Engine, standardize_all
from normfree.ops.standardize_torch import WS_EPS, standardize_backward

SCALES = [1.3, 0.7, 2.0, 1.0, 1.1]


ENGINES = ["torch", "compiled", "triton", pytest.param("triton on a GPU", marks=pytest.mark.gpu)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, interpret: Callable[..., None]) -> None:
    """Run the Triton kernels in Triton's interpreter on the CPU, in short blocks, so that a filter spans several."""
    interpret("normfree.ops.standardize_triton", "forward", "backward")
    monkeypatch.setattr(many, "BLOCK", 32)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine; the Triton kernels are interpreted, except on a GPU."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    if request.param == "triton":
        request.getfixturevalue("interpreted")
    return request.param.split()[0]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if "GPU" in request.node.name else "cpu"


def some_weights(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Return filters of odd and even length, in channels_last, with a power below the minimum, and of zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (4, 8, 1, 1), (4, 8, 3, 3), (3, 33, 1, 1), (2, 8, 1, 1)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    weights[3] *= 1e-4
    weights[4] *= 0.0
    gains = [torch.rand(len(w), generator=generator) + 0.5 for w in weights]
    options = {"dtype": dtype, "device": device}
    return [w.to(**options).requires_grad_() for w in weights], [
        g.to(**options).requires_grad_() for g in gains
    ]


def relative(got: Tensor, wanted: Tensor) -> float:
    distance = (got.detach().cpu().double() - wanted.detach()).norm()
    return float(distance / wanted.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("eps", "dtype"), [("floor", None), ("add", None), ("floor", torch.bfloat16)])
def test_each_result_is_that_of_standardize(
    engine: Engine, device: str, eps: str, dtype: torch.dtype | None
) -> None:
    if engine == "compiled" and dtype is not None:
        pytest.skip("the compiled kernels write float32")
    weights, gains = some_weights(device=device)
    exact_weights, exact_gains = some_weights(torch.float64)
    made = standardize_all(weights, gains, SCALES, eps=eps, dtype=dtype, engine=engine)
    pairs = zip(exact_weights, exact_gains, SCALES, strict=True)
    wanted = [standardize(w, g, scale=scale, eps=eps) for w, g, scale in pairs]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(dtype or torch.float32) for t in wanted]
    torch.autograd.backward(made, [g.to(m.device) for g, m in zip(grads, made, strict=True)])
    torch.autograd.backward(wanted, [g.double() for g in grads])
    for i, weight in enumerate(weights):
        assert made[i].dtype == (dtype or torch.float32)
        assert made[i].stride() == weight.stride()
        assert relative(made[i], wanted[i]) < (4e-3 if dtype else 3e-7)
        assert relative(weight.grad, exact_weights[i].grad) < 3e-7
        assert relative(gains[i].grad, exact_gains[i].grad) < 3e-7


@pytest.mark.parametrize(("power", "share"), [(4.0, 0.0), (1.0, 0.5), (0.25, 1.0)])
def test_no_gradient_flows_through_the_power_below_its_minimum_and_half_of_it_at_equality(
    engine: Engine, device: str, power: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The component along the weights is 0 above the minimum, whole below and half at it; powers of 2 are exact."""
    floor = 2.0**-14
    monkeypatch.setitem(WS_EPS, "floor", floor)
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    start = direction * math.sqrt(power * floor / 4)
    weight = start.to(device).detach().requires_grad_()
    (made,) = standardize_all([weight], [torch.ones(1, device=device)], [1.0], engine=engine)
    (made * start.to(device)).sum().backward()
    along = float((weight.grad.cpu() * start).sum())
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


def test_only_filters_on_16_byte_boundaries_are_declared_aligned(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normfree.ops import standardize_triton

    seen: list[tuple[int, bool]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **options: seen.append((grid[0], options["ALIGNED"]))

    monkeypatch.setattr(standardize_triton, "forward", Recorder())
    weights, gains = some_weights()  # of 27, 8, 72, 33 and 8 elements
    standardize_all(weights, gains, SCALES, engine="triton")
    assert seen == [(4 + 4 + 2, True), (8 + 3, False)]
    seen.clear()
    shifted = torch.zeros(4 * 8 + 1)[1:].view(4, 8, 1, 1)
    standardize_all([shifted], gains[1:2], [1.0], engine="triton")
    assert seen == [(4, False)]
    seen.clear()
    short = torch.zeros(4, 4, 1, 1)  # 8 bytes of bfloat16 in a filter
    standardize_all([short], gains[1:2], [1.0], dtype=torch.bfloat16, engine="triton")
    assert seen == [(4, False)]


@pytest.mark.parametrize(
    ("direction", "accesses"), [("forward", 3 * 2 + 2), ("backward", (2 + 2 + 2) * 2 + 2)]
)
def test_aligned_filters_are_accessed_16_bytes_at_a_time(
    direction: str, accesses: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for sm_90, which needs no GPU: three loops with two accesses per lane and tensor; one of them writes."""
    triton = pytest.importorskip(
        "triton", reason="Triton is not installed; torch's wheels for Linux bring it"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from normfree.ops import standardize_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(standardize_triton, direction)
    constants = {"BLOCK": many.BLOCK, "ALIGNED": True, "OUT": standardize_triton.TYPES[torch.float32]}
    types = {"table": "*i64", "owner": "*i32", "numbers": "*fp32", "start": "i32", "floor": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    indices = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    ptx = triton.compile(
        ASTSource(kernel, signature, indices),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": many.WARPS, "enable_fp_fusion": False},
    ).asm["ptx"]
    assert len(re.findall(r"(?:ld|st)\.global\.v4\.b32", ptx)) == accesses


def test_the_default_engine_is_chosen_by_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[str] = []
    monkeypatch.setattr(many, "_launch", lambda engine, *args: engines.append(engine))
    weights, gains = some_weights()
    standardize_all(weights, gains, SCALES)
    standardize_all(weights, gains, SCALES, dtype=torch.bfloat16)
    standardize_all([w.double() for w in weights], gains, SCALES)
    standardize_all([w.to("meta") for w in weights], [g.to("meta") for g in gains], SCALES)
    assert engines == ["compiled"] * (library() is not None)


def test_engines_that_cannot_be_used_are_refused() -> None:
    weights, gains = some_weights(torch.float64)
    allowed = "dense float32 tensors, float32 or bfloat16 results, and Triton installed"
    with pytest.raises(ValueError, match=f"^engine='triton'. Allowed: {allowed}. Fix: pass engine=None.$"):
        standardize_all(weights, gains, SCALES, engine="triton")
    with pytest.raises(ValueError, match=r"engine='compiled'\. Allowed: plain float32 tensors on a CPU"):
        standardize_all(weights, gains, SCALES, engine="compiled")
    with pytest.raises(ValueError, match="unknown engine 'tritn'"):
        standardize_all(weights, gains, SCALES, engine="tritn")


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
