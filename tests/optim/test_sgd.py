"""Tests of SGD: it equals the formula and torch, and continues exactly from a saved state."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from normfree.optim.sgd import SGD


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))


def set_grads_(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_equals_the_formula_in_float64(fused: bool | None, momentum: float, nesterov: bool) -> None:
    p = nn.Parameter(torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = SGD([p], 0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01, fused=fused)
    value, buffer = p.detach().clone(), torch.zeros(5, 4, dtype=torch.float64)
    for step in range(5):
        raw = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        p.grad = raw.clone()
        optimizer.step()
        g = raw + 0.01 * value
        buffer = momentum * buffer + g
        value = value - 0.1 * (g + momentum * buffer if nesterov else buffer)
        torch.testing.assert_close(p.detach(), value, rtol=1e-13, atol=1e-15)
        assert torch.equal(p.grad, raw)


@pytest.mark.parametrize("fused", [True, False])
def test_same_bits_as_torch(fused: bool) -> None:
    one, two = net(), net()
    ours = SGD(one.named_parameters(), 0.1, weight_decay=0.02, fused=None if fused else False)
    torchs = torch.optim.SGD(
        two.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.02, fused=fused, foreach=False
    )
    for step in range(4):
        for model in (one, two):
            set_grads_(model, step)
        ours.step()
        torchs.step()
        for a, b in zip(weights(one), weights(two), strict=True):
            assert torch.equal(a, b)


def test_a_gradient_in_another_memory_format_updates_the_right_weights() -> None:
    one, two = net(), net()
    two[0].to(memory_format=torch.channels_last)
    optimizers = [SGD(m.named_parameters(), 0.1) for m in (one, two)]
    for step in range(3):
        for model, optimizer in zip((one, two), optimizers, strict=True):
            set_grads_(model, step)  # contiguous, unlike the weights of the second
            optimizer.step()
        if step == 1:  # from here on the momentum differs too
            two[0].to(memory_format=torch.contiguous_format)
    assert torch.equal(one[0].weight, two[0].weight)
    # The momentum is stored in the format of its parameter; otherwise no later step could use the fused kernel.
    assert optimizers[1].named_state()["0.weight"].stride() == two[0].weight.stride()


def test_weights_with_gaps_in_memory_are_updated_in_place() -> None:
    storage = torch.arange(24.0).reshape(4, 6)
    p = nn.Parameter(storage[:, ::2])
    p.grad = torch.ones(4, 3)
    optimizer = SGD([p], 0.5, momentum=0.9, nesterov=True)
    optimizer.step()
    optimizer.step()
    # g + 0.9 m with m = 1, then 1.9: 0.5 * (1.9 + 2.71) = 2.305
    torch.testing.assert_close(storage[:, ::2], torch.arange(24.0).reshape(4, 6)[:, ::2] - 2.305)
    assert torch.equal(storage[:, 1::2], torch.arange(24.0).reshape(4, 6)[:, 1::2])


def test_a_parameter_whose_first_gradient_comes_later_starts_its_own_momentum() -> None:
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SGD([early, late], 1.0, momentum=0.5, nesterov=False)
    early.grad = torch.ones(2)
    optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    assert late.tolist() == [-1.0, -1.0]
    assert early.tolist() == [-2.5, -2.5]


@pytest.mark.parametrize("saved_at", [0, 2])
def test_named_state_continues_bit_for_bit(saved_at: int) -> None:
    one = net()
    first = SGD(one.named_parameters(), 0.1, weight_decay=0.01)
    for step in range(saved_at):
        set_grads_(one, step)
        first.step()
    saved = {name: tensor.clone() for name, tensor in first.named_state().items()}
    assert list(saved) == [name for name, _ in one.named_parameters()]
    two = net(seed=1)
    two.load_state_dict(one.state_dict())
    second = SGD(two.named_parameters(), 0.1, weight_decay=0.01)
    second.load_named_state(saved)
    for step in range(saved_at, saved_at + 3):
        for model, optimizer in ((one, first), (two, second)):
            set_grads_(model, step)
            optimizer.step()
        for a, b in zip(weights(one), weights(two), strict=True):
            assert torch.equal(a, b)


def test_state_does_not_depend_on_the_order_of_groups() -> None:
    model = net()
    optimizer = SGD(model.named_parameters(), 0.1)
    set_grads_(model, 0)
    optimizer.step()
    pairs = list(model.named_parameters())
    other = SGD([{"params": pairs[2:]}, {"params": pairs[:2]}], 0.1)
    other.load_named_state(optimizer.named_state())
    for name, p in pairs:
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.named_state()[name])


def test_set_lr_applies_the_multiplier_of_each_group() -> None:
    groups = [
        {"params": [("a", nn.Parameter(torch.zeros(1)))], "lr_multiplier": 0.25},
        {"params": [("b", nn.Parameter(torch.zeros(1)))]},
    ]
    optimizer = SGD(groups, 0.8)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.8]
    optimizer.set_lr(0.4)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.4]
    assert "lr" not in groups[0]


def test_closure_is_evaluated_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([p], 0.5, momentum=0.0, nesterov=False)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 4.0
    assert p.tolist() == [0.0]


def test_hooks_run_once_per_step() -> None:
    p = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([p], 0.1)
    optimizer, calls = SGD([p], 0.1), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    p.grad = torch.ones(1)
    optimizer.step()
    assert calls == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0. Allowed: 0 or more. Fix: pass lr=0.0."),
        ({"lr": 1.0, "momentum": -0.5}, "momentum is -0.5. Allowed: 0 or more. Fix: pass momentum=0.0."),
        (
            {"lr": 1.0, "momentum": 0.0},
            "nesterov is True with momentum 0. Allowed: momentum above 0. Fix: pass nesterov=False.",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SGD([nn.Parameter(torch.zeros(1))], **arguments)


def test_errors_about_groups_names_and_sparse_gradients() -> None:
    p = nn.Parameter(torch.zeros(1))
    message = (
        "a parameter group has lr 0.5. Allowed: lr_multiplier, a factor on the learning rate 1.0 of the optimizer. "
        "Fix: replace lr by lr_multiplier."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SGD([{"params": [p], "lr": 0.5}], 1.0)
    message = (
        "this optimizer was built from tensors without names. Allowed: named parameters, whose names are the keys of "
        "the state. Fix: build it from model.named_parameters() or parameter_groups(model, ...)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SGD([p], 1.0).named_state()
    twins = SGD([("a", p), ("a", nn.Parameter(torch.zeros(1)))], 1.0)
    with pytest.raises(ValueError, match=r"^two parameters have the name 'a'\. Allowed: unique names\. "):
        twins.named_state()
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    message = "a gradient is sparse. Allowed: dense gradients. Fix: build the layer with sparse=False."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SGD(table.parameters(), 1.0).step()


def test_state_that_does_not_fit_changes_nothing() -> None:
    optimizer = SGD(net().named_parameters(), 0.1)
    state = {name: tensor + 1.0 for name, tensor in optimizer.named_state().items()}
    del state["0.bias"]
    message = (
        "the saved tensors do not fit the momentum of this optimizer (missing: '0.bias'). Allowed: exactly its 4 names "
        "and shapes. Fix: load tensors saved from the same network."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.load_named_state(state)
    assert all(float(t.abs().sum()) == 0.0 for t in optimizer.named_state().values())
