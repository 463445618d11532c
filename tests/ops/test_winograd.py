"""Winograd convolutions: results, gradients, and the cases in which they are used."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from normfree.models.layers import WSConv2d
from normfree.native.library import library
from normfree.ops import winograd
from normfree.ops.conv2d import conv2d as padded_conv2d
from normfree.ops.conv2d_backends import TORCH, WINOGRAD, Geometry, choose_backend
from normfree.ops.winograd import (
    conv2d,
    filter_planes,
    input_gradient,
    weight_gradient,
)

pytestmark = pytest.mark.skipif(
    library() is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no compiler was found when the package was installed, or the processor has no AVX2",
)

CASES = [  # images, channels, filters, height, width, groups
    (3, 16, 32, 7, 9, 1),
    (2, 32, 16, 8, 6, 1),
    (1, 96, 48, 1, 1, 1),
    (2, 64, 96, 2, 3, 2),
    (5, 96, 96, 12, 5, 3),
    (2, 16, 160, 31, 30, 1),
    (1, 128, 64, 1, 40, 4),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def operands(case: tuple[int, ...], *, whole: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return input, filters, bias and gradient of the output, with integer values if `whole`."""
    images, channels, filters, height, width, groups = case
    sizes = [
        (images, channels, height, width), (filters, channels // groups, 3, 3), (filters,),
        (images, filters, height, width),
    ]  # fmt: skip
    made = [torch.randint(-8, 9, size).float() if whole else torch.randn(size) for size in sizes]
    x, weight, bias, grad = (
        t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in made
    )
    return x, weight, bias, grad


def wanted(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int) -> list[Tensor]:
    """Return the convolution and the gradients of its input and filters, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(x, weight, bias.double(), padding=1, groups=groups)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())]


def found(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, groups: int, side: int) -> list[Tensor]:
    return [
        conv2d(x, weight, bias, groups=groups, side=side),
        input_gradient(grad, weight, groups=groups, side=side),
        weight_gradient(x, grad, groups=groups, side=side),
    ]


@cases
@pytest.mark.parametrize("threads", [1, 3])
def test_results_for_integers_are_exact(case: tuple[int, ...], threads: int) -> None:
    """With tiles of 2 x 2 all intermediate values, multiples of 1/4, are exact in float32."""
    torch.set_num_threads(threads)
    tensors = operands(case, whole=True)
    for layout in (torch.channels_last, torch.contiguous_format):
        x, weight, bias, grad = tensors
        weight, grad = weight.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        for got, exact in zip(
            found(x, weight, bias, grad, case[-1], 2), wanted(*tensors, case[-1]), strict=True
        ):
            assert torch.equal(got.double(), exact)
            assert got.is_contiguous(memory_format=torch.channels_last)
    x, weight, _, _ = tensors
    without = conv2d(x, weight, None, groups=case[-1], side=2).double()
    assert torch.equal(without, F.conv2d(x.double(), weight.double(), padding=1, groups=case[-1]))


@pytest.mark.parametrize("case", [*CASES, (4, 64, 64, 56, 56, 1)], ids=str)
@pytest.mark.parametrize(("side", "most"), [(2, 1e-6), (4, 4e-6)])
def test_errors_are_those_of_rounding(case: tuple[int, ...], side: int, most: float) -> None:
    """The error of PyTorch is 0.7 to 2 times that of tiles of 2 x 2 for long sums."""
    tensors = operands(case)
    for got, exact in zip(found(*tensors, case[-1], side), wanted(*tensors, case[-1]), strict=True):
        assert float((got - exact).norm() / exact.norm()) < most


@pytest.mark.parametrize("side", [2, 4])
def test_planes_of_rotated_filters_equal_rotated_planes(side: int) -> None:
    """Their matrices are transposed: N and K are exchanged."""
    weight = torch.randn(32, 48, 3, 3)
    planes = filter_planes(weight, groups=1, side=side, rotated=True)
    other = filter_planes(weight.flip(2, 3).transpose(0, 1), groups=1, side=side)
    assert planes.shape == other.shape == ((side + 2) ** 2, 48, 32)
    torch.testing.assert_close(planes, other, rtol=1e-6, atol=1e-6)


def test_memory_of_planes_is_reused_only_on_request() -> None:
    first, second = torch.randn(2, 32, 32, 3, 3)
    kept = filter_planes(first, groups=1, side=2)
    reused = filter_planes(first, groups=1, side=2, reuse=True)
    assert torch.equal(kept, reused)
    filter_planes(second, groups=1, side=2, reuse=True)
    assert torch.equal(kept, filter_planes(first, groups=1, side=2))
    assert not torch.equal(kept, reused)


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.usefixtures("compiled")
def test_bits_depend_neither_on_threads_nor_on_blocks(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    case = (3, 64, 64, 20, 22, 1)
    tensors = operands(case)
    torch.set_num_threads(1)
    one = found(*tensors, 1, side)
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, one, found(*tensors, 1, side)))
    for block in (12, 36, 3000):
        monkeypatch.setattr(winograd, "BLOCK", block)
        got = found(*tensors, 1, side)
        assert all(map(torch.equal, one[:2], got[:2]))
        torch.testing.assert_close(got[2], one[2], rtol=1e-4, atol=1e-3)  # its sums are over tiles


@pytest.mark.parametrize("side", [2, 4])
def test_an_image_does_not_depend_on_the_others_of_its_batch(side: int) -> None:
    x, weight, bias, _ = operands((4, 32, 48, 9, 9, 1))
    together = conv2d(x, weight, bias, groups=1, side=side)
    alone = torch.cat([conv2d(image[None], weight, bias, groups=1, side=side) for image in x])
    assert torch.equal(together, alone)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be a processor with AVX2 and no wider registers."""
    monkeypatch.setattr(winograd, "limits", lambda: winograd.LIMITS["AVX2"])


@pytest.mark.usefixtures("fast")
def test_supported_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias, _ = operands((2, 64, 64, 16, 16, 1))
    plain = Geometry(1, (1, 1), 1)
    assert WINOGRAD.supports(x, weight, None, plain)
    refused = [
        (x.contiguous(), weight, plain),
        (x.double(), weight.double(), plain),
        (x.to("meta"), weight.to("meta"), plain),
        (x[:, :, :8, :8], weight, plain),  # not dense
        (x[:1, :, :14, :14].contiguous(memory_format=torch.channels_last), weight, plain),  # 49 tiles
        (x, weight[:, :, :1, :1], plain),
        (x, weight, Geometry(2, (1, 1), 1)),
        (x, weight, Geometry(1, (0, 0), 1)),
        (x[:, :24].contiguous(memory_format=torch.channels_last), weight[:, :24].contiguous(), plain),
        (x, weight[:40], plain),
        (x, weight[:, :16].contiguous(), Geometry(1, (1, 1), 4)),
    ]
    for image, filters, geometry in refused:
        assert not WINOGRAD.supports(image, filters, None, geometry)
    assert WINOGRAD.supports(x, weight, bias, plain)
    assert not WINOGRAD.supports(x, weight, bias.double(), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert not WINOGRAD.supports(x, weight, None, plain)
    assert choose_backend(x, weight, bias, plain) is WINOGRAD
    monkeypatch.setattr(winograd, "limits", lambda: None)
    assert not WINOGRAD.supports(x, weight, None, plain)


@pytest.mark.parametrize(
    ("registers", "batch", "channels", "side", "output", "packed", "weight"),
    [
        ("AVX2", 8, 128, 48, 4, 4, 4),
        ("AVX2", 2, 128, 14, 2, 2, 2),
        ("AVX2", 1, 128, 14, 0, 2, 0),
        ("AVX2", 8, 512, 7, 0, 0, 0),
        ("AVX512", 8, 128, 48, 4, 4, 2),
        ("AVX512", 8, 128, 14, 2, 2, 2),
        ("AVX512", 2, 128, 14, 0, 2, 2),
        ("AVX512", 8, 256, 14, 2, 2, 0),
        ("AVX512", 8, 32, 12, 0, 0, 2),
        ("AVX512 AMD", 8, 128, 48, 4, 4, 4),
        ("AVX512 AMD", 2, 128, 12, 2, 2, 2),
        ("AVX512 AMD", 1, 128, 14, 0, 0, 2),
        ("AVX512 AMD", 8, 64, 8, 0, 0, 2),
        ("AVX512 AMD", 8, 32, 14, 4, 4, 0),
        ("AVX512 AMD", 8, 320, 14, 0, 0, 4),
        ("DEFAULT", 8, 128, 48, 0, 0, 0),
    ],
)
def test_tiles_by_processor_and_size(
    monkeypatch: pytest.MonkeyPatch,
    registers: str, batch: int, channels: int, side: int, output: int, packed: int, weight: int,
) -> None:  # fmt: skip
    """Sizes next to those that were measured, docs/speed.md."""
    monkeypatch.setattr(winograd, "processor_kind", lambda: registers)
    x, filters = torch.empty(batch, channels, side, side), torch.empty(channels, channels, 3, 3)
    assert winograd.output_side(x, filters, groups=1) == output
    assert winograd.output_side(x, filters, groups=1, packed=True) == packed
    assert winograd.weight_side(x, filters, groups=1) == weight


@pytest.mark.parametrize("registers", ["AVX2", "AVX512"])
def test_where_only_some_results_are_faster_the_others_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, registers: str
) -> None:
    """At this size AVX-512 uses tiles only for the gradient of the weight."""
    monkeypatch.setattr(winograd, "processor_kind", lambda: registers)
    case = (2, 64, 64, 12, 12, 1)
    x, weight, bias, grad = operands(case)
    geometry = Geometry(1, (1, 1), 1)
    assert choose_backend(x, weight, bias, geometry) is WINOGRAD
    got = [
        WINOGRAD.forward(x, weight, bias, geometry),
        WINOGRAD.input_gradient(grad, x, weight, geometry),
        WINOGRAD.weight_gradient(grad, x, weight, geometry, needs=(True, False))[0],
    ]
    by_torch = [F.conv2d(x, weight, bias, padding=1), TORCH.input_gradient(grad, x, weight, geometry)]
    assert [torch.equal(a, b) for a, b in zip(got[:2], by_torch, strict=True)] == [registers == "AVX512"] * 2
    for one, exact in zip(got, wanted(x, weight, bias, grad, 1), strict=True):
        assert float((one - exact).norm() / exact.norm()) < 4e-6


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("trains", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_of_a_layer_do_not_depend_on_it(
    trains: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every combination of trained input, filters and bias, and activations that are saved or recomputed."""
    torch.manual_seed(0)
    conv = WSConv2d(64, 96, groups=2).to(memory_format=torch.channels_last)
    conv.weight.requires_grad_(trains[1])
    conv.gain.requires_grad_(trains[1])
    conv.bias.requires_grad_(trains[2])
    image = torch.randn(3, 64, 10, 11).contiguous(memory_format=torch.channels_last)
    calls: list[str] = []
    for name in ("conv2d", "input_gradient", "weight_gradient"):
        real = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k)
        )

    def results(act: object) -> list[Tensor | None]:
        conv.zero_grad(set_to_none=True)
        x = image.clone(memory_format=torch.preserve_format).requires_grad_(trains[0])
        y = conv(x, act=act)
        if any(trains):
            y.square().mean().backward()
        return [y.detach(), x.grad, *(p.grad for p in conv.parameters())]

    for act in (None, F.silu, F.relu):
        calls.clear()
        got = results(act)
        expected = {"conv2d"}
        expected |= {"input_gradient"} if trains[0] else set()
        expected |= {"weight_gradient"} if trains[1] else set()
        assert set(calls) == expected
        with monkeypatch.context() as patch:
            patch.setattr("normfree.ops.conv2d.choose_backend", lambda *args: TORCH)
            plain = results(act)
        for one, two in zip(got, plain, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fast")
def test_its_results_are_recorded_by_autograd_where_gradients_are_enabled() -> None:
    x, weight, bias, _ = operands((2, 64, 64, 16, 16, 1))
    weight.requires_grad_()
    options = {"act": None, "stride": 1, "groups": 1, "padding": "same"}
    y = padded_conv2d(x, weight, bias, **options)
    assert y.grad_fn is not None
    with torch.no_grad():
        again = padded_conv2d(x, weight, bias, **options)
    assert torch.equal(again, conv2d(x, weight.detach(), bias, groups=1, side=2))
    assert torch.equal(again, y.detach())


@pytest.mark.usefixtures("fast")
def test_an_observed_backward_pass_uses_the_ops_of_torch() -> None:
    """A dispatch mode sees the operations of a backward pass whose forward pass used the compiled kernels."""
    x, weight, bias, _ = operands((2, 64, 64, 16, 16, 1))
    grads = []
    for observed in (False, True):
        leaf = weight.clone().requires_grad_()
        y = padded_conv2d(x, leaf, bias, act=None, stride=1, groups=1, padding="same")
        with FlopCounterMode(display=False) if observed else contextlib.nullcontext() as counter:
            y.square().mean().backward()
        grads.append(leaf.grad)
    assert counter.get_total_flops() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
