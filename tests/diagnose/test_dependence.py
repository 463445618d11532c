"""Dependence on the batch: exactly 0 for normalizer-free networks, found and located in other networks."""

import pytest
import torch
from torch import nn

from normfree.diagnose.dependence import batch_dependence
from normfree.models.zoo import create_model

SMALL = {"widths": (32, 64), "depths": (1, 2), "strides": (1, 2)}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("nfnet_f0", {**SMALL, "group_width": 8, "drop_rate": 0.5, "stochdepth_rate": 0.5}),
        ("nf_resnet50", SMALL),
        ("nf_regnet_b0", {**SMALL, "group_width": 8}),
        ("timm_eca_nfnet_l0", {**SMALL, "group_width": 8}),
    ],
)
def test_normalizer_free_networks_are_functions_of_one_image(name: str, overrides: dict) -> None:
    """Outputs and gradients do not change by a single bit, with active dropout and stochastic depth."""
    net = create_model(name, num_classes=5, skip_gain=1.0, **overrides)
    report = batch_dependence(net, torch.randn(4, 3, 32, 32))
    for mode in (report.train, report.eval):
        assert (mode.output, mode.gradient, mode.leak, mode.guilty) == (0.0, 0.0, 0.0, ())
    assert not report.depends


def test_batch_norm_depends_on_the_batch_in_training_only() -> None:
    net = create_model("resnet_nano", num_classes=5)
    report = batch_dependence(net, torch.randn(4, 3, 32, 32))
    assert min(report.train.output, report.train.gradient, report.train.leak) > 0.01
    norms = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert set(report.train.guilty) == norms
    assert not report.eval.depends
    assert report.eval.guilty == ()


class Mixed(nn.Module):
    """A network that uses other examples of the batch in the way that `how` selects."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.how == "mean":
            x = x - x.mean(0, keepdim=True)
        # This dependence has no gradient.
        if self.how == "detached":
            x = x / x.std().detach()
        # This does not affect the first example.
        if self.how == "previous":
            x = x + torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        if self.how == "norm":
            x = self.norm(x)
        x = self.head(x.mean((2, 3)))
        return x.softmax(0) if self.how == "end" else x.softmax(1)


@pytest.mark.parametrize(
    ("how", "guilty"),
    [("none", ()), ("mean", ("1",)), ("detached", ("1",)), ("previous", ("1",)), ("norm", ("1.norm",)),
     ("end", ("1",))],
)  # fmt: skip
def test_the_guilty_module_is_named(how: str, guilty: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Identity(), Mixed(how))
    report = batch_dependence(model, torch.randn(3, 3, 8, 8))
    assert report.train.guilty == guilty
    assert report.train.depends is bool(guilty)
    assert report.eval.guilty == (() if how == "norm" else guilty)
    if how == "detached":
        assert report.train.leak == 0.0
        assert report.train.output > 0.01


def test_each_module_is_tested_independently() -> None:
    """A norm is found after another norm, and after a mean in the network's own forward."""

    class Two(Mixed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            return self.head((x - x.mean(0)).mean((2, 3)))

    model = nn.Sequential(nn.BatchNorm2d(3), Two("none"))
    assert batch_dependence(model, torch.randn(3, 3, 8, 8)).train.guilty == ("0", "1", "1.norm")
    assert batch_dependence(Two("none"), torch.randn(3, 3, 8, 8)).train.guilty == ("", "norm")


def test_a_network_that_returns_nan_counts_as_dependent() -> None:
    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1)) * float("nan")

    assert batch_dependence(Broken(12, 2), torch.randn(2, 3, 2, 2)).depends


def test_the_network_is_left_unchanged() -> None:
    net = create_model("resnet_nano", num_classes=3).train()
    net.stages[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    images = torch.randn(2, 3, 32, 32)
    kept = images.clone()
    torch.set_rng_state(state)
    batch_dependence(net, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_invalid_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"images has 1 image\(s\)\. Allowed: 2 or more\. Fix: pass a batch of at least two"
    ):
        batch_dependence(nn.Flatten(), torch.randn(1, 3, 8, 8))

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    with pytest.raises(
        ValueError, match=r"Sum returned no tensor whose first dimension is the batch of 2\. Allowed: "
    ):
        batch_dependence(Sum(), torch.randn(2, 3, 8, 8))
