"""Standardized weights fitted to folded ones: outputs stay as similar as possible, and the report measures the rest."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from normfree.models.layers import standardize
from normfree.optim.groups import parameter_groups
from normfree.surgery.batchnorm import batchnorms
from normfree.surgery.convert import convert_batchnorm
from normfree.surgery.standardized_conv import Standardized
from normfree.surgery.weight_fit import RIDGE, _fitted, _sample, _Target, standardize_


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.std(1, correction=0)


def outputs(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    kept = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: kept.__setitem__(n, o.clone()))
        for n in names
    ]
    with torch.no_grad():
        kept[""] = model.eval()(images)
    for handle in handles:
        handle.remove()
    return kept


def residual_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """A small ResNet of timm with random batch norm statistics, weights and biases, in evaluation mode."""
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=5).to(dtype)
    with torch.no_grad():
        for module in batchnorms(net).values():
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.3)
    return net.eval()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv1d(4, 6, 3, padding=2),
        timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=True),
    ],
)
def test_a_standardized_convolution_is_the_convolution_with_another_weight(conv: nn.Module) -> None:
    conv = conv.double()
    x = torch.randn((2, 4, 9, 11) if conv.weight.dim() == 4 else (2, 4, 11), dtype=torch.float64)
    module = Standardized(conv, input_scale=1.7)
    module.gain.data.uniform_(0.5, 2.0)
    weight = standardize(conv.weight, module.gain, scale=1.7)
    module(x).sum().backward()
    # Neither a constant added to a filter nor the norm of a filter has an effect.
    assert conv.weight.grad.flatten(1).sum(1).abs().max() < 1e-10
    assert (conv.weight.grad * conv.weight).flatten(1).sum(1).abs().max() < 1e-10
    out = module(x)
    conv.weight.data.copy_(weight)
    torch.testing.assert_close(out, conv(x))


def test_parameter_groups_know_the_names_of_the_parameters() -> None:
    net = Standardized(nn.Conv2d(4, 6, 3))
    assert [n for n, _ in net.named_parameters()] == ["gain", "conv.weight", "conv.bias"]
    by_name = {n: g["name"] for g in parameter_groups(net, classifier=()) for n in g["param_names"]}
    assert by_name == {"gain": "gains and biases", "conv.bias": "gains and biases", "conv.weight": "weights"}


@pytest.mark.parametrize("layer", [nn.Conv2d(1, 1, 1), nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 3)])
def test_what_cannot_be_standardized_is_refused(layer: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"^conv is .* Allowed: convolutions, not transposed, with a fan-in above 1\.$"
    ):
        Standardized(layer)


@pytest.mark.parametrize("with_images", [False, True])
def test_filters_of_mean_zero_lose_nothing(with_images: bool) -> None:
    """If all folded filters have mean zero, the conversion is exact."""
    net = residual_net()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data -= module.weight.data.mean((1, 2, 3), keepdim=True)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    converted, report = convert_batchnorm(net, images if with_images else None, how="normalizer_free")
    assert max(c.lost_mean for c in report.layers) < 1e-12
    assert distance(converted(images), net(images)) < 1e-12


def test_every_channel_keeps_its_mean_and_variance_on_the_images() -> None:
    net, images = residual_net(), torch.rand(8, 3, 64, 64, dtype=torch.float64)
    exact = convert_batchnorm(net).model
    converted, report = convert_batchnorm(net, images, how="normalizer_free")
    done = [c.layer for c in report.layers if c.change == "standardized"]
    assert len(done) == len([m for m in net.modules() if isinstance(m, nn.Conv2d)])
    ours, theirs = outputs(converted, done, images), outputs(exact, done, images)
    for name in done:
        for a, b in zip(moments(ours[name]), moments(theirs[name]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        weight = converted.get_submodule(name).standardized_weight()
        assert weight.flatten(1).mean(1).abs().max() < 1e-12
    for change in report.layers:
        w = exact.get_submodule(change.layer).weight.detach().flatten(1)
        assert change.lost_mean == pytest.approx(
            float((w.mean(1).square().sum() * w.shape[1] / w.square().sum()).sqrt())
        )
    assert report.error == pytest.approx(distance(ours[""], theirs[""]), rel=1e-6)


def test_unexplained_follows_its_definition_and_the_fit_improves_every_channel() -> None:
    """The number is recomputed for one convolution; every channel correlates better after the fit than without."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double().eval()
    # Give the filters means that matter.
    net[0].weight.data += 0.2
    images = torch.rand(8, 3, 12, 12, dtype=torch.float64)
    converted, report = convert_batchnorm(net, images, how="normalizer_free")
    wanted, got = net(images), converted(images)
    left = (
        (got - wanted).square().mean() / wanted.transpose(0, 1).flatten(1).var(1, correction=0).mean()
    ).item()
    assert report.layers[0].unexplained == pytest.approx(left, rel=1e-6)
    # Without images, the means of the filters are subtracted.
    plain = convert_batchnorm(net, how="normalizer_free").model
    goal, before, after = (x.detach().transpose(0, 1).flatten(1) for x in (wanted, plain(images), got))
    fit = [
        torch.stack([torch.corrcoef(torch.stack(p))[0, 1] for p in zip(goal, x, strict=True)])
        for x in (before, after)
    ]
    assert (fit[1] > fit[0]).all()


