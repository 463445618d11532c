"""Tests of the exponential moving average."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from normfree.optim.ema import Ema, ema_decay


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def set_all_(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_decay_ramps_up_to_its_value() -> None:
    assert [ema_decay(t) for t in (0, 1, 10)] == [1 / 10, 2 / 11, 11 / 20]
    assert ema_decay(899_989) < 0.99999 == ema_decay(899_991)
    assert ema_decay(0, decay=0.9, ramp=False) == 0.9
    assert ema_decay(10**6, decay=0.5) == 0.5


def test_average_of_a_constant_is_the_constant() -> None:
    model = net()
    average = Ema(model, decay=0.9)
    for _ in range(20):
        average.update(model)
    for name, p in model.named_parameters():
        assert torch.equal(average.module.state_dict()[name], p)


def test_closed_form_after_k_steps() -> None:
    # From 1 towards 3 with a fixed decay d: 3 - 2 d^k.
    model = net()
    set_all_(model, 1.0)
    average = Ema(model, decay=0.9, ramp=False)
    set_all_(model, 3.0)
    for _ in range(12):
        average.update(model)
    for p in average.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 3.0 - 2.0 * 0.9**12), rtol=1e-6, atol=0.0)


def test_ramp_is_applied_step_by_step() -> None:
    model = net()
    set_all_(model, 0.0)
    average = Ema(model, decay=0.99999)
    expected = 0.0
    for step in range(5):
        set_all_(model, float(step + 1))
        average.update(model)
        d = (1 + step) / (10 + step)
        expected = d * expected + (1 - d) * (step + 1)
    for p in average.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, expected), rtol=1e-6, atol=0.0)


def test_float_buffers_are_averaged_and_integers_copied() -> None:
    model = net()
    average = Ema(model, decay=0.5, ramp=False)
    model[1].running_mean.fill_(4.0)
    model[1].num_batches_tracked.fill_(7)
    average.update(model)
    assert average.module[1].running_mean.tolist() == [2.0] * 4
    assert int(average.module[1].num_batches_tracked) == 7


def test_module_evaluates_the_average_without_touching_the_model() -> None:
    model = net()
    average = Ema(model, decay=0.5, ramp=False)
    before = copy.deepcopy(model.state_dict())
    set_all_(model, 0.25)
    average.update(model)
    by_hand = net()
    by_hand.load_state_dict(
        {k: v if "num" in k else 0.5 * before[k] + 0.5 * v for k, v in model.state_dict().items()}
    )
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(average.module(images), by_hand.eval()(images))
    assert not average.module.training
    assert model.training
    assert not any(p.requires_grad for p in average.module.parameters())
    assert all(torch.equal(p, torch.full_like(p, 0.25)) for p in model.parameters())


def test_half_precision_weights_are_averaged_in_float32() -> None:
    model = net().to(torch.bfloat16)
    set_all_(model, 1.0)
    average = Ema(model, decay=0.999, ramp=False)
    set_all_(model, 2.0)
    for _ in range(10):  # each step moves by 1e-3, less than bfloat16 resolves at 1
        average.update(model)
    weight = average.module[0].weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, torch.full_like(weight, 2.0 - 0.999**10), rtol=1e-6, atol=0.0)


def test_state_round_trip_continues_bit_for_bit() -> None:
    model = net()
    one = Ema(model, decay=0.9)
    set_all_(model, 0.5)
    one.update(model)
    saved = copy.deepcopy(one.state_dict())
    assert saved["num_updates"] == 1
    assert saved["module"].keys() == model.state_dict().keys()
    two = Ema(net(), decay=0.9)
    two.load_state_dict(saved)
    for average in (one, two):
        average.update(model)  # with the decay of the second update
    assert two.num_updates == 2
    for name, tensor in one.module.state_dict().items():
        assert torch.equal(tensor, two.module.state_dict()[name])


def test_copy_to_the_model() -> None:
    model = net()
    average = Ema(model)
    start = average.module[0].weight.clone()
    set_all_(model, 9.0)
    average.copy_to(model)
    assert torch.equal(model[0].weight, start)
    set_all_(model, 9.0)
    assert torch.equal(average.module[0].weight, start)


def test_a_state_without_the_count_is_an_error() -> None:
    average = Ema(nn.Linear(2, 2))
    message = (
        "the state of the average has the entries 'weight', 'bias'. Allowed: 'module' and 'num_updates'. "
        "Fix: pass what Ema.state_dict() returned; for weights alone use ema.module.load_state_dict()."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        average.load_state_dict(nn.Linear(2, 2).state_dict())


def test_another_network_is_refused() -> None:
    average = Ema(nn.Linear(2, 2))
    message = (
        "the saved tensors do not fit the averaged network (shapes: 'weight' is (2, 3) instead of (2, 2)). "
        "Allowed: exactly its 2 names and shapes. Fix: load tensors saved from the same network."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        average.load_state_dict({"num_updates": 0, "module": nn.Linear(3, 2).state_dict()})
    with pytest.raises(ValueError, match=r"unknown: '0\.weight', '0\.bias', missing: 'weight', 'bias'"):
        average.update(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("step", "decay", "message"),
    [
        (0, 1.5, "decay is 1.5. Allowed: 0 to 1. Fix: pass decay=0.99999, the published value."),
        (-1, 0.9, "step is -1. Allowed: 0 or more. Fix: pass the number of updates so far."),
    ],
)
def test_wrong_arguments(step: int, decay: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ema_decay(step, decay=decay)
