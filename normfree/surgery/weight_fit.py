"""Fit of standardized convolutions to a network with folded batch norms.

The filters of a standardized weight have mean zero, those of a folded weight do not: standardization loses that mean.
Instead of dropping it, the fit takes the weight of mean zero whose output on the user's images is closest to that of
the folded network (least squares, one solve per layer). Gain and bias then restore the mean and variance of every
channel.

Shapes: O I H W as in a weight, N = I·H·W, G groups, P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from normfree.surgery.standardized_conv import Standardized
from normfree.surgery.trace import evaluation_mode

# Ridge of the least squares fit, as a fraction of the mean variance of the patches. It keeps a weight close to the
# folded one in directions in which the images do not vary.
RIDGE = 0.1
# Approximate number of patches that a weight is fitted to.
PATCHES = 8192
# The patches come from at least this many images, or from all of them.
IMAGES = 64
# Filters with more weights than this are not fitted, because there would be too few patches: their mean is subtracted.
LONGEST = 2304


@dataclass(frozen=True)
class Fit:
    """How closely one standardized convolution reproduces the folded one.

    Attributes:
        layer: name of the convolution.
        lost_mean: √N·‖μ‖ / ‖w‖, the fraction of the weight's norm that is due to the means μ of the filters.
        unexplained: mean square of the difference between its output and that of the folded network on the
            calibration images, divided by the variance of the latter. It includes the effect of earlier layers. None
            without images.
    """

    layer: str
    lost_mean: float
    unexplained: float | None


@torch.no_grad()
def standardize_(folded: nn.Module, layers: list[str], images: Tensor | None) -> list[Fit]:
    """Replace the convolutions named `layers` by standardized ones, in place.

    With images, the weights are fitted in the order of the network, each to the outputs of the layers that were already
    replaced. This takes one forward pass before and one after the replacement. Every channel of these convolutions then
    has the mean and variance of the folded network on the images, over batch and positions. Without images, the means
    of the filters are subtracted and biases stay.

    Args:
        folded: a network without batch norm.
        layers: names of convolutions that are called once per forward pass.
        images: B C H W, or None.
    """
    lost = {name: _lost_mean(_conv(folded, name)) for name in layers}
    weights = {name: _conv(folded, name).weight.detach().clone() for name in layers}
    targets = {} if images is None else _record_targets(folded, layers, images)
    for name in layers:
        folded.set_submodule(name, Standardized(folded.get_submodule(name)))
    found: dict[str, float] = {}
    if images is not None:

        def fit(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(module, Standardized)
            output, found[name] = _fit(module, weights[name], inputs[0], output, targets[name])
            return output

        evaluate_with(folded, layers, images, fit)
    return [Fit(name, lost[name], found.get(name)) for name in layers]


# --- one layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """The output of a convolution in the folded network.

    Attributes:
        mean: mean per channel over all images and positions, shape (O,).
        std: standard deviation per channel, shape (O,).
        images: indices of the images from which `sample` is taken.
        positions: flat indices of the positions from which `sample` is taken.
        sample: the output at these positions of these images, O P.
    """

    mean: Tensor
    std: Tensor
    images: Tensor
    positions: Tensor
    sample: Tensor


def _fit(
    module: Standardized, weight: Tensor, x: Tensor, output: Tensor, target: _Target
) -> tuple[Tensor, float]:
    """Set weight, gain and bias of `module` so that its output on `x` is close to `target`.

    Returns:
        The new output, and the mean square of its difference to the target, divided by the variance of the target.
    """
    conv = module.conv
    assert isinstance(conv, _ConvNd)
    assert conv.bias is not None
    if weight[0].numel() <= LONGEST:
        _set_weight_(module, _fitted(conv, weight, x, target))
        output = module.forward(x)
    mean, std = _moments(output)
    ratio = torch.where(std > 1e-6 * std.max(), target.std / std, torch.ones_like(std))
    module.gain.mul_(ratio)
    conv.bias.copy_((conv.bias - mean) * ratio + target.mean)
    output = module.forward(x)
    gap = (_sample(output, target.images, target.positions) - target.sample).double().square().mean()
    return output, float(gap / target.std.double().square().mean())


def _fitted(conv: _ConvNd, weight: Tensor, x: Tensor, target: _Target) -> Tensor:
    """Return the weight of mean zero per filter whose output on `x` is closest to `target`.

    Constants per channel are ignored, because the bias provides them. The weight is the solution of least squares with
    a ridge towards the folded weight, under the constraint that each filter sums to 0.
    """
    size, groups = weight[0].numel(), conv.groups
    patches = torch.cat(
        [_patches(conv, x[i : i + 1], target.positions) for i in target.images.tolist()], dim=2
    )
    # G O/G P
    goals = target.sample.reshape(groups, len(weight) // groups, -1)
    patches = patches - patches.mean(dim=2, keepdim=True)
    goals = goals - goals.mean(dim=2, keepdim=True)
    filters = weight.reshape(groups, len(weight) // groups, size)
    covariance = patches @ patches.transpose(1, 2) / patches.shape[2]
    scale = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    covariance = covariance + RIDGE * scale * torch.eye(size).to(x)
    # G N O/G
    missing = patches @ (goals - filters @ patches).transpose(1, 2) / patches.shape[2]
    solved = torch.linalg.solve(covariance, torch.cat([missing, torch.ones_like(missing[..., :1])], dim=2))
    # Each filter is moved along the direction that makes its sum 0 at the lowest cost.
    direction = solved[..., -1:].transpose(1, 2)
    filters = filters + solved[..., :-1].transpose(1, 2)
    filters = filters - filters.sum(dim=2, keepdim=True) * direction / direction.sum(dim=2, keepdim=True)
    return filters.reshape(weight.shape)


def _patches(conv: _ConvNd, x: Tensor, positions: Tensor) -> Tensor:
    """Return the input patches of each filter at `positions` of one image, G N P.

    The convolution itself extracts them, with filters that each copy one pixel, so any padding is handled.
    """
    size, groups = conv.weight[0].numel(), conv.groups
    copies = torch.eye(size).to(x).repeat(groups, 1).reshape(groups * size, *conv.weight.shape[1:])
    out: Tensor = functional_call(conv, {"weight": copies, "bias": x.new_zeros(len(copies))}, (x,))
    return out.flatten(2)[0, :, positions].view(groups, size, -1)


def _set_weight_(module: Standardized, value: Tensor) -> None:
    """Set the standardized weight of `module` to `value`, whose filters have mean zero."""
    filters = value.flatten(1)
    norm = filters.norm(dim=1)
    weight = module.conv.weight
    assert isinstance(weight, Tensor)
    unit = filters / norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None]
    weight.copy_(torch.where(norm[:, None] > 0, unit, weight.flatten(1)).view_as(weight))
    module.gain.copy_(norm / module.input_scale)


def _lost_mean(conv: _ConvNd) -> float:
    """Return `Fit.lost_mean` of a convolution."""
    filters = conv.weight.detach().flatten(1).double()
    lost = filters.mean(dim=1).square().sum() * filters.shape[1]
    return float((lost / filters.square().sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


# --- the whole network -------------------------------------------------------------------------------


def _conv(model: nn.Module, name: str) -> _ConvNd:
    """Return the convolution called `name`."""
    conv = model.get_submodule(name)
    assert isinstance(conv, _ConvNd)
    return conv


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per channel."""
    channels = x.transpose(0, 1).flatten(1)
    return channels.mean(dim=1), channels.std(dim=1, correction=0)


def _sample(x: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """Return the channels of a map at some positions of some images, O P."""
    return x[images].flatten(2)[:, :, positions].transpose(0, 1).flatten(1)


def _record_targets(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, _Target]:
    """Record the outputs of `layers` on the images."""
    targets: dict[str, _Target] = {}
    generator = torch.Generator().manual_seed(0)

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        area = output[0, 0].numel()
        count = min(len(output), max(IMAGES, -(-PATCHES // area)))
        chosen = torch.linspace(0, len(output) - 1, count).round().long()
        positions = torch.randperm(area, generator=generator)[: -(-PATCHES // count)]
        targets[name] = _Target(*_moments(output), chosen, positions, _sample(output, chosen, positions))

    evaluate_with(model, layers, images, record)
    return targets


def evaluate_with(
    model: nn.Module,
    layers: list[str],
    images: Tensor,
    hook: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None],
) -> None:
    """Evaluate the model on all images in one batch, with a forward hook on each layer.

    `hook(name, module, inputs, output)` may return a replacement of the output.
    """
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in layers]
    try:
        with evaluation_mode(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
