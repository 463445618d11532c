"""The gradient report predicts what clipping then does."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.diagnose.gradients import (
    CLIPPINGS,
    QUANTILES,
    SHARE,
    gradient_report,
    ratio_quantiles,
    recommended_clipping,
    stage_of,
)
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.groups import parameter_groups


def backward(net: nn.Module, *, scale: float = 1.0) -> None:
    (scale * F.cross_entropy(net(torch.randn(8, 3, 32, 32)), torch.arange(8) % 4)).backward()


@pytest.fixture
def net() -> Net:
    net = create_model("nf_resnet_nano", num_classes=4)
    # With this scale, each λ of `CLIPPINGS` clips some units and not others.
    backward(net, scale=30.0)
    return net


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_the_clipped_fraction_is_what_clipping_reports(net: Net, clipping: float) -> None:
    report = gradient_report(net)
    groups = parameter_groups(net, weight_decay=0.0, clipping=clipping)
    by_groups = gradient_report(groups)
    clipped = adaptive_clip_grad_(groups)
    assert report.ratios().numel() == by_groups.ratios().numel() == clipped.units
    assert 0 < float(clipped) < 1
    assert report.clipped(clipping) == by_groups.clipped(clipping) == pytest.approx(float(clipped), abs=1e-6)


def test_ratios_are_gradient_norm_over_weight_norm_or_eps(net: Net) -> None:
    report = gradient_report(net, eps=1e-3)
    layers = {layer.name: layer for layer in report.layers}
    conv = net.stages[1][0].conv1
    expected = conv.weight.grad.flatten(1).norm(dim=1) / conv.weight.detach().flatten(1).norm(dim=1)
    assert torch.allclose(layers["stages.1.0.conv1.weight"].ratios, expected)
    # The bias is 0, so eps is the denominator.
    bias = layers["stages.1.0.conv1.bias"]
    assert (bias.units, bias.tiny, bias.exploding) == (1, 1, 0)
    assert float(bias.ratios) == pytest.approx(float(conv.bias.grad.norm()) / 1e-3)
    head = layers["head.weight"]
    assert head.exempt
    assert head.clipped(0.0) == 0.0
    assert list(report.stages) == ["stem", "stages.0", "stages.1", "stages.2", "head"]


def test_dead_exploding_and_missing_gradients() -> None:
    net = create_model("nf_resnet_nano", num_classes=4, skip_gain=0.0)
    net.stem.conv0.weight.requires_grad_(False)
    backward(net)
    report = gradient_report(net)
    layers = {layer.name: layer for layer in report.layers}
    assert "stem.conv0.weight" not in layers
    # The skip gain is 0, so no gradient reaches the branch.
    assert layers["stages.0.0.conv1.weight"].dead == layers["stages.0.0.conv1.weight"].units
    assert layers["stages.0.0.conv_shortcut.weight"].dead == 0
    assert sum(layer.exploding for layer in report.layers) == 0
    net.stages[0][0].conv_shortcut.weight.grad[3] *= 1e6
    net.stages[0][0].conv_shortcut.weight.grad[5, 0] = float("nan")
    net.head.bias.grad = None
    report = gradient_report(net)
    assert {layer.name: layer.exploding for layer in report.layers if layer.exploding} == {
        "stages.0.0.conv_shortcut.weight": 2
    }
    assert report.missing == ("head.bias",)
    with pytest.raises(
        ValueError,
        match=r"no parameter has a gradient\. Fix: call it after loss\.backward\(\) and before zero_grad\(\)\.",
    ):
        gradient_report(nn.Linear(2, 2))


def test_the_recommended_clipping_clips_the_intended_fraction(net: Net) -> None:
    report = gradient_report(net)
    alive = int((report.ratios() > 0).sum())
    groups = parameter_groups(net, weight_decay=0.0, clipping=report.recommended)
    clipped = adaptive_clip_grad_(groups)
    assert float(clipped) * clipped.units / alive == pytest.approx(SHARE, abs=2 / alive)
    assert math.isnan(gradient_report([{"params": [*zero_gradient()]}]).recommended)


def zero_gradient() -> Iterator[nn.Parameter]:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.zeros(3, 2)
    yield parameter


def test_samples_of_a_run(net: Net) -> None:
    groups = parameter_groups(net, weight_decay=0.0, clipping=0.01)
    kept = [p.grad.clone() for p in net.parameters()]
    sample = ratio_quantiles(groups)
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, net.parameters(), strict=True))
    report = gradient_report(groups)
    alive = torch.sort(report.ratios()[report.ratios() > 0]).values
    assert sample["all"] == pytest.approx([float(alive[int(q * len(alive))]) for q in QUANTILES], rel=1e-2)
    assert list(sample) == ["all", "stem", "stages.0", "stages.1", "stages.2", "head"]
    # Only the bias, because the weight is exempt.
    assert len(sample["head"]) == 3
    assert json.loads(json.dumps(sample)) == sample
    assert ratio_quantiles(nn.Linear(2, 2)) == {}


def test_the_recommendation_of_a_run_is_the_median_sample_after_warm_up() -> None:
    samples = [{"all": [0.0, 0.0, x / 100]} for x in [100, 100, *range(1, 19)]]
    assert recommended_clipping(samples) == 0.1
    assert math.isnan(recommended_clipping([]))
    assert math.isnan(recommended_clipping(samples[:9]))
    assert math.isnan(recommended_clipping([*samples, {"all": [0.0, 0.0, math.inf]}]))


def test_no_clipping_is_recommended_where_gradients_are_larger_than_weights(net: Net) -> None:
    assert math.isnan(recommended_clipping([{"all": [0.0, 0.0, 1.5e6]}] * 20))
    for p in net.parameters():
        p.grad *= 1e6
    assert math.isnan(gradient_report(net).recommended)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("stages.2.0.conv1.weight", "stages.2"),
        ("layer1.0.conv1.weight", "layer1"),
        ("features.3.1.block.0.weight", "features.3"),
        ("head.weight", "head"),
        ("skip_gain", "skip_gain"),
    ],
)
def test_the_stage_of_a_parameter_is_derived_from_its_name(name: str, stage: str) -> None:
    assert stage_of(name) == stage
