"""Architectures rewritten as normalizer-free ones have the predicted variances."""

import contextlib
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from normfree.models.activations import gain_of
from normfree.models.net import expected_betas
from normfree.optim.groups import parameter_groups
from normfree.surgery.batchnorm import batchnorms
from normfree.surgery.conversion_report import ConvertReport
from normfree.surgery.convert import convert_batchnorm
from normfree.surgery.scratch import SkipGain
from normfree.surgery.standardized_conv import Standardized
from normfree.surgery.trace import NotTraceableError, trace


class Block(nn.Module):
    """A residual block as a user may write it: pre-activation or post-activation, with or without a gate."""

    def __init__(
        self,
        width: int,
        out: int,
        *,
        stride: int = 1,
        pre: bool = True,
        gate: bool = False,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pre, self.gate = pre, gate
        self.act = nn.ReLU(inplace=True) if act is None else act
        self.norm0, self.norm1 = nn.BatchNorm2d(width if pre else out), nn.BatchNorm2d(out)
        self.conv0 = nn.Conv2d(width, out, 3, padding=1, bias=False, stride=stride)
        self.conv1 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.project = (
            nn.Conv2d(width, out, 1, stride=stride) if stride > 1 or width != out else nn.Identity()
        )
        if gate:
            self.fc0, self.fc1 = nn.Linear(out, 8), nn.Linear(8, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre:
            a = self.act(self.norm0(x))
            x = x if isinstance(self.project, nn.Identity) else self.project(a)
            r = self.conv1(self.act(self.norm1(self.conv0(a))))
        else:
            r = self.norm1(self.conv1(self.act(self.norm0(self.conv0(x)))))
            x = self.project(x)
        if self.gate:
            g = torch.sigmoid(self.fc1(F.relu(self.fc0(r.mean((2, 3))))))
            r = r * g[:, :, None, None]
        x = x + r
        return x if self.pre else self.act(x)


def network(**kwargs: Any) -> nn.Module:
    """Return a network with two stages of three blocks."""
    torch.manual_seed(0)
    blocks = [Block(32, 64, **kwargs), *(Block(64, 64, **kwargs) for _ in range(2))]
    blocks += [Block(64, 128, stride=2, **kwargs), *(Block(128, 128, **kwargs) for _ in range(2))]
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), *blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5)
    )  # fmt: skip


