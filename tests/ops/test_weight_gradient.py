"""The gradient of the weight as matrix products equals that of autograd."""

import pytest
import torch
import torch.nn.functional as F

from normfree.models.layers import WSConv2d
from normfree.ops import weight_gradient as module
from normfree.ops.conv2d_backends import PRODUCTS, TORCH, Geometry
from normfree.ops.weight_gradient import weight_gradient

CASES = [  # channels, filters, size, kernel size, stride, padding, groups
    (16, 64, (9, 7), (1, 1), 1, (0, 0), 1),
    (32, 128, (9, 7), (1, 1), 2, (0, 0), 1),
    (32, 128, (9, 7), (1, 1), 1, (0, 0), 2),
    (32, 64, (9, 7), (3, 3), 1, (1, 1), 1),
    (48, 192, (8, 11), (3, 3), 2, (1, 1), 3),
    (32, 64, (9, 7), (3, 3), 2, (0, 0), 1),
    (16, 64, (12, 10), (7, 5), 2, (3, 2), 1),
]


@pytest.mark.parametrize("patches", [1, 8 << 20], ids=["one image at a time", "all images at once"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_autograd_in_double_precision(case, patches, monkeypatch):
    monkeypatch.setattr(module, "PATCHES", patches)
    channels, filters, size, kernel_size, stride, padding, groups = case
    torch.manual_seed(0)
    x = torch.randn(5, channels, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(filters, channels // groups, *kernel_size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding, 1, groups)
    grad = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, weight, grad)
    options = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "groups": groups}
    for gradient in (grad, grad.contiguous()):
        found = weight_gradient(x, gradient, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("trains", ["all", "not the input", "not the bias", "not the weight"])
def test_gradients_of_a_layer_do_not_depend_on_it(trains, half, monkeypatch):
    torch.manual_seed(0)
    conv = WSConv2d(32, 128, kernel_size=3, stride=2, groups=2).to(memory_format=torch.channels_last)
    image = torch.randn(3, 32, 10, 10).to(memory_format=torch.channels_last)
    conv.bias.requires_grad_(trains != "not the bias")
    conv.weight.requires_grad_(trains != "not the weight")
    conv.gain.requires_grad_(trains != "not the weight")
    found, calls = [], []
    real = module.weight_gradient
    monkeypatch.setattr("normfree.ops.conv2d_backends.processor_kind", lambda: "AVX2")
    monkeypatch.setattr(
        "normfree.ops.conv2d_backends.weight_gradient", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    for products in (True, False):
        if not products:
            monkeypatch.setattr("normfree.ops.conv2d.choose_backend", lambda *args: TORCH)
        for act in (None, F.silu, F.relu):
            x = image.clone().requires_grad_(trains != "not the input")
            conv.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = conv(x, act=act)
            y.float().square().mean().backward()
            found.append([t.grad for t in (x, *conv.parameters())])
    assert len(calls) == (0 if half or trains == "not the weight" else 3)  # bfloat16 uses oneDNN
    for one, other in zip(found[:3], found[3:], strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_it_supports_wide_groups_in_float32_on_a_cpu_in_channels_last(monkeypatch):
    kind = "AVX2"
    monkeypatch.setattr("normfree.ops.conv2d_backends.processor_kind", lambda: kind)

    def supports(x: torch.Tensor, weight: torch.Tensor, groups: int) -> bool:
        return PRODUCTS.supports(x, weight, None, Geometry(1, (1, 1), groups))

    x, weight = torch.empty(2, 64, 4, 4).to(memory_format=torch.channels_last), torch.empty(128, 32, 3, 3)
    assert supports(x, weight, 2)
    assert not supports(x, weight, 4)  # 32 filters in a group
    assert not supports(x.contiguous(), weight, 2)
    assert not supports(x.double(), weight.double(), 2)
    assert not supports(x.to("meta"), weight, 2)
    assert not supports(x, torch.empty(64, 8, 3, 3), 1)
    with torch.no_grad():
        assert not supports(x, weight, 2)
    kind = "AVX512 AMD"  # whose products take twice the time of convolutions
    assert not supports(x, weight, 2)


def test_in_bfloat16_it_supports_small_products(monkeypatch):
    """On any processor: PyTorch's products in bfloat16 are oneDNN's, as convolutions are."""

    def supports(x: torch.Tensor, weight: torch.Tensor, **geometry: int) -> bool:
        x, weight = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, weight))
        return PRODUCTS.supports(
            x, weight, None, Geometry(**{"stride": 1, "padding": (0, 0), "groups": 1} | geometry)
        )

    monkeypatch.setattr("normfree.ops.conv2d_backends.processor_kind", lambda: "AVX512 AMD")
    x, matrix = torch.empty(8, 64, 16, 16), torch.empty(128, 64, 1, 1)
    assert supports(x, matrix)
    assert not supports(torch.empty(9, 64, 16, 16), matrix)  # 2304 pixels
    assert not supports(x, matrix, stride=2)
    assert not supports(x, torch.empty(128, 64, 3, 3), padding=(1, 1))


def test_errors_are_smaller_than_those_of_a_long_float32_sum():
    torch.manual_seed(0)
    x = torch.randn(4, 64, 24, 24).to(memory_format=torch.channels_last)
    grad = torch.randn(4, 64, 24, 24).to(memory_format=torch.channels_last)
    options = {"kernel_size": (3, 3), "stride": 1, "padding": (1, 1), "groups": 1}
    exact = weight_gradient(x.double(), grad.double(), **options)
    assert float((weight_gradient(x, grad, **options) - exact).norm() / exact.norm()) < 1e-6


def test_an_empty_batch_gives_zeros():
    x = torch.empty(0, 32, 6, 6).to(memory_format=torch.channels_last)
    grad = torch.empty(0, 64, 6, 6).to(memory_format=torch.channels_last)
    for size in (1, 3):
        found = weight_gradient(
            x, grad, kernel_size=(size, size), stride=1, padding=(size // 2,) * 2, groups=1
        )
        assert found.shape == (64, 32, size, size)
        assert not found.any()
