"""A converted network has no operation in place that hooks or functional transforms could see."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from normfree.surgery.batchnorm import Copying, batchnorms
from normfree.surgery.convert import convert_batchnorm
from normfree.surgery.trace import traced_parts


def trainable(net: nn.Module) -> nn.Module:
    """Return `net` in training mode without random parts."""
    for module in net.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    return net.train()


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35),
    "efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=5),
    "timm:test_resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "timm:test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_and_functional_transforms_see_the_gradients_of_each_example(
    with_random_norms: Callable[..., nn.Module], name: str
) -> None:
    """Full backward hooks on every module, kept activations, and vmap(grad) against a loop over the examples."""
    net = with_random_norms(NETWORKS[name](), std=0.1).double()
    images, targets = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.arange(2)
    converted, report = convert_batchnorm(net, images)
    assert report.error < 1e-12
    assert not [m for m in converted.modules() if getattr(m, "inplace", False)]
    trainable(converted)
    parameters = dict(converted.named_parameters())

    def loss(p: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(converted, p, image[None]), target[None])

    loop = [
        torch.autograd.grad(loss(parameters, x, y), list(parameters.values()))
        for x, y in zip(images, targets, strict=True)
    ]
    detached = {k: v.detach() for k, v in parameters.items()}
    vmapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(detached, images, targets)
    for i, key in enumerate(parameters):
        torch.testing.assert_close(vmapped[key], torch.stack([g[i] for g in loop]), rtol=1e-9, atol=1e-12)

    hooked, kept = copy.deepcopy(converted), []
    for module in hooked.modules():
        module.register_full_backward_hook(lambda *_: None)
        module.register_forward_hook(
            lambda _m, inputs, out: kept.extend((t, t.clone()) for t in (*inputs, out))
        )
    F.cross_entropy(hooked(images.clone().requires_grad_()), targets, reduction="sum").backward()
    assert all(torch.equal(now, then) for now, then in kept)
    for parameter, grads in zip(hooked.parameters(), zip(*loop, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad, sum(grads), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "timm:test_resnet"])
def test_no_identity_is_changed_in_place(with_random_norms: Callable[..., nn.Module], name: str) -> None:
    """Each residual sum of a ResNet writes to the output of the norm, so that output must be a copy."""
    net = with_random_norms(NETWORKS[name](), std=0.1)
    safe, lean = convert_batchnorm(net).model, convert_batchnorm(net, hooks_safe=False).model
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(safe(images), lean(images))
    assert not [m for m in lean.modules() if isinstance(m, Copying)]
    assert [m.inplace for m in lean.modules() if hasattr(m, "inplace")] == [
        m.inplace for m in net.modules() if hasattr(m, "inplace")
    ]
    if name == "resnet18":
        assert sum(isinstance(m, Copying) for m in safe.modules()) == 8
        lean.layer1[0].bn2.register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="modified inplace"):
            lean.train()(images)
    assert safe.state_dict().keys() == lean.state_dict().keys()
    compiled = torch.compile(safe.eval(), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), safe(images))
    again = torch.export.export(safe, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(again(images), safe(images))


def test_hooks_see_the_gradients_of_a_network_with_standardized_weights() -> None:
    """The residual sum writes to the output of what was the norm, also if its layer is standardized."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    plain = trainable(convert_batchnorm(net, how="normalizer_free").model).double()
    hooked = copy.deepcopy(plain)
    for module in hooked.modules():
        module.register_full_backward_hook(lambda *_: None)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for each in (plain, hooked):
        each(images.clone().requires_grad_()).square().sum().backward()
    for one, other in zip(plain.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


class Unfolded(nn.Module):
    """A norm without a layer before it, whose output is changed in place by a function and an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm0(x), inplace=True)
        z = self.norm1(x)
        z *= 2
        return z.add_(y)


def test_outputs_of_scale_and_shift_are_copied(with_random_norms: Callable[..., nn.Module]) -> None:
    net, images = with_random_norms(Unfolded(), std=0.1), torch.randn(2, 3, 4, 4)
    converted = convert_batchnorm(net, images).model
    assert converted.norm0.copies
    assert converted.norm1.copies
    for module in converted.modules():
        module.register_full_backward_hook(lambda *_: None)
    torch.testing.assert_close(converted(images), net(images))
    converted(images.clone().requires_grad_()).sum().backward()


class Encoder(nn.Module):
    """A part that torch.fx can trace, in a model that it cannot, with a convolution that the model calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm1(self.conv1(self.norm0(self.conv0(x))))


class Optional(Encoder):
    """A part with an argument that has a default value, and another meaning with another value."""

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:  # type: ignore[override]
        return self.conv0(x) if raw else super().forward(x)


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.optional = Encoder(), Optional()
        self.shared = self.encoder.conv1

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        raw = self.optional(x, raw=True)
        return self.shared(self.encoder(x)).mean() + raw + self.optional(x).mean()


def test_models_that_cannot_be_traced_are_folded_part_by_part(
    with_random_norms: Callable[..., nn.Module],
) -> None:
    net, images = with_random_norms(Outer(), std=0.1).double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert list(traced_parts(net)) == ["encoder"]
    converted, report = convert_batchnorm(net, images)
    assert report.error < 1e-12
    assert [(c.norm, c.change, c.layer) for c in report.layers] == [
        ("encoder.norm0", "folded", "encoder.conv0"),
        ("encoder.norm1", "scale and shift", "encoder.norm1"),
        ("optional.norm0", "scale and shift", "optional.norm0"),
        ("optional.norm1", "scale and shift", "optional.norm1"),
    ]
    assert not batchnorms(converted)
