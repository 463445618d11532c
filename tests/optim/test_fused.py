"""Tests of the update by compiled kernels against three calls."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from normfree.models.layers import WSConv2d
from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused import FusedUpdate
from normfree.optim.groups import parameter_groups
from normfree.optim.named_gradients import NonFiniteGradientError
from normfree.optim.sgd import SGD

pytestmark = pytest.mark.usefixtures("compiled")


class Small(nn.Module):
    """A module with units of every kind: rows of 27, 6, 36 and 10 weights, vectors, a scalar, a weight of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = WSConv2d(3, 4, kernel_size=3)
        self.conv = WSConv2d(6, 4, kernel_size=1)
        self.grouped = WSConv2d(8, 6, kernel_size=3, groups=2)
        self.gate = nn.Linear(37, 1)
        self.skip_gain = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(10, 3)


Made = tuple[Small, SGD, Ema]


def make(*, double: bool = False, nesterov: bool = True) -> Made:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.conv.weight[:2] = 0.0  # below eps
    model = model.to(torch.float64 if double else torch.float32)
    groups = parameter_groups(
        model, weight_decay=0.02, clipping=0.05, classifier="head", lr_multipliers={r"^stem\.": 0.3}
    )
    return model, SGD(groups, 0.2, nesterov=nesterov), Ema(model)


def set_grads_(
    model: nn.Module, step: int, *, change: Callable[[str, Tensor], Tensor | None] | None = None
) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for name, p in model.named_parameters():
        spread = torch.logspace(-5, 0, p.shape[0] if p.ndim else 1).view(-1, *[1] * (p.ndim - 1))
        grad = torch.randn(p.shape, generator=generator) * (spread if p.ndim else 1.0)
        grad = grad.to(p.device, p.dtype)
        p.grad = grad if change is None else change(name, grad)


def plain_step(made: Made, step: int) -> tuple[float, int, float]:
    model, optimizer, ema = made
    report = clip_grad_(optimizer.param_groups, mode="agc", clipping=0.05)
    optimizer.step()
    ema.num_updates = step
    ema.update(model)
    return float(report), report.units, float(report.grad_norm)


def state(made: Made) -> dict[str, Tensor]:
    model, optimizer, ema = made
    parts = {
        "model": dict(model.state_dict()),
        "momentum": optimizer.named_state(),
        "ema": dict(ema.module.state_dict()),
    }
    return {f"{part} {name}": t.clone() for part, some in parts.items() for name, t in some.items()}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        scale = float(wanted[name].abs().max())
        error = float((tensor.cpu().double() - wanted[name].cpu().double()).abs().max())
        assert error <= 4e-6 * scale, (name, error, scale)  # momenta cancel


@pytest.mark.parametrize("nesterov", [True, False])
def test_several_steps_equal_the_plain_path_in_float64(nesterov: bool) -> None:
    ours, exact = make(nesterov=nesterov), make(double=True, nesterov=nesterov)
    update = FusedUpdate(ours[1], model=ours[0], ema=ours[2])
    assert update.fits()
    for step in range(3):
        for made in (ours, exact):
            made[1].set_lr(0.2 / (1 + step))
            set_grads_(made[0], step)
        report = update.step()
        fraction, units, grad_norm = plain_step(exact, step)
        assert (float(report), report.units) == (pytest.approx(fraction), units)
        assert 0 < fraction < 1
        assert float(report.grad_norm) == pytest.approx(grad_norm, rel=1e-6)
        assert_near(state(ours), state(exact))


@pytest.mark.parametrize(
    ("where", "bad"),
    [("skip_gain", float("inf")), ("head.weight", float("-inf")), ("grouped.weight", float("nan"))],
)
def test_nothing_changes_when_a_gradient_is_not_finite(where: str, bad: float) -> None:
    made = make()
    update = FusedUpdate(made[1], model=made[0], ema=made[2])
    set_grads_(made[0], 0)
    update.step()
    made[0].norm.num_batches_tracked += 1  # both differ from their averages
    made[0].norm.running_mean += 1.0

    def spoil(name: str, grad: Tensor) -> Tensor:
        if name == where:
            grad.view(-1)[-1] = bad
        return grad

    set_grads_(made[0], 1, change=spoil)
    before = state(made)
    message = (
        f"1 of 16 gradients are not finite: '{where}'; none was changed. Allowed: finite gradients. "
        "Fix: skip this step or lower the learning rate; under a GradScaler pass error_if_nonfinite=False."
    )
    with pytest.raises(NonFiniteGradientError, match=f"^{re.escape(message)}$"):
        update.step()
    report = update.step(error_if_nonfinite=False)
    assert not torch.isfinite(report.grad_norm)
    assert float(report) == 0.0
    for name, tensor in state(made).items():
        assert torch.equal(tensor, before[name]), name


def test_below_the_limit_the_gradient_is_used_bit_for_bit() -> None:
    free, loose = make(), make()
    for made, clipping in ((free, 0.0), (loose, 1e9)):
        for group in made[1].param_groups:
            group["clipping"] = clipping
        set_grads_(made[0], 0)
        FusedUpdate(made[1], model=made[0], ema=made[2]).step()
    for (name, one), two in zip(state(free).items(), state(loose).values(), strict=True):
        assert torch.equal(one, two), name


