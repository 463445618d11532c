"""Signal propagation: numbers of the reference code, predictions, networks of other libraries, and no side effects."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.diagnose.propagation import predicted_signal, signal_propagation
from normfree.diagnose.residuals import channel_moments, moments
from normfree.models.variant import Variant
from normfree.models.variants import variant_of
from normfree.models.zoo import create_model
from normfree.weights.names import state_dict_from_haiku

REFERENCE = Path(__file__).parent.parent / "reference" / "nfnet_tiny.npz"
TINY = {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8, "num_classes": 10}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_reference_code_measures_the_same() -> None:
    """All 20 numbers of `signal_metrics` of the released code agree, with open skip gains and gates."""
    data = np.load(REFERENCE)
    tree: dict = {}
    for key in (k for k in data if k.startswith("param|")):
        _, module, name = key.split("|")
        tree.setdefault(module, {})[name] = data[key]
    net = create_model("nfnet_f0", **TINY)
    net.load_state_dict(state_dict_from_haiku(tree))
    images = torch.from_numpy(np.ascontiguousarray(data["input"].transpose(0, 3, 1, 2)))
    report = signal_propagation(net, images)
    got = {"avg_sq_mean_0": report.stem.squared_mean, "avg_var_0": report.stem.variance}
    for i, block in enumerate(report.blocks):
        got |= {f"avg_sq_mean_{i + 1}": block.squared_mean, f"avg_var_{i + 1}": block.variance}
        got[f"res_avg_var_{i}"] = block.branch_variance
    expected = {k.removeprefix("metric|"): float(data[k]) for k in data if k.startswith("metric|")}
    assert len(expected) == 20
    assert got == pytest.approx(expected, rel=1e-5)


def test_moments_follow_their_definitions() -> None:
    x = torch.randn(5, 7, 3, 4) * torch.rand(7, 1, 1) + torch.randn(7, 1, 1)
    array = x.double().numpy()
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    flat = array.reshape(5, -1)
    cosines = [flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j]) for i, j in pairs]
    got = moments(x)
    assert got.squared_mean == pytest.approx((array.mean((0, 2, 3)) ** 2).mean(), rel=1e-5)
    assert got.variance == pytest.approx(array.var((0, 2, 3)).mean(), rel=1e-5)
    assert got.cosine == pytest.approx(np.mean(cosines), rel=1e-4)
    # B N C
    tokens = x.flatten(2).transpose(1, 2)
    assert channel_moments(tokens) == pytest.approx(channel_moments(x), rel=1e-5)
    assert math.isnan(moments(x[:1]).cosine)


@pytest.mark.parametrize("name", ["nf_resnet50", "resnet50"])
def test_a_small_network_follows_the_prediction(name: str) -> None:
    """Measured and predicted statistics agree for a network that is wide enough for the law of large numbers.

    Zero padding lowers the variance of branches on small maps, so the tolerance for branches is larger. The variance
    of the stream is within 10 %, as specified for the plots.
    """
    overrides = {"depths": (2, 3), "widths": (256, 512), "strides": (1, 2), "bottleneck_ratio": 0.5}
    if name.startswith("nf"):
        overrides["skip_gain"] = 1.0
    net = create_model(name, **overrides)
    report = signal_propagation(net, torch.randn(8, 3, 64, 64))
    assert report.batch_statistics is not name.startswith("nf")
    assert [(b.stage, b.index) for b in report.blocks] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]
    assert [b.module for b in report.stages[1]] == ["stages.1.0", "stages.1.1", "stages.1.2"]
    for block in report.blocks:
        assert block.variance == pytest.approx(block.predicted.variance, rel=0.1)
        assert block.branch_variance == pytest.approx(block.predicted.branch_variance, rel=0.15)
        assert block.squared_mean == pytest.approx(block.predicted.squared_mean, rel=0.25, abs=0.02)
        # Images have the channel means in common: their cosine is the fraction of the means in the second moment.
        second = block.squared_mean + block.variance
        assert block.cosine == pytest.approx(block.squared_mean / second, abs=0.05)


@pytest.mark.slow
def test_nf_resnet50_at_224_px_follows_the_prediction() -> None:
    report = signal_propagation(create_model("nf_resnet50", skip_gain=1.0), torch.randn(16, 3, 224, 224))
    assert [len(stage) for stage in report.stages] == [3, 4, 6, 3]
    for block in report.blocks:
        assert block.variance == pytest.approx(1 + 0.04 * block.index, rel=0.1)
        assert block.squared_mean < 0.03


def test_average_pooling_of_noise_lowers_the_variance_of_nfnets() -> None:
    """The mean of four independent pixels has a quarter of their variance, which β does not account for."""
    overrides = {
        "depths": (1, 1),
        "widths": (128, 256),
        "strides": (1, 2),
        "group_width": 64,
        "skip_gain": 0.0,
    }
    images = torch.randn(8, 3, 64, 64)
    pooled = signal_propagation(create_model("nfnet_f0", **overrides), images).blocks
    strided = signal_propagation(create_model("nfnet_f0", shortcut="strided", **overrides), images).blocks
    assert pooled[1].variance / pooled[0].variance == pytest.approx(0.25, rel=0.15)
    assert strided[1].variance / strided[0].variance == pytest.approx(1.0, rel=0.15)


def test_the_branch_variance_of_closed_branches_is_measured_before_the_skip_gain() -> None:
    torch.manual_seed(1)
    closed = create_model("nfnet_f0", **TINY)
    opened = copy.deepcopy(closed)
    for name, p in opened.named_parameters():
        if name.endswith("skip_gain"):
            p.data.fill_(0.5)
    images = torch.randn(4, 3, 32, 32)
    first, second = (signal_propagation(net, images).blocks[0] for net in (closed, opened))
    assert first.branch_variance == pytest.approx(second.branch_variance, rel=1e-5)
    assert first.branch_variance > 0.1
    assert first.variance != second.variance


def test_predictions() -> None:
    variant = variant_of("nfnet_f0")
    assert predicted_signal(variant, index=3).variance == pytest.approx(1.12)
    twin = predicted_signal(variant_of("resnet50"), index=2)
    assert (twin.variance, twin.squared_mean, twin.branch_variance) == pytest.approx(
        (3 * (1 - 1 / math.pi), 3 / math.pi, 1 - 1 / math.pi)
    )
    assert predicted_signal(variant_of("bn_nfnet_f0"), index=1) is None
    assert isinstance(variant, Variant)


# --- networks of other libraries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name", "first", "lengths"),
    [
        ("torchvision", "resnet18", "layer1.0", [2, 2, 2, 2]),
        ("torchvision", "regnet_y_400mf", "trunk_output.block1.block1-0", [1, 3, 6, 6]),
        # Inverted residuals: the first block of a stage has no shortcut, so it is not a residual block.
        ("torchvision", "mobilenet_v2", "features.3", [1, 2, 3, 2, 2]),
        ("timm", "efficientnet_lite0", "blocks.1.1", [1, 1, 2, 2, 3]),
        ("timm", "resnetv2_50", "stages.0.blocks.0", [3, 4, 6, 3]),
        ("timm", "test_nfnet", "stages.0.0", [1, 1, 1, 1]),
    ],
)
def test_networks_of_other_libraries(library: str, name: str, first: str, lengths: list[int]) -> None:
    if library == "timm":
        net = pytest.importorskip("timm").create_model(name)
    else:
        net = pytest.importorskip("torchvision").models.get_model(name)
    report = signal_propagation(net, torch.randn(2, 3, 64, 64))
    assert report.blocks[0].module == first
    assert [len(stage) for stage in report.stages] == lengths
    assert all(b.predicted is None and b.variance > 0 for b in report.blocks)


def test_branches_after_batch_norm_have_unit_variance() -> None:
    report = signal_propagation(
        pytest.importorskip("torchvision").models.resnet18(), torch.randn(4, 3, 64, 64)
    )
    assert [b.branch_variance for b in report.blocks] == pytest.approx([1.0] * 8, rel=1e-3)


class Add(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class Blocks(nn.Module):
    """A residual addition in one of several common spellings; the branch is always `conv` of the input."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 3, 1, bias=False)
        self.gain = nn.Parameter(torch.zeros(()))
        self.add = Add()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        r = self.conv(x)
        if self.how == "swapped":
            return r + x
        if self.how == "in place":
            r += x
            return r
        if self.how == "torch.add":
            return torch.add(x, r, alpha=0.5)
        if self.how == "zero gain":
            return x + self.gain * r
        if self.how == "zero gain in place":
            return x + r.mul_(self.gain)
        if self.how == "own module":
            return self.add(x, r)
        # The operands of the inner sums are equally far from the images, so only the last sum is a block.
        if self.how == "gelu":
            a = r + 0.044715 * r**3
            return x + (a - 0.044715 * r**3)
        raise AssertionError(self.how)