def test_the_fitted_weight_is_optimal_among_those_of_mean_zero() -> None:
    """No small change that keeps the sums of the filters lowers the squared error plus the ridge."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2).double()
    x, goal = torch.rand(5, 4, 8, 8, dtype=torch.float64), torch.randn(5, 6, 4, 4, dtype=torch.float64)
    target = _Target(
        goal, goal, torch.arange(5), torch.arange(16), _sample(goal, torch.arange(5), torch.arange(16))
    )
    weight = conv.weight.detach()
    patches = F.unfold(x, 3, padding=1, stride=2).view(5, 2, 18, 16).permute(1, 2, 0, 3).flatten(2)
    patches = patches - patches.mean(2, keepdim=True)
    ridge = RIDGE * patches.square().mean((1, 2))[:, None, None]
    goals = goal.transpose(0, 1).reshape(2, 3, 80)
    goals = goals - goals.mean(2, keepdim=True)

    def cost(w: torch.Tensor) -> torch.Tensor:
        w, start = w.reshape(2, 3, 18), weight.reshape(2, 3, 18)
        return (
            (goals - w @ patches).square().mean(2, keepdim=True) + ridge * (w - start).square().sum(2, True)
        ).sum()

    best = _fitted(conv, weight, x, target)
    assert best.flatten(1).sum(1).abs().max() < 1e-12
    for _ in range(5):
        step = torch.randn_like(best)
        step -= step.mean((1, 2, 3), keepdim=True)
        assert cost(best + 1e-3 * step) > cost(best)
        assert cost(best - 1e-3 * step) > cost(best)


def test_depthwise_convolutions_stay_folded_and_are_reported() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", num_classes=5).eval()
    converted, report = convert_batchnorm(net, torch.randn(4, 3, 64, 64), how="normalizer_free")
    depthwise = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.weight.shape[1] == 1]
    gates = [n for n, _ in net.named_modules() if n.endswith(("se.conv_reduce", "se.conv_expand"))]
    assert report.kept == {
        **dict.fromkeys(depthwise, "one input channel per filter: not standardized"),
        **dict.fromkeys(gates, "after global pooling: not standardized"),
    }
    assert all(type(converted.get_submodule(n)) is nn.Conv2d for n in depthwise)
    assert report.counts["folded"] == len(depthwise)
    assert not batchnorms(converted)


class PreActivation(nn.Module):
    """Convolutions without a norm after them, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
        )
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        r = self.conv(F.relu(self.norm(x)))
        return x + r * torch.sigmoid(self.gate(self.pool(r)))


def test_convolutions_without_a_norm_are_standardized_and_gates_are_not() -> None:
    net = PreActivation().double().eval()
    converted, report = convert_batchnorm(net, torch.randn(4, 3, 9, 9).double(), how="normalizer_free")
    assert [(c.layer, c.change, c.norm) for c in report.layers] == [
        ("stem", "standardized", ""),
        ("conv", "standardized", ""),
        ("norm", "scale and shift", "norm"),
    ]
    assert report.kept == {"gate": "after global pooling: not standardized"}
    # The bias contains the average output of the means that the filters lost.
    assert converted.conv.conv.bias.abs().max() > 0


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x if x.sum() > 0 else -x))


def test_what_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Branching: torch\.fx cannot trace it"):
        convert_batchnorm(Branching(), how="normalizer_free")


def test_constant_images_and_dead_channels_give_finite_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)
    ).eval()
    net[1].weight.data[0] = 0.0
    for images in (torch.ones(2, 3, 8, 8), torch.randn(2, 3, 8, 8)):
        converted, _ = convert_batchnorm(net, images, how="normalizer_free")
        assert all(p.isfinite().all() for p in converted.parameters())
        assert converted(images).isfinite().all()


def test_modes_are_kept() -> None:
    net = residual_net().train()
    net.layer1.eval()
    converted, _ = convert_batchnorm(net, torch.randn(2, 3, 32, 32).double(), how="normalizer_free")
    assert net.training
    assert not net.layer1.training
    assert converted.training
    assert not converted.layer1.training


def test_the_fitted_network_does_not_depend_on_the_batch() -> None:
    """Although the fit evaluates all images as one batch, the result treats each image separately."""
    net, images = residual_net(), torch.randn(4, 3, 64, 64, dtype=torch.float64)
    converted = convert_batchnorm(net, images, how="normalizer_free").model.train()
    whole = converted(images)
    torch.testing.assert_close(torch.cat([converted(x[None]) for x in images]), whole, rtol=1e-10, atol=1e-10)
    assert F.mse_loss(whole, whole.roll(1, 0)) > 0


def test_standardize_alone_reports_without_images() -> None:
    folded = convert_batchnorm(residual_net()).model
    fits = standardize_(folded, ["conv1.0"], None)
    assert fits[0].unexplained is None
    assert isinstance(folded.get_submodule("conv1.0"), Standardized)
