"""`fold` on modules of other libraries and of users: equal outputs, and what it does not know stays as it is."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from normfree import WSConv2d, create_model, fold, fold_with_report
from normfree.deploy.fold_standardized import SameConv2d
from normfree.surgery.standardized_conv import Standardized


class Spectrogram(nn.Module):
    """A model that torch.fx cannot trace: a normalization with control flow, a backbone, and attention over frames."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.attention = backbone, nn.Conv1d(channels, 4, 1)
        self.classes = nn.Conv1d(channels, 4, 1)

    def forward(self, x):
        if float(x.std()) > 0:
            x = (x - x.mean()) / x.std()
        maps = self.backbone.forward_features(x).mean(dim=2)
        weights = self.attention(maps).softmax(dim=-1)
        return {"clip": (weights * self.classes(maps).sigmoid()).sum(dim=-1), "frames": self.classes(maps)}


class WeightStandardizedConv2d(nn.Conv2d):
    """The class that many diffusion repositories copy."""

    def forward(self, x):
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        var = self.weight.var(dim=(1, 2, 3), unbiased=False, keepdim=True)
        weight = (self.weight - mean) * (var + 1e-5).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def shaken(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode with open branches and random statistics."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gain", "bias")):
                parameter.uniform_(-1, 1)
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


# --- weight standardization ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2}, {"stride": 2, "groups": 4}, {"dilation": 2}, {"bias": True}]
)
@pytest.mark.parametrize("size", [(16, 16), (17, 30)])
def test_each_kind_of_timm_is_equal_bit_for_bit(kind, options, size):
    conv = shaken(kind(8, 12, 3, **options))
    folded, report = fold_with_report(nn.Sequential(conv, nn.ReLU()))
    images = torch.randn(2, 8, *size)
    assert torch.equal(folded(images), F.relu(conv(images)))
    assert (report.folded, report.left) == ({"0": "weight standardization"}, {})
    assert type(folded[0]) in (nn.Conv2d, SameConv2d)
    assert set(folded.state_dict()) <= {"0.weight", "0.bias"}
    # A module may be a convolution itself.
    assert torch.equal(fold(conv)(images), conv(images))