def test_memory_formats_and_alignment_do_not_matter() -> None:
    plain, odd = make(), make()
    odd[0].to(memory_format=torch.channels_last)
    odd = (odd[0], odd[1], Ema(odd[0]))
    update = FusedUpdate(odd[1], model=odd[0], ema=odd[2])
    assert update.fits()

    def shift(name: str, grad: Tensor) -> Tensor:
        """Return the gradient in contiguous memory that starts 4 bytes after a multiple of 16."""
        return torch.empty(grad.numel() + 1)[1:].view(grad.shape).copy_(grad)

    reference = FusedUpdate(plain[1], model=plain[0], ema=plain[2])
    for step, change in enumerate((None, shift, None, shift)):
        set_grads_(plain[0], step)
        set_grads_(odd[0], step, change=change)
        reference.step()
        update.step()
        assert_near(state(odd), state(plain))
    assert odd[0].grouped.weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_without_a_gradient_are_kept_and_averaged_with_the_buffers() -> None:
    def drop(name: str, grad: Tensor) -> Tensor | None:
        return None if name.startswith("conv") else grad

    ours, exact = make(), make(double=True)
    update = FusedUpdate(ours[1], model=ours[0], ema=ours[2])
    for step in range(3):
        for model, _, _ in (ours, exact):
            set_grads_(model, step, change=drop if step < 2 else None)
            with torch.no_grad():
                model.conv.weight += 0.5  # moved from outside
                model.norm.running_mean += 1.0
                model.norm.num_batches_tracked += 1
        update.step()
        plain_step(exact, step)
        assert_near(state(ours), state(exact))


def test_without_an_average_and_without_gradients() -> None:
    ours, exact = make(), make(double=True)
    report = FusedUpdate(ours[1], model=ours[0], ema=ours[2]).step()
    assert (float(report), report.units, float(report.grad_norm)) == (0.0, 0, 0.0)
    plain_step(exact, 0)
    assert_near(state(ours), state(exact))
    average = ours[2].module.state_dict()["head.weight"].clone()
    for made in (ours, exact):
        set_grads_(made[0], 0)
    FusedUpdate(ours[1], model=ours[0]).step()
    assert torch.equal(ours[2].module.state_dict()["head.weight"], average)
    plain_step(exact, 0)
    assert_near(dict(ours[0].state_dict()), dict(exact[0].state_dict()))


def test_the_norm_of_a_tiny_gradient_counts_as_1e_6() -> None:
    ours, exact = make(), make(double=True)
    for made in (ours, exact):
        for group in made[1].param_groups:
            group.update(clipping=1e-8, weight_decay=0.0)  # so that the momentum has only gradients
        set_grads_(made[0], 0, change=lambda name, grad: 1e-8 * grad)
    FusedUpdate(ours[1], model=ours[0], ema=ours[2]).step()
    assert plain_step(exact, 0)[0] > 0.3
    assert_near(state(ours), state(exact))


def test_a_changed_memory_format_is_an_error() -> None:
    model, optimizer, ema = make()
    update = FusedUpdate(optimizer, model=model, ema=ema)
    model.to(memory_format=torch.channels_last)
    set_grads_(model, 0)
    before = state((model, optimizer, ema))
    message = (
        "the memory format of 'stem.weight' has changed since the update was created. Allowed: the format of its "
        "average. Fix: change formats first, then create Ema and the update."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        update.step()
    assert all(torch.equal(t, before[name]) for name, t in state((model, optimizer, ema)).items())


def test_create_returns_none_for_what_the_kernels_cannot_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, ema = make()
    assert isinstance(FusedUpdate.create(optimizer, model=model, ema=ema), FusedUpdate)
    assert (
        FusedUpdate.create(SGD(model.parameters(), 0.1), model=model, ema=ema) is None
    )  # no names, no clipping
    double = make(double=True)
    assert FusedUpdate.create(double[1], model=double[0], ema=double[2]) is None
    still = SGD(parameter_groups(model, weight_decay=0.0, clipping=0.0), 0.1, momentum=0.0, nesterov=False)
    assert FusedUpdate.create(still, model=model, ema=ema) is None
    model.to(memory_format=torch.channels_last)
    assert (
        FusedUpdate.create(optimizer, model=model, ema=ema) is None
    )  # the average has the other memory format
    elsewhere = make()
    elsewhere[0].to("meta")
    groups = parameter_groups(elsewhere[0], weight_decay=0.0, clipping=0.0)
    assert FusedUpdate.create(SGD(groups, 0.1), model=elsewhere[0]) is None
    turned = copy.deepcopy(model)
    turned.head.weight = nn.Parameter(torch.randn(10, 3).T)
    assert (
        FusedUpdate.create(SGD(parameter_groups(turned, weight_decay=0.0, clipping=0.0), 0.1), model=turned)
        is None
    )
    model, optimizer, ema = make()
    monkeypatch.setattr("normfree.optim.fused.library", lambda: None)
    assert FusedUpdate.create(optimizer, model=model, ema=ema) is None


def test_a_sparse_gradient_is_an_error() -> None:
    model, optimizer, ema = make()
    model.head.weight.grad = torch.zeros(3, 10).to_sparse()
    message = "the gradient of 'head.weight' is sparse. Allowed: dense gradients."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        FusedUpdate(optimizer, model=model, ema=ema).step()
