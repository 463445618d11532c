"""A folded network computes the same function with plain layers only."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.deploy.fold import fold
from normfree.models.features import FeatureNet
from normfree.models.layers import SqueezeExcite
from normfree.models.zoo import create_model

SMALL = {
    "nfnet_f0": {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8},
    "bn_nfnet_f0": {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8},
    "nf_resnet50": {"widths": (32, 64, 96, 96), "depths": (2, 1, 2, 1)},
    "resnet50": {"widths": (32, 64, 96, 96), "depths": (2, 1, 2, 1)},
    "nf_regnet_b0": {"widths": (16, 32, 48, 64), "depths": (1, 2, 1, 1)},
    "nf_resnet_nano": {},
    "resnet_nano": {},
    "timm_dm_nfnet_f0": {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8},
    "timm_nfnet_f0": {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8},
    "timm_eca_nfnet_l0": {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8},
    "timm_nf_seresnet50": {"widths": (32, 64, 96, 96), "depths": (2, 1, 2, 1)},
    "timm_nf_ecaresnet50": {"widths": (32, 64, 96, 96), "depths": (2, 1, 2, 1)},
    "timm_nf_regnet_b0": {"widths": (16, 32, 48, 64), "depths": (1, 2, 1, 1)},
}


def changed(name, **overrides):
    """Return a network in evaluation mode in which every parameter and statistic was changed."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=7, **overrides)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith(("gain", "norm0.weight", "norm1.weight")):
                parameter.uniform_(-1.5, 1.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return net.eval()


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_layers_give_the_same_outputs(name, dtype):
    net = changed(name, **SMALL[name]).to(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    folded = fold(net)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    with torch.no_grad():
        for size in ((64, 64), (33, 47)):
            images = torch.randn(2, 3, *size, dtype=dtype)
            assert distance(folded(images), net(images)) < tolerance
            ours, theirs = (
                n.forward_head(n.forward_features(images), pre_logits=True) for n in (folded, net)
            )
            assert distance(ours, theirs) < tolerance
            for a, b in zip(FeatureNet(folded)(images), FeatureNet(net)(images), strict=True):
                assert distance(a, b) < tolerance
            for a, b in zip(fold(FeatureNet(net))(images), FeatureNet(net)(images), strict=True):
                assert distance(a, b) < tolerance
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # the original is unchanged
    with_parameters = [m for m in folded.modules() if list(m.parameters(recurse=False))]
    assert all(isinstance(m, nn.Conv2d | nn.Linear | nn.Conv1d) for m in with_parameters)
    assert not list(folded.buffers())
    assert {k.rpartition(".")[2] for k in folded.state_dict()} == {"weight", "bias"}
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in net.parameters())


def test_folding_twice_equals_folding_once():
    for name in ("nf_resnet_nano", "resnet_nano", "bn_nfnet_f0"):
        once = fold(changed(name, **SMALL[name]))
        twice = fold(once)
        assert all(torch.equal(v, once.state_dict()[k]) for k, v in twice.state_dict().items())


@pytest.mark.parametrize("skip_gain", [0.0, 1e-38, 1e-25, -1e-8, -3.0])
def test_closed_and_nearly_closed_branches(skip_gain):
    net = create_model("nf_resnet_nano", num_classes=3, skip_gain=skip_gain).eval()
    net.head.weight.data.normal_()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(fold(net)(images), net(images)) < 1e-5


def test_without_a_classifier_features_keep_their_gamma():
    net = create_model("nf_resnet_nano", num_classes=0).eval()
    folded, images = fold(net), torch.randn(2, 3, 32, 32)
    assert distance(folded(images), net(images)) < 1e-5
    folded.reset_classifier(4)
    torch.testing.assert_close(folded(images), F.linear(net(images), folded.head.weight, folded.head.bias))


class PlainNano(nn.Module):
    """nf_resnet_nano rewritten with torch alone: 3x3 stem, (1, 2, 2) bottlenecks, squeeze-excite."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv0 = nn.Conv2d(3, 32, 3, padding=1)
        self.stages, channels = nn.ModuleList(), 32
        for depth, width in ((1, 64), (2, 128), (2, 256)):
            stage = nn.ModuleList()
            for j in range(depth):
                block = nn.ModuleDict({
                    "conv0": nn.Conv2d(channels, width // 4, 1),
                    "conv1": nn.Conv2d(width // 4, width // 4, 3),
                    "conv2": nn.Conv2d(width // 4, width, 1),
                    "attention": nn.ModuleDict(
                        {"fc0": nn.Linear(width, width // 2), "fc1": nn.Linear(width // 2, width)}
                    ),
                })  # fmt: skip
                if j == 0:
                    block["conv_shortcut"] = nn.Conv2d(channels, width, 1)
                stage.append(block)
                channels = width
            self.stages.append(stage)
        self.head = nn.Linear(256, num_classes)

    def forward(self, x):
        x = self.stem.conv0(x)
        for s, stage in enumerate(self.stages):
            for j, block in enumerate(stage):
                halve = s > 0 and j == 0
                a = F.silu(x)
                shortcut = block["conv_shortcut"](F.avg_pool2d(a, 2) if halve else a) if j == 0 else x
                r = F.silu(block["conv0"](a))
                r = F.pad(r, (0, 1, 0, 1) if halve else (1, 1, 1, 1))
                weight, bias = block["conv1"].weight, block["conv1"].bias
                r = block["conv2"](F.silu(F.conv2d(r, weight, bias, stride=2 if halve else 1)))
                gate = block["attention"]
                g = torch.sigmoid(gate["fc1"](F.relu(gate["fc0"](r.mean((2, 3))))))
                x = shortcut + r * g[:, :, None, None]
        return self.head(F.silu(x).mean((2, 3)))


def test_the_state_dict_fits_a_network_of_plain_torch():
    net = changed("nf_resnet_nano")
    plain = PlainNano(7)
    plain.load_state_dict(fold(net).state_dict(), strict=True)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert distance(plain(images), net(images)) < 1e-5
    assert any(isinstance(m, SqueezeExcite) for m in net.modules())