@pytest.mark.parametrize("name", ["test_nfnet", "bit"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_inside_of_a_model_that_cannot_be_traced(name, channels_last):
    if name == "bit":
        backbone = ResNetV2((1, 1, 1, 1), (128, 128, 256, 256), conv_layer=StdConv2d, stem_type="fixed")
    else:
        backbone = timm.create_model(name)
    model = shaken(Spectrogram(backbone, backbone.num_features)).train()
    images = torch.randn(2, 3, 40, 75)
    if channels_last:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.to(memory_format=torch.channels_last),
        )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, report = fold_with_report(model, images)
    standardized = [n for n, m in model.named_modules() if "StdConv" in type(m).__name__]
    assert list(report.folded) == standardized
    assert (report.left, report.difference, report.relative_difference) == ({}, 0.0, 0.0)
    assert not folded.training
    assert model.training
    assert not any("StdConv" in type(m).__name__ for m in folded.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    again, second = fold_with_report(folded, images)
    assert (second.folded, second.difference) == ({}, 0.0)
    assert again.state_dict().keys() == folded.state_dict().keys()


def test_our_networks_and_layers_inside_of_other_modules():
    net = shaken(create_model("nf_resnet_nano", num_classes=0))
    features = shaken(create_model("resnet_nano", features_only=True))
    other = shaken(
        nn.Sequential(WSConv2d(3, 8, stride=2), Standardized(nn.Conv2d(8, 8, 3, padding=1, groups=2)))
    )
    model = nn.ModuleDict({"net": net, "features": features, "other": other})
    folded, report = fold_with_report(model)
    images = torch.randn(2, 3, 33, 40)
    assert relative(folded["net"](images), net(images)) < 1e-5
    for ours, theirs in zip(folded["features"](images), features(images), strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(folded["other"](images), other(images)) < 1e-5
    assert torch.equal(folded["other"][1](other[0](images)), other(images))
    kept = [m for m in folded.modules() if isinstance(m, WSConv2d | Standardized | nn.BatchNorm2d)]
    assert (kept, report.left) == ([], {})
    assert "net.stem.conv0" in report.folded
    assert report.folded["features.stages.0.0.norm0"] == "batch norm"


def test_other_classes_are_folded_when_they_are_named():
    model = nn.Sequential(WeightStandardizedConv2d(3, 8, 3, padding=1, stride=2), nn.SiLU())
    images = torch.randn(2, 3, 9, 10)
    kept, report = fold_with_report(model)
    assert type(kept[0]) is WeightStandardizedConv2d
    assert (report.folded, report.left) == ({}, {"0": "its class WeightStandardizedConv2d is not known"})
    folded, report = fold_with_report(model, images, standardized=(WeightStandardizedConv2d,))
    assert type(folded[0]) is nn.Conv2d
    assert report.folded == {"0": "weight standardization"}
    assert torch.equal(folded(images), model(images))


class Dynamic(WeightStandardizedConv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * x.mean(), self.bias)


class Twice(WeightStandardizedConv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class Scaled(WeightStandardizedConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Reflected(WeightStandardizedConv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Dynamic, "its weight depends on the input"),
        (Twice, "it calls 2 convolution functions, not one"),
        (Scaled, "it changes the output of its convolution"),
        (Reflected, "it changes its input in another way than SAME padding"),
    ],
)
def test_a_named_class_that_does_something_else_is_left(kind, reason):
    model = nn.Sequential(kind(3, 8, 3))
    folded, report = fold_with_report(model, standardized=(kind,))
    assert type(folded[0]) is kind
    assert report.left == {"0": reason}


def hooked(conv):
    conv.register_forward_hook(lambda module, args, out: out + 1)
    return conv


def replaced(conv):
    conv.forward = lambda x: x
    return conv


class Subclass(StdConv2d):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "it has hooks"),
        (replaced, "its forward was replaced"),
        (parametrizations.orthogonal, "it is parametrized"),
        (lambda conv: Subclass(3, 8, 3), "its class Subclass is not known"),
    ],
)
def test_changed_layers_are_left(change, reason):
    model = nn.Sequential(change(StdConv2d(3, 8, 3)))
    folded, report = fold_with_report(model)
    found = report.left["0"].replace("ParametrizedStdConv2d", "Subclass")
    assert found in (reason, "its class Subclass is not known")
    assert type(folded[0]) is not nn.Conv2d


def test_shared_weights_are_left_and_a_module_with_two_names_is_replaced_under_both():
    one, two, three = StdConv2d(4, 4, 3), StdConv2d(4, 4, 3), StdConv2d(4, 4, 3)
    two.weight = one.weight
    model = nn.ModuleDict({"one": one, "two": two, "three": three, "again": three})
    folded, report = fold_with_report(model)
    assert report.left == {
        "one": "it shares a tensor with two.weight", "two": "it shares a tensor with one.weight"
    }  # fmt: skip
    assert type(folded["three"]) is nn.Conv2d
    assert folded["three"] is folded["again"]


# --- batch norm --------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """A convolution and a norm with another reader between them, if `other`; called several times, if `times` > 1."""

    def __init__(self, *, other: bool = False, times: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.other, self.times = (
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            other,
            times,
        )

    def forward(self, x):
        for _ in range(self.times):
            y = self.conv(x)
            x = self.bn(y) + (y if self.other else 0)
        return x


@pytest.mark.parametrize(
    ("model", "left"),
    [
        (nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()), None),
        (nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)), None),
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False)), None),
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)), None),
        (nn.Sequential(nn.Conv2d(4, 6, 3), BatchNormAct2d(6)), None),
        (nn.Sequential(nn.Conv2d(4, 6, 3), FrozenBatchNorm2d(6)), None),
        (nn.Sequential(StdConv2d(4, 6, 3), nn.BatchNorm2d(6)), None),
        (Reads(), None),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), "there is no convolution directly before it"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)),
         "there is no convolution directly before it"),
        (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
         "it has no running statistics"),
        (Reads(other=True), "other layers read the output of conv"),
        (Reads(times=2), "it is called twice"),
    ],
)  # fmt: skip
def test_batch_norm_is_folded_where_the_graph_allows_it(model, left):
    model, images = shaken(model), torch.randn(3, 4, 8, 9)
    folded, report = fold_with_report(model, images)
    assert list(report.left.values()) == ([] if left is None else [left])
    assert ("batch norm" in report.folded.values()) == (left is None)
    assert report.relative_difference < 1e-6
    if left is None:
        assert not any("Norm" in type(m).__name__ for m in folded.modules())


