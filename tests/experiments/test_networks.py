"""The twins of the experiments: what each method of replacing batch norm computes, and the rules of clipping."""

import math

import pytest
import torch
from torch import nn

from experiments.clipping_rules import Lars, clip_layers_
from experiments.networks import METHODS, VirtualBatchNorm, build, on_devices_
from normfree import SGD, adaptive_clip_grad_, parameter_groups, signal_propagation
from normfree.models.layers import WSConv2d
from normfree.models.net import Block

DEEP = {"depths": (3, 3), "widths": (16, 32), "strides": (1, 2)}


def blocks(net):
    return [module for module in net.modules() if isinstance(module, Block)]


@pytest.mark.parametrize("method", METHODS)
def test_every_twin_trains_and_only_batch_norm_mixes_images(method):
    net = build("deep", method, classes=3, seed=0, fields=DEEP).double().train()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    alone, together = net(images[:2]), net(images)[:2]
    assert torch.allclose(alone, together, atol=1e-9) == (method != "batch")
    nn.functional.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
    # skip gains or last convolutions at 0 close the branches of SkipInit and FixUp
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_seed_gives_twins_the_same_convolutions():
    nets = [build("deep", method, classes=3, seed=4, fields=DEEP) for method in ("batch", "group")]
    assert torch.equal(nets[0].stem.conv0.weight, nets[1].stem.conv0.weight)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in nets[1].modules())
    again, other = (
        build("deep", "nf", classes=3, seed=seed, fields=DEEP).stem.conv0.weight for seed in (4, 5)
    )
    assert torch.equal(again, build("deep", "nf", classes=3, seed=4, fields=DEEP).stem.conv0.weight)
    assert not torch.equal(again, other)


def test_fixup_starts_as_published():
    net = build("deep", "fixup", classes=3, seed=0, fields=DEEP)
    assert not net.head.weight.any()
    plain = build("deep", "skipinit", classes=3, seed=0, fields=DEEP)
    for ours, he in zip(blocks(net), blocks(plain), strict=True):
        assert not ours.conv2[1].weight.any()
        # L blocks with m = 3 convolutions: L ** (-1 / (2m - 2))
        torch.testing.assert_close(ours.conv0[1].weight, he.conv0.weight * 6 ** (-1 / 4))
        assert ours.skip_gain.item() == ours.alpha == 1.0
        assert [m.bias.item() for m in (ours.norm0, ours.conv0[0])] == [0.0, 0.0]
    assert all(block.skip_gain.item() == 0.0 for block in blocks(plain))


def test_without_weight_standardization_images_become_alike_and_without_scalars_the_variance_explodes():
    fields = {"depths": (8, 8), "widths": (32, 64), "strides": (1, 2)}
    noise = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    last = {}
    for method in ("nf", "unstandardized", "plain"):
        net = build("deep", method, classes=3, seed=0, fields=fields)
        last[method] = signal_propagation(net, noise).blocks[-1]
    assert last["nf"].cosine < 0.3
    assert last["unstandardized"].cosine > 0.6
    assert last["plain"].variance > 20 * last["nf"].variance
    assert not any(
        isinstance(m, WSConv2d) for m in build("deep", "plain", classes=3, seed=0, fields=fields).modules()
    )


def test_the_scale_of_an_unstandardized_convolution_is_beta():
    net = build("deep", "unstandardized", classes=3, seed=0, fields=DEEP)
    betas = [block.conv0[0].factor for stage in net.stages for block in list(stage)[1:]]
    assert betas == pytest.approx([(1 + 0.04 * k) ** -0.5 for _ in range(2) for k in (1, 2)])


def test_a_virtual_device_normalizes_like_a_device_of_its_own():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 4, 4, dtype=torch.float64) * 3 + 1
    norm = nn.BatchNorm2d(5).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    virtual = VirtualBatchNorm(norm, 3)
    alone = [nn.BatchNorm2d(5).double() for _ in range(3)]
    for each in alone:
        each.load_state_dict(norm.state_dict())
    expected = torch.cat([each(part) for each, part in zip(alone, x.split(4), strict=True)])
    torch.testing.assert_close(virtual(x), expected)
    virtual.eval()
    means = torch.stack([each.running_mean for each in alone]).mean(dim=0)
    variances = torch.stack([each.running_var for each in alone]).mean(dim=0)
    shape = (1, 5, 1, 1)
    by_hand = (x - means.view(shape)) / (variances.view(shape) + norm.eps).sqrt()
    torch.testing.assert_close(virtual(x), by_hand * norm.weight.view(shape) + norm.bias.view(shape))


def test_sorting_a_batch_over_devices_changes_batch_norm_and_not_a_normalizer_free_network():
    images, order = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    for method, same in (("nf", True), ("batch", False)):
        net = build("deep", method, classes=3, seed=0, fields=DEEP).double().train()
        on_devices_(net, 2)
        assert torch.allclose(net(images)[order], net(images[order]), atol=1e-9) == same


def gradients(model, scale=1.0):
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(index)
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return parameter_groups(model, weight_decay=0.1, clipping=0.05, unclipped=())


def test_a_layer_with_one_tensor_is_clipped_like_that_tensor():
    ours, reference = (
        nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)) for _ in range(2)
    )
    reference.load_state_dict(ours.state_dict())
    share = clip_layers_(gradients(ours), clipping=0.05)
    report = adaptive_clip_grad_(gradients(reference), 0.05, unit="tensor")
    assert float(share) == float(report) == 1.0
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layers_are_clipped_as_one_vector_and_small_gradients_keep_every_bit():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    clip_layers_(gradients(model), clipping=0.05)
    for layer in model:
        size, slope = (math.sqrt(sum(float(t.detach().square().sum()) for t in tensors)) for tensors in
                       ((layer.weight, layer.bias), (layer.weight.grad, layer.bias.grad)))  # fmt: skip
        assert slope == pytest.approx(0.05 * size, rel=1e-5)
    groups = gradients(model, 1e-6)
    before = [p.grad.clone() for p in model.parameters()]
    assert float(clip_layers_(groups, clipping=0.05)) == 0.0
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_lars_moves_each_weight_by_its_trust_ratio():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    groups = gradients(model)
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    bias, slope = model[0].bias.detach().clone(), model[0].bias.grad.clone()
    Lars(groups, 0.5, trust=0.01).step()
    ratio = 0.01 * weight.norm() / (grad.norm() + 0.1 * weight.norm())
    torch.testing.assert_close(model[0].weight, weight - 0.5 * ratio * (grad + 0.1 * weight))
    torch.testing.assert_close(model[0].bias, bias - 0.5 * slope)  # biases as by SGD, without decay
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.1][: len(groups)]
    assert isinstance(Lars(groups, 0.1, trust=0.1), SGD)
