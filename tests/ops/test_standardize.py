"""Standardization of many weights at once, and once per optimizer step, against the ordinary one."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.models import layers
from normfree.models.layers import WSConv2d, standardize
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.ops import standardize as many
from normfree.ops import standardize_torch
from normfree.ops.standardize import standardize_all
from normfree.ops.standardize_torch import WS_EPS, standardize_backward

SCALES = [1.3, 0.7, 2.0, 1.0, 1.1]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, interpret: Callable[..., None]) -> None:
    """The Triton kernels, interpreted on the CPU in short blocks, so that filters span several of them."""
    interpret("normfree.ops.standardize_triton", "forward", "backward")
    monkeypatch.setattr(many, "BLOCK", 32)
    monkeypatch.setattr(many, "_engine", lambda tensors, dtype: "triton")


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain twin."""
    monkeypatch.setattr(many, "_engine", lambda tensors, dtype: "torch")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, through the compiled kernels."""
    here = many._engine

    def must(tensors: list[Tensor], dtype: torch.dtype | None) -> str:
        assert here(tensors, dtype) == "triton"
        return "triton"

    monkeypatch.setattr(many, "_engine", must)


WAYS = ["by_torch", "compiled", "interpreted", pytest.param("on_cuda", marks=pytest.mark.gpu)]


def some_weights(
    dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Odd and even filters, channels_last, one whose power lies under the floor, and zeros."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (4, 8, 1, 1), (4, 8, 3, 3), (3, 33, 1, 1), (2, 8, 1, 1)]
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    weights[2] = weights[2].to(memory_format=torch.channels_last)
    weights[3] *= 1e-4
    weights[4] *= 0.0
    gains = [torch.rand(len(w), generator=generator) + 0.5 for w in weights]
    place = {"dtype": dtype, "device": device}
    return [w.to(**place).requires_grad_() for w in weights], [g.to(**place).requires_grad_() for g in gains]


def relative(got: Tensor, wanted: Tensor) -> float:
    distance = (got.detach().cpu().double() - wanted.detach()).norm()
    return float(distance / wanted.detach().norm().clamp(min=1e-30))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("eps", "dtype"), [("floor", None), ("add", None), ("floor", torch.bfloat16)])
def test_many_at_once_are_each_alone(
    way: str, eps: str, dtype: torch.dtype | None, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(way)
    weights, gains = some_weights(device="cuda" if way == "on_cuda" else "cpu")
    exact_weights, exact_gains = some_weights(torch.float64)
    made = standardize_all(weights, gains, SCALES, eps=eps, dtype=dtype)
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("power", "share"), [(4.0, 0.0), (1.0, 0.5), (0.25, 1.0)])
def test_the_gradient_through_the_power_stops_under_the_floor_and_is_halved_at_it(
    way: str, power: float, share: float, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Along the weights: nothing is left above the floor, all below, half at it. Powers of two make equality exact."""
    request.getfixturevalue(way)
    floor = 2.0**-14
    monkeypatch.setitem(WS_EPS, "floor", floor)
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    start = direction * math.sqrt(power * floor / 4)
    weight = start.to("cuda" if way == "on_cuda" else "cpu").detach().requires_grad_()
    (made,) = standardize_all([weight], [torch.ones(1, device=weight.device)], [1.0])
    (made * start.to(weight.device)).sum().backward()
    along = float((weight.grad.cpu() * start).sum())
    assert along == pytest.approx(share * power * floor / math.sqrt(max(power, 1.0) * floor), abs=1e-8)


@pytest.mark.parametrize("eps", ["floor", "add"])
def test_the_closed_form_is_what_autograd_finds(eps: str) -> None:
    for weight, gain in zip(*some_weights(torch.float64), strict=True):
        grad = torch.randn_like(weight)
        wanted = torch.autograd.grad(standardize(weight, gain, scale=1.7, eps=eps), (weight, gain), grad)
        got = standardize_backward(weight.detach(), gain.detach(), grad, scale=1.7, eps=eps)
        for one, two in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("part", [1, 40, 1 << 20])
