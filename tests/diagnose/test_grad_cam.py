"""Grad-CAM equals its definition and, for pooling by the mean, the class activation map."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normfree import create_model, fold, grad_cam
from normfree.data.transforms.evaluate import EVAL_CROPS, eval_transform
from normfree.diagnose.heat_overlay import fitted, overlay

SMALL = {"depths": (1, 2), "widths": (16, 32), "strides": (1, 2)}
NETS = {
    "nf_resnet50": SMALL,
    "nfnet_f0": {**SMALL, "group_width": 8},
    "nf_regnet_b0": SMALL,
    "timm_eca_nfnet_l0": {**SMALL, "group_width": 8},
    "timm_nf_resnet50": SMALL,
    "resnet50": SMALL,
}
BOTH = torch.randn(3, 3, 48, 32, generator=torch.Generator().manual_seed(0))


def network(name: str, **more: object) -> nn.Module:
    torch.manual_seed(1)
    net = create_model(name, num_classes=4, classifier_std=0.3, **NETS[name], **more)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith(("skip_gain", "conv2.gain")):
                parameter.fill_(0.5)
    return net.eval()


class Body(nn.Module):
    """The part of a network before its last map."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.forward_features(x)


class Head(Body):
    """The part after it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.forward_head(x)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_it_is_the_class_activation_map_if_the_map_is_averaged(name: str) -> None:
    net = network(name)
    features = net.forward_features(BOTH)
    weights = net.head.weight * net.head_scale
    for chosen in (0, [3, 1, 2], torch.tensor([2, 2, 0])):
        index = torch.as_tensor(chosen).expand(3)
        cam = torch.einsum("bk,bkhw->bhw", weights[index], features).relu() / features[0, 0].numel()
        torch.testing.assert_close(grad_cam(net, BOTH, classes=chosen), cam, rtol=1e-4, atol=1e-7)
    best = net(BOTH).argmax(dim=1)
    torch.testing.assert_close(grad_cam(net, BOTH), grad_cam(net, BOTH, classes=best))


@pytest.mark.parametrize("pool", ["max", "avgmax"])
def test_other_pooling_is_the_definition(pool: str) -> None:
    net = network("nfnet_f0", global_pool=pool)
    features = net.forward_features(BOTH).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.forward_head(features)[:, 1].sum(), features)
    wanted = (gradient.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    torch.testing.assert_close(grad_cam(net, BOTH, classes=1), wanted)


def test_a_layer_of_any_network() -> None:
    net = network("nf_resnet50")
    body = Body(net)
    last = grad_cam(nn.Sequential(body, Head(net)), BOTH, classes=1, layer=body)
    torch.testing.assert_close(last, grad_cam(net, BOTH, classes=1))
    inner = grad_cam(net, BOTH, classes=1, layer=net.stages[0])
    assert inner.shape[1] == 2 * last.shape[1]
    plain = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    )
    found = grad_cam(plain, BOTH, classes=1, layer=plain[1])
    wanted = torch.einsum("k,bkhw->bhw", plain[4].weight[1], plain[:2](BOTH)).relu() / found[0].numel()
    torch.testing.assert_close(found, wanted.detach())


def test_folding_keeps_the_map_and_nothing_is_left_behind() -> None:
    net = network("nf_resnet50").train()
    with torch.inference_mode():
        found = grad_cam(net, BOTH * 1.0, classes=2)
        inner = grad_cam(net, BOTH * 1.0, classes=2, layer=net.stages[0])
    assert bool(inner.any())
    assert net.training
    assert not net._forward_hooks
    assert all(parameter.grad is None for parameter in net.parameters())
    torch.testing.assert_close(grad_cam(fold(net.eval()), BOTH, classes=2), found, rtol=1e-3, atol=1e-6)
    assert grad_cam(net, BOTH[:0]).shape[0] == 0


def test_what_has_no_heat_map_is_refused() -> None:
    net = network("nf_resnet50")
    with pytest.raises(ValueError, match=r"classes has 1 to 4\. Allowed: 0 to 3\."):
        grad_cam(net, BOTH, classes=[1, 4, 2])
    with pytest.raises(ValueError, match=r"classes has the shape \(2,\) for 3 images"):
        grad_cam(net, BOTH, classes=[1, 2])
    with pytest.raises(
        ValueError, match=r"Net has no classes\. Allowed: a network that returns logits B K\."
    ):
        grad_cam(create_model("nf_resnet_nano", num_classes=0), BOTH)
    with pytest.raises(ValueError, match="Sequential has no forward_features and forward_head"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(4608, 2)), BOTH)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4608, 2))
    with pytest.raises(
        ValueError, match=r"the feature map of Sequential has the shape \(3, 4608\)\. Allowed: B C h w"
    ):
        grad_cam(flat, BOTH, layer=flat[0])
    with pytest.raises(ValueError, match="layer Flatten ran 0 times"):
        grad_cam(net, BOTH, layer=flat[0])


# --- overlays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", EVAL_CROPS)
@pytest.mark.parametrize("size", [(90, 60), (60, 90), (200, 37)])
@pytest.mark.parametrize("target", [64, (48, 80)])
def test_the_box_is_what_the_transform_shows(
    crop: str, size: tuple[int, int], target: int | tuple[int, int]
) -> None:
    """A smooth image, cut out at the box and resized, is the transformed image."""
    transform = eval_transform(image_size=target, crop=crop, crop_pct=0.9)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([255 * x / size[0], 255 * y / size[1], 0 * x], axis=-1).astype(np.uint8)
    shown = transform(Image.fromarray(pixels)).numpy().astype(float)
    left, top, right, bottom = transform.box(*size)
    height, width = shown.shape[1:]
    across = 255 * (left + (np.arange(width) + 0.5) * (right - left) / width) / size[0]
    down = 255 * (top + (np.arange(height) + 0.5) * (bottom - top) / height) / size[1]
    inside = slice(3, -3)
    columns = (across > 8) & (across < 247)  # letterbox: without the bars
    rows = (down > 8) & (down < 247)
    slack = 255 / size[0] + 3, 255 / size[1] + 3
    assert np.abs(shown[0].T[columns][:, rows].T[inside, inside] - across[columns][inside]).max() < slack[0]
    assert np.abs(shown[1][rows][:, columns].T[inside, inside] - down[rows][inside]).max() < slack[1]


def test_an_overlay_colors_where_the_heat_is() -> None:
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    heat = torch.zeros(2, 4)
    heat[0, 3] = 2.0
    drawn = np.asarray(overlay(image, heat, (0, 0, 40, 20))).astype(int)
    assert (drawn[:, :20] == 100).all()
    assert drawn[0, 39, 0] > 180
    assert (np.asarray(overlay(image, torch.zeros(2, 4), (0, 0, 40, 20))) == 100).all()
    # The map covers the right half, and a part outside of the image.
    drawn = np.asarray(overlay(image, torch.ones(2, 2), (20, -10, 60, 30))).astype(int)
    assert (drawn[:, :20] == 100).all()
    assert (drawn[:, 20:] != 100).any(axis=-1).all()
    large, box = fitted(image, (10, 0, 30, 20), smallest=80, largest=160)
    assert (large.size, box) == ((80, 40), (20.0, 0.0, 60.0, 40.0))
    assert fitted(image, box, smallest=1, largest=10)[0].size == (10, 5)