class Recorder(fx.Interpreter):
    """Average channel variance, by name, of the output of every convolution and of every sum with a skip gain."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module.eval())
        self.found = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        for name in [str(n.target), *(str(i.target) for i in n.all_input_nodes)]:
            conv, gained = n.op == "call_module" and name == str(n.target), name.startswith("skip_gains")
            if isinstance(out, torch.Tensor) and (conv != gained) and out.dim() == 4:
                self.found[name] = float(out.detach().var((0, 2, 3), correction=0).mean())
        return out


def measured(net: fx.GraphModule, images: torch.Tensor) -> dict[str, float]:
    recorder = Recorder(net)
    with torch.no_grad():
        recorder.run(images)
    return recorder.found


def worst(net: fx.GraphModule, report: ConvertReport, images: torch.Tensor, kind: str) -> float:
    """Return the largest |log(measured / predicted variance)| of all layers with one kind of change."""
    found = measured(net, images)
    return max(
        abs(math.log(found[c.layer] / c.variance)) for c in report.layers if c.change == kind
    )  # fmt: skip


NETWORKS = {
    "pre-activation": network,
    "post-activation": lambda: network(pre=False),
    "gated": lambda: network(gate=True),
    "silu": lambda: network(act=nn.SiLU()),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_variance_follows_the_prediction(name: str) -> None:
    """With Gaussian images and open branches, the variance after every sum is within 15 % of the prediction.

    The prediction uses no images. The tolerance for ResNet-18 is 25 %, because its 4 x 4 maps are largely padding.
    """
    converted, report = convert_batchnorm(NETWORKS[name](), how="scratch", skip_gain=1.0)
    images = torch.randn(2, 3, *((128, 128) if name == "resnet18" else (32, 32)))
    assert worst(converted, report, images, "skip gain") < (0.25 if name == "resnet18" else 0.15)
    assert not batchnorms(converted)
    sums = [m for m in converted.modules() if isinstance(m, SkipGain)]
    assert len(sums) == report.counts["skip gain"] == (8 if name == "resnet18" else 6)
    assert report.counts["gate doubled"] == (6 if name == "gated" else 0)


def test_images_correct_the_gains_where_neighboring_pixels_are_similar() -> None:
    """Depthwise filters of mean zero have a low output on smooth images; calibration corrects every layer."""
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=5)
    images = F.avg_pool2d(torch.randn(8, 3, 70, 70), 7, stride=1)
    smooth, report = convert_batchnorm(net, images, how="scratch", skip_gain=1.0)
    assert worst(smooth, report, images, "standardized") < 1e-4
    blind, report = convert_batchnorm(net, how="scratch", skip_gain=1.0)
    assert worst(blind, report, images, "standardized") > 0.5


def test_the_constants_are_those_of_the_paper() -> None:
    """In a pre-activation network they are γ / sqrt(1 + kα²) for layers that read the stream, and γ in the branch."""
    _, report = convert_batchnorm(network(), how="scratch", alpha=0.3)
    gamma = gain_of(F.relu)
    betas = [b for stage in expected_betas((3, 3), 0.3) for b in stage]
    # The first block reads the output of the stem.
    betas[0] = 1.0
    scales = {c.layer: c.input_scale for c in report.layers if c.change == "standardized"}
    assert scales["0"] == pytest.approx(1.0, rel=1e-6)
    for block, beta in enumerate(betas, start=1):
        assert scales[f"{block}.conv0"] == pytest.approx(beta * gamma, rel=0.02)
        assert scales[f"{block}.conv1"] == pytest.approx(gamma, rel=0.02)
    for block in (1, 4):
        assert scales[f"{block}.project"] == scales[f"{block}.conv0"]
    variances = [c.variance for c in report.layers if c.change == "skip gain"]
    assert variances == pytest.approx([1 + k * 0.09 for k in (1, 2, 3)] * 2, rel=0.02)


@pytest.mark.parametrize("pre", [True, False])
def test_the_rewritten_block_computes_the_formula(pre: bool) -> None:
    """The rewritten block equals the formula computed by hand from its parameters."""
    torch.manual_seed(0)
    net = Block(8, 8, pre=pre, gate=True).double()
    converted, report = convert_batchnorm(net, how="scratch", alpha=0.5, skip_gain=0.7)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    kept = x.clone()
    conv0, conv1 = converted.conv0, converted.conv1
    r = conv1(F.relu(conv0(F.relu(x) if pre else x)))
    g = torch.sigmoid(converted.fc1(F.relu(converted.fc0(r.mean((2, 3))))))[:, :, None, None]
    expected = x + 0.5 * 0.7 * 2 * g * r
    torch.testing.assert_close(converted(x), expected if pre else F.relu(expected))
    # The in-place activation, which had a norm before it, does not overwrite the input.
    assert torch.equal(x, kept)
    assert [c.change for c in report.layers] == [
        "standardized", "standardized", "gate doubled", "skip gain", "removed", "removed",
    ]  # fmt: skip
    scale = converted.conv1.input_scale
    weight = conv1.standardized_weight().flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(weight.norm(dim=1), torch.full((8,), scale, dtype=torch.float64))


def test_branches_start_closed_and_their_skip_gains_get_gradients() -> None:
    net = network(gate=True)
    converted, _ = convert_batchnorm(net, how="scratch")
    images = torch.randn(2, 3, 16, 16)
    out = converted(images)
    out.square().sum().backward()
    gains = {n: p for n, p in converted.named_parameters() if n.endswith("skip_gain")}
    assert len(gains) == 6
    assert all(p.item() == 0 and p.grad != 0 for p in gains.values())
    converted.get_submodule("1.conv1").conv.weight.data.normal_()
    assert torch.equal(converted(images), out)
    groups = parameter_groups(converted, weight_decay=1.0, clipping=1.0)
    assert all(g["weight_decay"] == 0 for g in groups for n in g["param_names"] if n in gains)
    assert converted.training


def test_weights_are_new_and_deterministic_given_a_seed() -> None:
    net = network()
    one, two = [], []
    for kept in (one, two):
        torch.manual_seed(3)
        kept += [p.detach() for p in convert_batchnorm(net, how="scratch").model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    converted = convert_batchnorm(net, how="scratch").model
    assert not torch.equal(converted.get_submodule("10").weight, net[10].weight)
    convs = [m for m in converted.modules() if isinstance(m, Standardized)]
    assert all((m.gain == 1).all() and (m.conv.bias == 0).all() for m in convs)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return torch.cat([x, x], dim=1)


class Shuffling(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).permute(0, 2, 3, 1)


class Chunked(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).chunk(2, dim=1)[0]


class Sliced(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return x + x[:, :32]


class Deciding(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.norm(x) if x.mean() > 0 else x


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.conv(x)))


class Unsquashed(Stacked):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return x * x.mean((2, 3), keepdim=True)


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *layers)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Stacked(), "Stacked.cat: cat has no rule."),
        (Shuffling(), "Shuffling.permute: permute has no rule."),
        (Chunked(), "Chunked.chunk: chunk has no rule (it returns several tensors)."),
        (
            nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4)),
            "Sequential.3: batch norm of a tensor that is not a map.",
        ),
        (Sliced(), "Sliced.getitem: getitem has no rule."),
        (Twice(), "Twice.conv: this convolution is called twice."),
        (
            Unsquashed(),
            "Unsquashed.mul: a gate without a sigmoid: its mean is not known.",
        ),
        (plain(nn.GroupNorm(2, 4)), "Sequential.2: GroupNorm has no rule."),
        (plain(nn.ConvTranspose2d(4, 4, 3)), "Sequential.2: ConvTranspose2d cannot be standardized."),
        (plain(nn.Conv2d(4, 4, 1, groups=4)), "Sequential.2: Conv2d cannot be standardized."),
        (plain(nn.PixelShuffle(2)), "Sequential.2: PixelShuffle has no rule."),
        (plain(nn.Linear(30, 30)), "Sequential.2: Linear has no rule."),
    ],
)
def test_what_has_no_rule_is_refused_by_name(net: nn.Module, message: str) -> None:
    with pytest.raises(NotTraceableError) as caught:
        convert_batchnorm(net, how="scratch")
    assert str(caught.value) == message


def test_what_cannot_be_traced_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Deciding())
    with pytest.raises(
        NotTraceableError, match=r"^Sequential\.1: torch\.fx cannot trace it \(.*control flow.*\)\.$"
    ):
        convert_batchnorm(net, how="scratch")


def test_tracing_keeps_modes() -> None:
    for net in (network(), nn.Sequential(nn.ReLU(), Deciding())):
        net[1].eval()
        modes = [m.training for m in net.modules()]
        with contextlib.suppress(NotTraceableError):
            trace(net)
        assert [m.training for m in net.modules()] == modes


def test_a_norm_with_two_names_is_removed_under_both() -> None:
    norm = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), norm)
    converted, report = convert_batchnorm(net, how="scratch")
    assert not batchnorms(converted)
    assert report.counts == {"standardized": 2, "removed": 1}


def test_dropout_modules_stay_and_dropout_functions_are_reported() -> None:
    net = timm.create_model("test_resnet", num_classes=5, drop_path_rate=0.5)
    converted, _ = convert_batchnorm(net, how="scratch")
    assert sum(type(m).__name__ == "DropPath" for m in converted.modules()) == sum(
        type(m).__name__ == "DropPath" for m in net.modules()
    )

    class Dropping(Stacked):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.norm(self.conv(x)), 0.5, self.training)

    _, report = convert_batchnorm(Dropping(), how="scratch")
    assert report.kept == {"dropout": "dropout is called as a function: the traced network has no dropout"}


SLOW = {
    "torchvision": [
        "resnet50",
        "resnext50_32x4d",
        "wide_resnet50_2",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "mnasnet0_5",
    ],
    "timm": ["resnetv2_50", "seresnet50", "regnety_004", "ecaresnet26t", "mobilenetv2_100", "resnet26d"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), [(lib, n) for lib, names in SLOW.items() for n in names])
def test_published_architectures_follow_the_prediction_after_calibration(library: str, name: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)
    images = torch.randn(4, 3, 128, 128)
    converted, report = convert_batchnorm(net, images, how="scratch", skip_gain=1.0)
    assert worst(converted, report, torch.randn(4, 3, 128, 128), "skip gain") < 0.25
    assert converted(images).isfinite().all()


def test_skip_gains_have_one_entry_and_load_from_states_without_a_dimension() -> None:
    gain = SkipGain(0.2, 0.5)
    assert gain.skip_gain.shape == (1,)
    gain.load_state_dict({"skip_gain": torch.tensor(0.7)})
    assert gain.skip_gain.item() == pytest.approx(0.7)
    gain.load_state_dict({"skip_gain": torch.tensor([0.3])})
    assert gain.skip_gain.item() == pytest.approx(0.3)