@pytest.mark.parametrize("eps", ["floor", "add"])
def test_parts_and_gaps_in_memory_change_nothing(
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


def test_only_filters_on_16_byte_boundaries_are_promised_to_be(
    interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normfree.ops import standardize_triton

    seen: list[tuple[int, bool]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **words: seen.append((grid[0], words["ALIGNED"]))

    monkeypatch.setattr(standardize_triton, "forward", Recorder())
    weights, gains = some_weights()  # of 27, 8, 72, 33 and 8 elements
    standardize_all(weights, gains, SCALES)
    assert seen == [(4 + 4 + 2, True), (8 + 3, False)]
    seen.clear()
    behind = torch.zeros(4 * 8 + 1)[1:].view(4, 8, 1, 1)
    standardize_all([behind], gains[1:2], [1.0])
    assert seen == [(4, False)]
    seen.clear()
    standardize_all([torch.zeros(4, 4, 1, 1)], gains[1:2], [1.0], dtype=torch.bfloat16)  # 8 bytes of kernel
    assert seen == [(4, False)]


@pytest.mark.parametrize(
    ("direction", "accesses"), [("forward", 3 * 2 + 2), ("backward", (2 + 2 + 2) * 2 + 2)]
)
def test_aligned_filters_pass_through_memory_in_16_byte_accesses(
    direction: str, accesses: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compiled for sm_90, which needs no GPU: three loops of two accesses per lane and tensor, of which one writes."""
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
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    ptx = triton.compile(
        ASTSource(kernel, signature, places),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": many.WARPS, "enable_fp_fusion": False},
    ).asm["ptx"]
    assert len(re.findall(r"(?:ld|st)\.global\.v4\.b32", ptx)) == accesses


# --- once per optimizer step -------------------------------------------------------------------------


def tiny(*, eps: str = "floor") -> nn.Module:
    torch.manual_seed(0)
    net = create_model(
        "nfnet_f0", widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), group_width=4, num_classes=3, stem="conv3",
        skip_gain=0.5, drop_rate=0.0, stochdepth_rate=0.0, ws_eps=eps,
    )  # fmt: skip
    return net.double().to(memory_format=torch.channels_last).train()


def backward(net: nn.Module, images: Tensor, *, parts: int) -> None:
    labels = torch.arange(len(images)) % 3
    for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        F.cross_entropy(net(x), y, reduction="sum").backward()


@pytest.mark.parametrize(("parts", "eps"), [(1, "floor"), (4, "floor"), (4, "add")])
def test_gradients_are_those_of_the_ordinary_path(parts: int, eps: str) -> None:
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    plain, shared = tiny(eps=eps), tiny(eps=eps)
    for _ in range(2):  # the second time on top of what is there
        backward(plain, images, parts=parts)
        with standardized_once(shared):
            backward(shared, images, parts=parts)
    for (name, p), q in zip(plain.named_parameters(), shared.parameters(), strict=True):
        error = float((p.grad - q.grad).norm() / p.grad.norm())
        assert error < 1e-12, name
        assert q.ndim != 4 or q.grad.is_contiguous(memory_format=torch.channels_last), name


def test_one_standardization_of_each_weight_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        return lambda weight, gain, **words: calls.append(id(weight)) or real(weight, gain, **words)

    monkeypatch.setattr(layers, "standardize", counted(standardize))
    monkeypatch.setattr(many, "standardize_forward", counted(many.standardize_forward))
    net = tiny()
    convs = [m for m in net.modules() if isinstance(m, WSConv2d)]
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    with standardized_once(net):
        backward(net, images, parts=4)
    assert len(calls) == len(convs)
    backward(net, images, parts=4)
    assert len(calls) == 5 * len(convs)


def test_gradients_of_the_kernels_may_be_changed_before_the_end() -> None:
    """As a sum over processes does: twice the kernels' gradients are twice the weights'."""
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    plain, shared = tiny(), tiny()
    backward(plain, images, parts=1)
    with standardized_once(shared) as standardize_triton:
        backward(shared, images, parts=2)
        assert shared.stem.conv0.weight.grad is None
        assert standardize_triton.keys() == {n for n, m in shared.named_modules() if isinstance(m, WSConv2d)}
        for kernel in standardize_triton.values():
            kernel.grad *= 2.0
    for name, conv in shared.named_modules():
        if isinstance(conv, WSConv2d):
            other = plain.get_submodule(name)
            torch.testing.assert_close(conv.weight.grad, 2.0 * other.weight.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(conv.gain.grad, 2.0 * other.gain.grad, rtol=1e-10, atol=1e-12)


def test_what_is_frozen_or_not_used_gets_no_gradient() -> None:
    net = tiny()
    net.stem.requires_grad_(False)
    with standardized_once(net):
        net.stem(torch.randn(2, 3, 16, 16, dtype=torch.float64))
        block = net.stages[0][0]
        block(torch.randn(2, net.stem.out_channels, 8, 8, dtype=torch.float64)).sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None) == name.startswith("stages.0.0."), name
    with torch.no_grad(), standardized_once(net):
        net(torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_an_error_inside_leaves_the_network_as_it_was() -> None:
    net = tiny()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def stopped() -> None:
        with standardized_once(net):
            backward(net, images, parts=1)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stopped()
    assert net.stem.conv0.weight.grad is None
    assert all(m.shared_kernel is None for m in net.modules() if isinstance(m, WSConv2d))


def test_weights_may_not_change_inside() -> None:
    net = tiny()

    def moved() -> None:
        with standardized_once(net), torch.no_grad():
            with torch.enable_grad():
                backward(net, torch.randn(2, 3, 16, 16, dtype=torch.float64), parts=1)
            net.stem.conv0.weight *= 2.0

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        moved()


def test_it_does_not_nest() -> None:
    net = tiny()
    message = "'stem.conv0' has a standardized kernel already. standardized_once does not nest. Open it once."
    with standardized_once(net):
        inner = standardized_once(net)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            inner.__enter__()


def test_sharded_weights_are_refused() -> None:
    net = tiny()
    net.stem.conv0.weight.device_mesh = "as a DTensor has"
    message = (
        "The weight of 'stem.conv0' is sharded over processes. standardized_once takes whole weights. "
        "Do without it, or use DDP."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        standardized_once(net).__enter__()


def test_a_compiled_network_takes_new_kernels_without_being_compiled_again() -> None:
    torch.manual_seed(0)
    parts = [WSConv2d(3, 4), nn.ReLU(), WSConv2d(4, 3, groups=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    shared = nn.Sequential(*parts).double()
    plain, compiled = copy.deepcopy(shared), torch.compile(shared, backend="aot_eager")
    images = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        backward(plain, images, parts=2)
        with standardized_once(shared):
            backward(compiled, images, parts=2)
    for p, q in zip(plain.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
