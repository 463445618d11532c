"""Folding of batch norm in networks of other libraries keeps the outputs of evaluation mode."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD
from normfree.surgery.batchnorm import ScaleShift, batchnorms
from normfree.surgery.conversion_report import How
from normfree.surgery.convert import convert_batchnorm


def distance(a: Tensor, b: Tensor) -> float:
    """Return the relative L2 distance of `a` to `b`."""
    return ((a - b).norm() / b.norm()).item()


class PreActivation(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))): the first norm has no layer before it to be folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm0, self.norm1 = nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.conv0, self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.norm2, self.head = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv1(F.relu(self.norm1(self.conv0(F.relu(self.norm0(x), inplace=True)))))
        return self.head(F.relu(self.norm2(self.hidden(x.mean((2, 3))))))


NETWORKS = {
    "pre-activation": PreActivation,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35),
    "test_resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "test_byobnet": lambda: timm.create_model("test_byobnet", num_classes=5),
}


@pytest.mark.works("timm", "convert_batchnorm")
@pytest.mark.works("torchvision", "convert_batchnorm")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_stay_the_same_without_batch_norm(
    with_random_norms: Callable[..., nn.Module], name: str, dtype: torch.dtype, tolerance: float
) -> None:
    net = with_random_norms(NETWORKS[name]()).to(dtype)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    images = torch.randn(3, 3, 64, 64, dtype=dtype)
    converted, report = convert_batchnorm(net, images)
    with torch.no_grad():
        error = distance(converted(images), net(images))
    assert error < tolerance
    assert report.error == pytest.approx(error, rel=1e-3)
    assert not batchnorms(converted)
    assert not list(converted.buffers())
    assert {c.norm.removesuffix(".0") for c in report.layers} == set(batchnorms(net))
    assert type(converted) is type(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_report_names_the_layer_that_each_norm_is_folded_into(
    with_random_norms: Callable[..., nn.Module],
) -> None:
    net = with_random_norms(PreActivation())
    converted, report = convert_batchnorm(net)
    assert [(c.norm, c.change, c.layer) for c in report.layers] == [
        ("norm0", "scale and shift", "norm0"),
        ("norm1", "folded", "conv0"),
        ("norm2", "folded", "hidden"),
    ]
    assert str(report) == (
        "exact: 1 scale and shift, 2 folded\n"
        "layer   change           norm\n"
        "norm0   scale and shift  norm0\n"
        "conv0   folded           norm1\n"
        "hidden  folded           norm2"
    )
    factor = net.norm0.weight / (net.norm0.running_var + net.norm0.eps).sqrt()
    torch.testing.assert_close(converted.norm0.gain, factor)
    torch.testing.assert_close(converted.norm0.bias, net.norm0.bias - net.norm0.running_mean * factor)
    assert isinstance(converted.norm1, nn.Identity)


class Tied(nn.Module):
    """One convolution is read twice, one is called twice, one norm is called twice: no norm may be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.other = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm0, self.norm1 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.norm2 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        read = self.read(x)
        x = self.norm0(read) + read
        x = self.called(self.norm1(self.called(x)))
        return self.norm2(self.norm2(self.other(x)))


def test_norms_of_shared_layers_become_scale_and_shift(with_random_norms: Callable[..., nn.Module]) -> None:
    net, images = with_random_norms(Tied()).double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    converted, report = convert_batchnorm(net, images)
    assert report.counts == {"scale and shift": 3}
    assert distance(converted(images), net(images)) < 1e-12


class Branching(nn.Module):
    """Control flow that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x if x.sum() > 0 else -x))


def test_exact_does_not_need_a_trace(with_random_norms: Callable[..., nn.Module]) -> None:
    net, images = with_random_norms(Branching()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    converted, report = convert_batchnorm(net, images)
    assert isinstance(converted.norm, ScaleShift)
    assert report.counts == {"scale and shift": 1}
    assert distance(converted(images), net(images)) < 1e-12


class Halved(nn.Conv2d):
    """A convolution whose output does not scale with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_a_convolution_that_normalizes_its_weight_is_not_folded_into(
    with_random_norms: Callable[..., nn.Module],
) -> None:
    net = with_random_norms(nn.Sequential(Halved(3, 4, 3), nn.BatchNorm2d(4))).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    converted, report = convert_batchnorm(net, images)
    assert report.counts == {"scale and shift": 1}
    assert torch.equal(converted[0].weight, net[0].weight)
    assert distance(converted(images), net(images)) < 1e-12