@pytest.mark.works("torchvision", "fold")
def test_networks_of_timm_and_torchvision_lose_all_norms_after_convolutions():
    for name in ("resnet10t", "efficientnet_b0", "mobilenetv3_small_050"):
        model = shaken(timm.create_model(name))
        folded, report = fold_with_report(model, torch.randn(2, 3, 64, 65))
        assert report.left == {}
        assert not any("Norm" in type(m).__name__ for m in folded.modules())
        assert report.relative_difference < 1e-5


class Branches(nn.Module):
    """A model that torch.fx cannot trace, which calls its body as a whole, or layer by layer if `by_layer`."""

    def __init__(self, *, by_layer: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.by_layer = by_layer

    def forward(self, x):
        if float(x.sum()) == 12345.0:
            x = -x
        if not self.by_layer:
            return self.body(x)
        maps = []
        for layer in self.body:
            x = layer(x)
            maps.append(x)
        return maps


def test_models_that_cannot_be_traced_need_a_run():
    images = torch.randn(2, 3, 8, 8)
    whole, apart = shaken(Branches(by_layer=False)), shaken(Branches(by_layer=True))
    _, report = fold_with_report(whole)
    assert report.left["body.1"].startswith(
        "torch.fx cannot trace the model (Branches), and there are no images"
    )
    folded, report = fold_with_report(whole, images)
    assert report.folded == {"body.1": "batch norm"}
    assert type(folded.body[1]) is nn.Identity
    # Its output contains that of the convolution, although the graph of the body alone would allow to fold it.
    folded, report = fold_with_report(apart, images)
    assert report.left == {"body.1": "the run did not call it and body.0 once, one after the other, in body"}
    assert report.difference == 0


# --- the report and errors -----------------------------------------------------------------------------------


def test_the_report_as_text():
    model = nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    _, report = fold_with_report(shaken(model))
    assert str(report) == (
        "folded: 1 of weight standardization, 1 of batch norm; left: 1\n  3: there is no convolution directly before it"
    )
    _, report = fold_with_report(nn.ReLU(), torch.randn(2, 3))
    assert str(report) == "folded: nothing; left: 0; largest difference 0.0e+00, relative 0.0e+00"


class Restless(nn.Module):
    def forward(self, x):
        return F.dropout(x, training=True)


def test_errors_name_the_module_and_the_fix():
    with pytest.raises(ValueError, match=re.escape("fold cannot convert str. Allowed: a torch.nn.Module.")):
        fold("nf_resnet50")
    with pytest.raises(
        ValueError, match=r"^Linear cannot be run on the images: mat1 and mat2 .* Fix: pass its input"
    ):
        fold(nn.Linear(3, 4), torch.randn(2, 5))
    with pytest.raises(
        ValueError, match=r"^the outputs of Restless on the images changed by .*\. Allowed: 0.0001\."
    ):
        fold(Restless(), torch.randn(20, 20))
    model = nn.Linear(3, 4)
    model.state = model.weight * 2
    with pytest.raises(ValueError, match=r"^Linear cannot be copied: Only Tensors created explicitly"):
        fold(model)
    two = nn.Bilinear(3, 3, 4)
    assert torch.equal(fold(two, (torch.ones(1, 3), torch.ones(1, 3))).weight, two.weight)
