"""Tests of per-example gradients against a loop over examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.models.zoo import create_model
from normfree.optim.per_example import per_example_gradients

STILL = {"stochdepth_rate": 0.0, "drop_rate": 0.0}
NETS = [
    ("nf_resnet_nano", STILL),
    ("nfnet_f0", {**STILL, "widths": (32, 64, 96, 96), "depths": (1, 1, 1, 1), "group_width": 8}),
    ("nf_regnet_b0", {**STILL, "depths": (1, 1, 1, 1)}),
    ("timm_test_nfnet", STILL),
]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 2, 1])


@pytest.mark.parametrize(("name", "fields"), NETS, ids=[name for name, _ in NETS])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients_are_those_of_a_loop_over_examples(name, fields, chunk):
    net = create_model(name, num_classes=3, **fields).double().train()
    for parameter in net.parameters():
        if parameter.ndim <= 1:  # gains at 0 or 1 would hide branches
            nn.init.normal_(parameter, 1.0, 0.1)
    images, targets = batch()
    found = per_example_gradients(net, images, targets, chunk=chunk)
    assert all(p.grad is None for p in net.parameters())
    for i in range(3):
        net.zero_grad()
        F.cross_entropy(net(images[i : i + 1]), targets[i : i + 1]).backward()
        for key, parameter in net.named_parameters():
            error = (found[key][i] - parameter.grad).abs().max()
            assert error <= 1e-12 * parameter.grad.abs().max() + 1e-15, key


def test_frozen_parameters_are_left_out_and_soft_targets_are_taken():
    net = create_model("nf_resnet_nano", num_classes=3, **STILL).double().eval()
    net.stem.requires_grad_(False)
    images, targets = batch()
    found = per_example_gradients(net, images, F.one_hot(targets, 3).double())
    assert found.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, per_example_gradients(net, images, targets))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: create_model("resnet_nano", num_classes=3),
            "batch norm in training mode, or without running statistics: 'stages",
        ),
        (
            lambda: create_model("nf_resnet_nano", num_classes=3, stochdepth_rate=0.1),
            "dropout or stochastic depth",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 3)), "in training mode: '1'"),
    ],
)
def test_modules_that_mix_or_randomize_examples_are_refused_in_training_mode_only(make, message):
    net = make().double().train()
    images, targets = batch()
    with pytest.raises(ValueError, match=message):
        per_example_gradients(net, images, targets)
    assert per_example_gradients(net.eval(), images, targets)


def test_batch_norm_without_running_statistics_is_refused_in_evaluation_mode_too():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(48, 2)).eval()
    with pytest.raises(
        ValueError, match=r"^batch norm in training mode, or without running statistics: '0'\."
    ):
        per_example_gradients(net, torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))


def test_no_examples_have_no_gradients():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    found = per_example_gradients(net, torch.randn(0, 3, 4, 4), torch.zeros(0, dtype=torch.long), copies=2)
    assert {name: tuple(g.shape) for name, g in found.items()} == {"1.weight": (0, 2, 48), "1.bias": (0, 2)}


def test_as_many_targets_as_images_are_needed():
    images, targets = batch()
    with pytest.raises(ValueError, match=r"3 images and 2 targets\. Allowed: one target for each image"):
        per_example_gradients(nn.Flatten(), images, targets[:2])
