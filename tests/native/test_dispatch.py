"""Detection of observers, layouts of tensors in memory, and the private torch APIs behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from normfree.native.dispatch import (
    batched_gradients_are_active,
    can_bypass_dispatcher,
    dispatch_mode_is_active,
    eager_training,
    forward_ad_is_active,
    functorch_is_active,
    fx_is_tracing,
    has_hooks,
    is_plain_cpu_tensor,
    is_transformed,
    laid_out_as,
    onednn_conv2d,
    onednn_conv2d_is_available,
    pack_onednn_weight,
    same_layout,
    storage_id,
)


@pytest.mark.parametrize(
    ("tensor", "plain"),
    [
        (torch.zeros(()), True), (torch.zeros(2, 3), True), (torch.nn.Parameter(torch.zeros(2)), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True), (torch.zeros(3, 4).T, False),
        (torch.zeros(4, 6)[:, ::2], False), (torch.zeros(3, dtype=torch.float64), False),
        (torch.zeros(3, dtype=torch.bfloat16), False), (torch.zeros(3, device="meta"), False),
        (torch.nn.Buffer(torch.zeros(3)), True),
    ],
)  # fmt: skip
def test_plain_cpu_tensors_are_dense_and_float32(tensor: Tensor, plain: bool) -> None:
    assert is_plain_cpu_tensor(tensor) == plain


def in_vmap(check: Callable[[], bool]) -> bool:
    seen: list[bool] = []
    torch.func.vmap(lambda x: seen.append(check()) or x)(torch.zeros(2))
    return seen[0]


def test_a_dispatch_mode_is_found() -> None:
    assert not dispatch_mode_is_active()
    with FlopCounterMode(display=False):
        assert dispatch_mode_is_active()
        assert not can_bypass_dispatcher()
    assert not dispatch_mode_is_active()


def test_forward_mode_differentiation_is_found() -> None:
    assert not forward_ad_is_active()
    with forward_ad.dual_level():
        assert forward_ad_is_active()
        assert not can_bypass_dispatcher()
    assert not forward_ad_is_active()

    seen: list[bool] = []
    with forward_ad.dual_level():
        seen += [is_transformed(), eager_training()]
    assert seen == [True, False]


def test_a_trace_by_fx_is_found() -> None:
    seen: list[bool] = []

    class Probe(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.extend((fx_is_tracing(), is_transformed(), eager_training(), can_bypass_dispatcher()))
            return x + 1

    assert not fx_is_tracing()
    torch.fx.symbolic_trace(Probe())
    assert seen == [True, True, False, False]
    assert not fx_is_tracing()


HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_found(kind: str) -> None:
    module, other = torch.nn.Identity(), torch.nn.Identity()
    assert not has_hooks(module)
    handle = getattr(module, kind)(lambda *arguments: None)
    assert has_hooks(module)
    assert not has_hooks(other)
    handle.remove()
    assert not has_hooks(module)
    handle = getattr(torch.nn.modules.module, kind.replace("register_", "register_module_"))(
        lambda *arguments: None
    )
    assert has_hooks(other)
    handle.remove()
    assert not has_hooks(other)


def test_functorch_transforms_are_found() -> None:
    assert not functorch_is_active()
    assert in_vmap(functorch_is_active)
    assert not in_vmap(can_bypass_dispatcher)
    assert not in_vmap(eager_training)


def test_batched_gradients_are_found() -> None:
    seen: list[bool] = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            seen.extend((batched_gradients_are_active(), can_bypass_dispatcher()))
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(Double.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert torch.equal(found, 2 * torch.eye(3))
    assert seen == [True, False]
    assert not batched_gradients_are_active()


def test_a_tracer_is_found() -> None:
    seen: list[bool] = []
    torch.jit.trace(
        lambda x: seen.append(can_bypass_dispatcher()) or x + 1, torch.zeros(2), check_trace=False
    )
    assert seen == [False]
    assert can_bypass_dispatcher()


def test_training_needs_gradients() -> None:
    assert eager_training()
    with torch.no_grad():
        assert not eager_training()
        assert can_bypass_dispatcher()


def test_a_storage_has_one_id() -> None:
    x = torch.zeros(4)
    assert storage_id(x.untyped_storage()) == storage_id(x[1:].untyped_storage())
    assert storage_id(x.untyped_storage()) != storage_id(torch.zeros(4).untyped_storage())


@pytest.mark.skipif(not onednn_conv2d_is_available(), reason="torch without oneDNN")
@torch.no_grad()
def test_a_packed_weight_gives_the_same_convolution() -> None:
    x, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(16, 4, 3, 3), torch.randn(16)
    packed = pack_onednn_weight(weight, x.shape, stride=2, padding=(1, 1), groups=2)
    y = onednn_conv2d(x, packed, bias, stride=2, padding=(1, 1), groups=2)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, 2, 1, 1, 2))


def test_onednn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_get_mkldnn_enabled", lambda: False)
    assert not onednn_conv2d_is_available()


def test_layouts_are_compared_and_converted() -> None:
    contiguous = torch.arange(24.0).view(2, 3, 2, 2)
    channels_last = contiguous.to(memory_format=torch.channels_last)
    assert not same_layout(contiguous, channels_last)
    # strides of dimensions of size 1 are ignored
    assert same_layout(contiguous[:1, :1], channels_last[:1, :1].as_strided((1, 1, 2, 2), (9, 7, 2, 1)))
    assert laid_out_as(contiguous, contiguous) is contiguous
    moved = laid_out_as(channels_last, contiguous)
    assert same_layout(moved, channels_last)
    assert torch.equal(moved, contiguous)
