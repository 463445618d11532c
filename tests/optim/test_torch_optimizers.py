"""PyTorch's optimizers on named groups: bits equal to PyTorch alone, exact state, and Muon on filters."""

import copy

import pytest
import torch
from torch import nn

from normfree import adaptive_clip_grad_, create_model, parameter_groups
from normfree.optim.torch_optimizers import TorchOptimizer, make_optimizer, state_tensors

CLASSES = {
    "adam": (torch.optim.Adam, {"betas": (0.8, 0.95)}),
    "adamw": (torch.optim.AdamW, {"eps": 1e-6}),
    "nadam": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "radam": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
}
NAMES = [*CLASSES, "muon"]


def network() -> nn.Module:
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3, depths=(1, 1), widths=(8, 16), strides=(1, 2))
    return net.to(memory_format=torch.channels_last)


def gradients(net: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(3, (4,))
    nn.functional.cross_entropy(net(x.to(memory_format=torch.channels_last)), y).backward()


def groups_of(net: nn.Module) -> list[dict]:
    return parameter_groups(
        net, weight_decay=0.1, clipping=0.02, lr_multipliers={r"^stem\.": 0.1, r"^stages\.0": 0.5}
    )


@pytest.mark.parametrize("name", CLASSES)
def test_steps_are_those_of_torch_alone(name):
    make, options = CLASSES[name]
    ours, theirs = network(), network()
    ours_options = {k: v for k, v in options.items() if k != "decoupled_weight_decay"}
    optimizer = make_optimizer(groups_of(ours), 0.01, name=name, **ours_options)
    plain = make(
        [
            {"params": g["params"], "lr": g["lr_multiplier"], "weight_decay": g["weight_decay"]}
            for g in groups_of(theirs)
        ],
        **options,
    )
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        for net in (ours, theirs):
            gradients(net, step)
        optimizer.set_lr(lr)
        for group, own in zip(plain.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = lr * own["lr_multiplier"]
        adaptive_clip_grad_(optimizer.param_groups)
        adaptive_clip_grad_(groups_of(theirs))
        optimizer.step()
        optimizer.zero_grad()
        plain.step()
        plain.zero_grad()
    for (label, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), label


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_state_continues_bit_for_bit(name):
    def steps(net: nn.Module, optimizer: TorchOptimizer, numbers: range) -> None:
        for step in numbers:
            gradients(net, step)
            optimizer.step()
            optimizer.zero_grad()

    options = {"momentum": 0.9} if name == "rmsprop" else {}
    net = network()
    optimizer = TorchOptimizer(groups_of(net), 0.01, name=name, **options)
    steps(net, optimizer, range(2))
    saved = {k: v.clone() for k, v in optimizer.named_state().items()}
    other = copy.deepcopy(net)
    steps(net, optimizer, range(2, 4))
    resumed = TorchOptimizer(groups_of(other), 0.01, name=name, **options)
    resumed.load_named_state(saved)
    steps(other, resumed, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    for key, value in optimizer.named_state().items():
        assert torch.equal(value, resumed.named_state()[key]), key
    per_parameter = [k for k in saved if k.startswith("stages.0.0.conv1.weight.") and saved[k].ndim]
    assert 1 <= len(per_parameter) <= state_tensors(name)


def test_the_state_before_the_first_step_is_that_of_torch():
    for name in NAMES:
        net, twin = network(), network()
        lazy = TorchOptimizer(groups_of(net), 0.01, name=name)
        early = TorchOptimizer(groups_of(twin), 0.01, name=name)
        early.load_named_state({k: torch.zeros_like(v) + v for k, v in early.named_state().items()})
        for each, optimizer in ((net, lazy), (twin, early)):
            gradients(each, 0)
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_muon_moves_filters_as_matrices_and_adamw_the_rest():
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradients(net, 0)
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    groups = parameter_groups(net, weight_decay=0.0, clipping=0.02)
    TorchOptimizer(groups, 0.01, name="muon", momentum=0.0, nesterov=False).step()
    filters = [n for n, p in net.named_parameters() if p.ndim == 4]
    assert len(filters) > 4
    for name in filters:
        matrix = nn.Parameter(before[name].flatten(1).clone())  # in the order of the dimensions
        matrix.grad = grads[name].flatten(1).clone()
        torch.optim.Muon(
            [matrix], lr=0.01, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
        ).step()
        moved = dict(net.named_parameters())[name].detach() - before[name]
        # columns in another order: equal to the rounding of bfloat16, in which PyTorch orthogonalizes
        torch.testing.assert_close(
            moved.flatten(1), matrix.detach() - before[name].flatten(1), atol=2e-4, rtol=0.05
        )
    for name in ("head.weight", "head.bias", "stem.conv0.bias"):
        moved = dict(net.named_parameters())[name].detach() - before[name]
        assert torch.allclose(moved.abs()[grads[name] != 0], torch.tensor(0.01), rtol=1e-2), name


def test_clipping_sees_the_filters_of_muon():
    net = network()
    gradients(net, 0)
    optimizer = TorchOptimizer(groups_of(net), 0.01, name="muon")
    names = sorted(n for g in optimizer.param_groups for n in g["param_names"])
    assert names == sorted(n for n, _ in net.named_parameters())
    exempt = [n for g in optimizer.param_groups if not g["clipping"] for n in g["param_names"]]
    assert exempt == ["head.weight"]
    assert adaptive_clip_grad_(optimizer.param_groups, 1e-6).units > 100


def test_an_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match=r"unknown optimizer .adamx.\. Did you mean .adam."):
        make_optimizer(groups_of(network()), 0.1, name="adamx")