def test_the_result_does_not_depend_on_the_batch_and_trains_with_agc(
    with_random_norms: Callable[..., nn.Module],
) -> None:
    """Without batch statistics, the gradients of two halves add up to the gradient of the whole batch."""
    net = (
        with_random_norms(timm.create_model("test_efficientnet", num_classes=5, drop_rate=0.0))
        .double()
        .train()
    )
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)

    def gradients(model: nn.Module, chosen: list[int]) -> Tensor:
        model.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen], reduction="sum").backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def difference(model: nn.Module) -> float:
        pairs = gradients(model, [0, 1]) + gradients(model, [2, 3])
        return distance(pairs, gradients(model, [0, 1, 2, 3]))

    converted = convert_batchnorm(net).model
    assert converted.training
    assert difference(converted) < 1e-12
    assert difference(net) > 0.1
    groups = parameter_groups(converted, weight_decay=2e-5, clipping=0.1)
    names = {name: group["name"] for group in groups for name in group["param_names"]}
    assert set(names) == {n for n, _ in converted.named_parameters()}
    optimizer, losses = SGD(groups, lr=0.1), []
    for _ in range(16):
        optimizer.zero_grad()
        loss = F.cross_entropy(converted(images), labels)
        loss.backward()
        adaptive_clip_grad_(optimizer.param_groups)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.batch_norm(x, torch.zeros(4), torch.ones(4))


class Whitening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.eps = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x), x


class Late(nn.Conv2d):
    """Linear on the probe of 16 pixels, but not for other sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] == 16 else super().forward(x).clamp(min=0)


@pytest.mark.parametrize(
    ("net", "how", "message"),
    [
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "exact",
            "1 has no running statistics, so there is nothing to fold. Allowed: batch norms with "
            "track_running_stats=True. Fix: train it with running statistics, or convert with how='scratch'.",
        ),
        (
            Functional(),
            "exact",
            "batch_norm: torch.nn.functional.batch_norm is called without a module, so it cannot be replaced. "
            "Fix: use torch.nn.BatchNorm2d.",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), Whitening()),
            "exact",
            "1: Whitening has running statistics and is not a known kind of batch norm. Fix: replace it by "
            "torch.nn.BatchNorm2d and load its statistics.",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
            "exact",
            "Sequential has no batch norm: nothing to convert. Its other norms: 1 GroupNorm. Allowed: networks with "
            "torch.nn.BatchNorm1d, 2d or 3d, or a module that behaves like one.",
        ),
        (
            nn.BatchNorm2d(3),
            "folded",
            "unknown how 'folded'. Allowed: 'exact', 'normalizer_free', 'scratch'.",
        ),
        (
            Pair(),
            "exact",
            "Pair returns tuple in evaluation mode. Allowed: one tensor. Fix: wrap it in a module that returns only "
            "the logits.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_folded_is_refused_by_name(net: nn.Module, how: How, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        convert_batchnorm(net, torch.randn(1, 3, 8, 8), how=how)
    assert str(caught.value) == message


def test_a_conversion_that_changes_the_outputs_on_the_images_is_refused(
    with_random_norms: Callable[..., nn.Module],
) -> None:
    net = with_random_norms(nn.Sequential(Late(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(
        ValueError, match=r"^Sequential: folding would change the outputs by .* \(relative L2 norm\)"
    ):
        convert_batchnorm(net, torch.randn(1, 3, 8, 8))


def test_other_norms_stay_and_are_reported(with_random_norms: Callable[..., nn.Module]) -> None:
    net = with_random_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)))
    converted, report = convert_batchnorm(net)
    assert report.kept == {"2": "GroupNorm does not use batch statistics"}
    assert isinstance(converted[2], nn.GroupNorm)
    with pytest.raises(
        ValueError,
        match=r"^alpha=0\.3, skip_gain=0\.0 with how='exact'\. Allowed: .* with how='scratch' only\.",
    ):
        convert_batchnorm(net, alpha=0.3)
