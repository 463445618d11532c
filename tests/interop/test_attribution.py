"""Captum and Zennit explain networks of every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normfree

SMALL = {"depths": (1, 2), "widths": (16, 32), "strides": (1, 2)}
FAMILIES = {
    "nf_resnet50": SMALL,
    "nfnet_f0": {**SMALL, "group_width": 8},
    "nf_regnet_b0": {**SMALL, "classifier_std": 0.1},
    "timm_eca_nfnet_l0": {**SMALL, "group_width": 8},
    "resnet50": {**SMALL, "classifier_std": 0.1},
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = normfree.create_model(name, num_classes=3, **FAMILIES[name])
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith(("skip_gain", "conv2.gain")):
                parameter.fill_(0.5)
    return net.eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.works("Captum", "integrated gradients")
@every_family
def test_integrated_gradients_add_up_to_the_difference_of_logits(name):
    attr = pytest.importorskip("captum.attr")
    net, x = network(name).double(), images().double()
    baseline = torch.zeros_like(x)
    found = attr.IntegratedGradients(net).attribute(x, baseline, target=1, n_steps=100)
    wanted = (net(x) - net(baseline))[:, 1]
    torch.testing.assert_close(found.flatten(1).sum(1), wanted, rtol=0.02, atol=1e-4)


@pytest.mark.works("Captum", "GradCAM")
@every_family
def test_gradcam_of_the_last_stage_is_its_definition(name):
    attr = pytest.importorskip("captum.attr")
    net, x = network(name), images()
    found = attr.LayerGradCam(net, net.stages[-1]).attribute(x, target=1)
    maps = net.stages(net.stem(x)).detach().requires_grad_()
    last = net.act(net.final_norm(maps if net.final_conv is None else net.final_conv(maps)))
    (grad,) = torch.autograd.grad(net.forward_head(last)[:, 1].sum(), maps)
    wanted = (grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.works("Captum", "layer and neuron attribution")
@every_family
def test_conductance_of_a_convolution_adds_up(name):
    attr = pytest.importorskip("captum.attr")
    net, x = network(name).double(), images().double()
    baseline = torch.zeros_like(x)
    found = attr.LayerConductance(net, net.stem.conv0).attribute(x, baseline, target=1, n_steps=300)
    total = found.flatten(1).sum(1)
    torch.testing.assert_close(total, (net(x) - net(baseline))[:, 1], rtol=0.02, atol=1e-3)


@pytest.mark.works("Zennit", "Gradient with hooks")
@every_family
def test_zennit_without_rules_is_the_gradient(name):
    attribution = pytest.importorskip("zennit.attribution")
    from zennit.composites import NameMapComposite
    from zennit.rules import Pass

    net, x = network(name), images()
    target = torch.eye(3)[[1, 1]]
    source = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(net(source)[:, 1].sum(), source)
    composite = NameMapComposite([(["head_drop"], Pass())])
    with attribution.Gradient(net, composite) as attributor:
        output, found = attributor(x, target)
    torch.testing.assert_close(output, net(x))
    torch.testing.assert_close(found, wanted)


@pytest.mark.works("Zennit", "epsilon rule on convolutions")
@every_family
def test_the_epsilon_rule_on_a_convolution_is_its_definition(name):
    """R_in = x · Wᵀ(R_out / y), with the x that is convolved and W the weight that the convolution uses."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import NameMapComposite
    from zennit.rules import Epsilon

    net = network(name).double()
    conv = net.stages[0][0].conv1
    x = torch.randn(2, conv.weight.shape[1] * conv.groups, 9, 9, dtype=torch.float64)
    composite = NameMapComposite([(["conv1"], Epsilon(epsilon=1e-9, zero_params=["bias"]))])
    holder = nn.Module()
    holder.conv1, holder.forward = conv, lambda x: conv(x)
    with Gradient(holder, composite) as attributor:
        output, found = attributor(x, torch.ones_like(conv(x)))
    source = x.clone().requires_grad_()
    y = conv(source) - (0.0 if conv.bias is None else conv.bias[:, None, None])
    (back,) = torch.autograd.grad(y, source, torch.ones_like(y) / (y + y.sign() * 1e-9).detach())
    torch.testing.assert_close(found, source * back, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output, conv(x))


@pytest.mark.works("Zennit", "layer-wise relevance propagation")
@every_family
def test_relevance_is_propagated_through_a_whole_network(name):
    """With the epsilon rule on every layer; relevance is finite and depends on the class."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import NameMapComposite
    from zennit.rules import Epsilon

    net, x = network(name), images()
    layers = [k for k, m in net.named_modules() if "conv" in k.rpartition(".")[2] and "attention" not in k]
    composite = NameMapComposite([([k], Epsilon(epsilon=1e-3)) for k in [*layers, "head"]])
    maps = []
    for target in (0, 1):
        with Gradient(net, composite) as attributor:
            output, relevance = attributor(x, torch.eye(3)[[target, target]])
        torch.testing.assert_close(output, net(x), rtol=1e-4, atol=1e-5)
        assert torch.isfinite(relevance).all()
        maps.append(relevance)
    assert not torch.allclose(maps[0], maps[1])


@pytest.mark.works("Captum", "grad_cam")
@every_family
def test_grad_cam_is_captums(name):
    attr = pytest.importorskip("captum.attr")
    net, x = network(name), images()
    for layer in (net.stages[0], net.stages[-1]):
        wanted = attr.LayerGradCam(net, layer).attribute(x, target=1, relu_attributions=True)[:, 0]
        torch.testing.assert_close(
            normfree.grad_cam(net, x, classes=1, layer=layer), wanted, rtol=1e-4, atol=1e-7
        )
    body, head = Part(net.forward_features), Part(net.forward_head)
    wanted = attr.LayerGradCam(nn.Sequential(body, head), body).attribute(x, target=1, relu_attributions=True)
    torch.testing.assert_close(normfree.grad_cam(net, x, classes=1), wanted[:, 0], rtol=1e-4, atol=1e-7)


class Part(nn.Module):
    """A function as a module, so that Captum can hook it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.works("timm", "grad_cam")
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "dm_nfnet_f0", "convnext_femto"])
def test_grad_cam_of_timms_networks_is_captums(name):
    attr = pytest.importorskip("captum.attr")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net, x = timm.create_model(name, num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    body, head = Part(net.forward_features), Part(net.forward_head)
    wanted = attr.LayerGradCam(nn.Sequential(body, head), body).attribute(x, target=1, relu_attributions=True)
    torch.testing.assert_close(normfree.grad_cam(net, x, classes=1), wanted[:, 0], rtol=1e-4, atol=1e-8)
