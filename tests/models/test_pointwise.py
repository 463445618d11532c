"""1x1 convolutions as products: the same values and gradients, in the same memory format, without a copy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.models import convolution
from normfree.models import pointwise as module
from normfree.models.pointwise import is_product, pointwise, pointwise_gradients
from normfree.models.rows import VARIANTS
from normfree.models.zoo import create_model

SHAPES = [(2, 3, 5, 4, 6), (1, 8, 1, 1, 4), (3, 1, 7, 1, 2), (1, 2, 3, 3, 1)]  # B I H W O


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    b, i, h, w, o = shape
    torch.manual_seed(0)
    x = torch.randn(b, i, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, i, 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(o, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_convolution(shape: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = operands(shape)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    got = pointwise(x, weight, bias if with_bias else None)
    wanted = F.conv2d(x, weight, bias if with_bias else None)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn(wanted.shape, dtype=x.dtype)
    for layout in (grad, grad.contiguous(memory_format=torch.channels_last)):
        ours, theirs = (torch.autograd.grad(y, inputs, layout, retain_graph=True) for y in (got, wanted))
        by_hand = pointwise_gradients(layout, x.detach(), weight.detach())
        for one, two in zip((*ours, *by_hand), (*theirs, *theirs), strict=False):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert pointwise_gradients(grad, x, weight, needs_x=False)[0] is None
    assert pointwise_gradients(grad, x, weight, needs_weight=False)[1] is None


def test_second_derivatives_are_those_of_the_convolution() -> None:
    x, weight, bias = operands(SHAPES[0])
    assert torch.autograd.gradgradcheck(pointwise, (x, weight, bias))


def test_under_autocast_it_is_bfloat16_as_a_convolution_is() -> None:
    x, weight, bias = operands(SHAPES[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = pointwise(x, weight, bias), F.conv2d(x, weight, bias)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)


class Copies(TorchDispatchMode):
    """Notes the operations that move memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy", "contiguous"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_channels_last_stays_and_nothing_is_copied() -> None:
    x, weight, bias = operands(SHAPES[0])
    with Copies() as copies:
        y = pointwise(x, weight, bias)
        grad = torch.ones_like(y)
        found = torch.autograd.grad(y, (x, weight), grad)
        found += pointwise_gradients(grad, x.detach(), weight.detach())
    assert copies.seen == []
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, grad, *found))
    with Copies() as copies:  # the same watch does see a copy
        pointwise(x.detach().contiguous(), weight, bias)
    assert copies.seen


def test_which_convolutions_are_products() -> None:
    x, weight, _ = operands(SHAPES[0])
    assert not is_product(x, weight, stride=1, groups=1)  # on a CPU nothing is
    fits = module._is_pointwise
    assert fits(x, weight, stride=1, groups=1)
    assert not fits(x, weight, stride=2, groups=1)
    assert not fits(x, torch.randn(6, 1, 1, 1), stride=1, groups=3)
    assert not fits(x, torch.randn(6, 3, 3, 3), stride=1, groups=1)
    assert not fits(x.detach().contiguous(), weight, stride=1, groups=1)


def test_it_compiles_into_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(pointwise, backend=counter, fullgraph=True)
    x, weight, bias = operands(SHAPES[0])
    torch.testing.assert_close(compiled(x, weight, bias), pointwise(x, weight, bias))
    assert counter.frame_count == 1


@pytest.mark.parametrize("model", ["nfnet_f0", "nf_resnet50"])
def test_a_network_by_products_is_the_network(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients, with the 1x1 convolutions that a GPU would compute so; both, with activations before them
    that are not kept, and after stride 2, where there is none to compute so."""
    sizes = {"depths": (1, 2), "widths": (32, 64), "strides": (1, 2), "skip_gain": 1.0, "drop_rate": 0.0,
             "stochdepth_rate": 0.0}  # fmt: skip
    small = replace(VARIANTS[model], **sizes, group_width=8 if model == "nfnet_f0" else 0)
    monkeypatch.setitem(VARIANTS, "small", small)
    net = create_model("small", num_classes=3).double().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    asked: list[bool] = []

    def counted(x: Tensor, weight: Tensor, *, stride: int, groups: int) -> bool:
        asked.append(module._is_pointwise(x, weight, stride=stride, groups=groups))
        return asked[-1]

    def gradients() -> list[Tensor]:
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(images), torch.tensor([0, 2]))
        loss.backward()
        return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

    wanted = gradients()
    monkeypatch.setattr(convolution, "is_product", counted)
    for one, two in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert 0 < sum(asked) < len(asked)


def test_networks_leave_it_until_a_gpu_has_measured_it() -> None:
    assert not module.PRODUCTS


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PRODUCTS", True)
    x, weight, bias = (t.detach().cuda() for t in operands(SHAPES[0]))
    assert is_product(x, weight, stride=1, groups=1)
    torch.testing.assert_close(pointwise(x, weight, bias), F.conv2d(x, weight, bias))