@pytest.mark.parametrize(
    "how",
    ["swapped", "in place", "torch.add", "zero gain", "zero gain in place", "own module", "gelu"],
)
def test_residual_additions_are_found_in_every_spelling(how: str) -> None:
    block = Blocks(how)
    model = nn.Sequential(nn.Identity(), block)
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        branch = F.conv2d(images, block.conv.weight)
        output = model(images.clone())
    report = signal_propagation(model, images)
    (found,) = report.blocks
    assert (found.module, found.shape) == ("1", (4, 3, 8, 8))
    assert found.branch_variance == pytest.approx(channel_moments(branch)[1], rel=1e-5)
    assert (found.squared_mean, found.variance) == pytest.approx(channel_moments(output), rel=1e-5)
    assert report.stem == moments(images)


def test_networks_without_residual_blocks_are_refused_and_can_be_measured_by_module_names() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten())
    images = torch.randn(4, 3, 16, 16)
    with pytest.raises(ValueError, match=r"Sequential has no residual block: .* blocks=\[\.\.\.\]"):
        signal_propagation(net, images)
    report = signal_propagation(net, images, blocks=["0", "2", "3"])
    assert [(b.module, b.stage, b.index) for b in report.blocks] == [("0", 0, 1), ("2", 1, 1), ("3", 2, 1)]
    with torch.no_grad():
        assert (report.blocks[1].squared_mean, report.blocks[1].variance) == channel_moments(net[:3](images))
    assert report.blocks[0].branch_variance is None
    assert report.stem == moments(images)
    with pytest.raises(ValueError, match=r"blocks: Sequential has no module 'O'\. Allowed: the names of"):
        signal_propagation(net, images, blocks=["O"])
    with pytest.raises(ValueError, match=r"blocks: the output of '4' is not an activation map"):
        signal_propagation(net, images, blocks=["4"])
    assert hooks(net) == 0


def test_the_network_is_left_unchanged() -> None:
    net = create_model("resnet_nano", num_classes=3).train()
    net.stages[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    signal_propagation(net, torch.randn(2, 3, 32, 32))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert hooks(net) == 0
    assert all(p.grad is None for p in net.parameters())


def test_trained_batch_norms_use_their_running_statistics() -> None:
    net = create_model("resnet_nano", num_classes=3).train()
    net(torch.randn(4, 3, 32, 32))
    images = torch.randn(4, 3, 32, 32)
    report = signal_propagation(net, images)
    assert not report.batch_statistics
    outputs = []
    handle = net.stages[2][1].register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad():
        net.eval()(images)
    handle.remove()
    last = report.blocks[-1]
    assert (last.squared_mean, last.variance) == pytest.approx(channel_moments(outputs[0]), rel=1e-5)
