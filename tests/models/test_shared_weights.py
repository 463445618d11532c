"""Weights standardized once per step: the same gradients as without, and the conditions of the context."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.models import layers
from normfree.models.layers import WSConv2d, standardize
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.ops import standardize as many


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
def test_gradients_equal_those_without_the_context(parts: int, eps: str) -> None:
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    plain, shared = tiny(eps=eps), tiny(eps=eps)
    for _ in range(2):  # the second time gradients are accumulated
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
        return lambda weight, gain, **options: calls.append(id(weight)) or real(weight, gain, **options)

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


def test_gradients_of_standardized_weights_may_be_changed_before_the_end() -> None:
    """A sum over processes does so. Doubling them doubles the gradients of the weights."""
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    plain, shared = tiny(), tiny()
    backward(plain, images, parts=1)
    with standardized_once(shared) as made:
        backward(shared, images, parts=2)
        assert shared.stem.conv0.weight.grad is None
        assert made.keys() == {n for n, m in shared.named_modules() if isinstance(m, WSConv2d)}
        for weight in made.values():
            weight.grad *= 2.0
    for name, conv in shared.named_modules():
        if isinstance(conv, WSConv2d):
            other = plain.get_submodule(name)
            torch.testing.assert_close(conv.weight.grad, 2.0 * other.weight.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(conv.gain.grad, 2.0 * other.gain.grad, rtol=1e-10, atol=1e-12)


def test_frozen_and_unused_weights_get_no_gradient() -> None:
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


def test_an_error_inside_restores_the_network() -> None:
    net = tiny()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)

    def stopped() -> None:
        with standardized_once(net):
            backward(net, images, parts=1)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stopped()
    assert net.stem.conv0.weight.grad is None
    assert all(m.shared_weight is None for m in net.modules() if isinstance(m, WSConv2d))


def test_weights_must_not_change_inside() -> None:
    net = tiny()

    def change() -> None:
        with standardized_once(net), torch.no_grad():
            with torch.enable_grad():
                backward(net, torch.randn(2, 3, 16, 16, dtype=torch.float64), parts=1)
            net.stem.conv0.weight *= 2.0

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        change()


def test_nested_contexts_are_refused() -> None:
    net = tiny()
    message = (
        "'stem.conv0' is in the context of standardized_once already. Allowed: one context at a time. "
        "Fix: open it once."
    )
    with standardized_once(net):
        inner = standardized_once(net)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            inner.__enter__()


def test_sharded_weights_are_refused() -> None:
    net = tiny()
    net.stem.conv0.weight.device_mesh = "the attribute of a DTensor"
    message = (
        "the weight of 'stem.conv0' is sharded over processes. Allowed: whole weights. "
        "Fix: do not use standardized_once, or train with DDP."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        standardized_once(net).__enter__()


def test_a_compiled_network_is_not_recompiled_for_new_weights() -> None:
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
