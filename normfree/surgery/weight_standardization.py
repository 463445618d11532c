"""Convolutions of other networks with standardized kernels, fitted so that a folded network is reproduced closely.

A standardized kernel has mean zero per filter, a folded one has not: that mean is what is lost. Instead of dropping it,
the kernel of mean zero is taken whose response on the user's images is nearest to the folded network's (least squares,
one solve per layer), then gain and bias give every channel its mean and variance back. Legend: O I H W as in a kernel,
N = I·H·W, G groups, P patches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from normfree.models.layers import standardize

#: Ridge, in parts of the patches' mean variance: holds a kernel at the folded one where the images say nothing.
RIDGE = 0.1
#: About how many patches a kernel is fitted to, from at least how many images (or all), and the longest patch that is
#: fitted: longer ones would ask for more patches than there are, and lose their mean evenly.
PATCHES, IMAGES, LONGEST = 8192, 64, 2304


class Standardized(nn.Module):
    """Any convolution with scaled weight standardization: `WSConv2d`'s kernel, the convolution's own padding, stride,
    dilation and groups. Parameters: `conv.weight`, `conv.bias`, and a `gain` for each output channel. It takes `conv`
    over, with the same kernel up to the filters' means, and gives it a bias if it has none.

    `input_scale` is a constant that the input would otherwise be multiplied by, as in `WSConv2d`. The kernel's scale is
    free and is set to 1 per filter, far from the constant that keeps `standardize` from dividing by zero.

    Raises:
        ValueError: the fan-in is 1, so that every standardized weight would be 0.
    """

    def __init__(self, conv: nn.Module, *, input_scale: float = 1.0) -> None:
        super().__init__()
        if not can_be_standardized(conv):
            raise ValueError(f"Standardized takes a convolution with a fan-in above 1, not {conv}.")
        assert isinstance(conv, _ConvNd)
        self.conv, self.input_scale = conv, input_scale
        rows = conv.weight.detach().flatten(1)
        centered = rows - rows.mean(dim=1, keepdim=True)
        norm = centered.norm(dim=1)
        self.gain = nn.Parameter(norm / input_scale)
        if conv.bias is None:
            conv.bias = nn.Parameter(rows.new_zeros(len(rows)))
        fill = nn.init.normal_(torch.empty_like(centered), std=rows.shape[1] ** -0.5)
        unit = torch.where(norm[:, None] > 0, centered / norm[:, None], fill)
        with torch.no_grad():
            conv.weight.copy_(unit.view_as(conv.weight))

    def standardized_weight(self) -> Tensor:
        """The kernel that the convolution uses, O I H W."""
        weight = self.conv.weight
        assert isinstance(weight, Tensor)
        return standardize(weight, self.gain, scale=self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.conv, {"weight": self.standardized_weight()}, (x,))
        return out

    def extra_repr(self) -> str:
        return f"input_scale={self.input_scale:.6g}"


@dataclass(frozen=True)
class Fit:
    """How well one standardized convolution stands for the folded one.

    lost_mean: √N·‖μ‖ / ‖w‖, the part of the kernel's norm that is filter means.
    unexplained: on the calibration images, mean square of the difference between its output and that of the folded
        network at the same place, by the variance of the latter; it includes what earlier layers did. None without
        images.
    """

    layer: str
    lost_mean: float
    unexplained: float | None


def can_be_standardized(module: nn.Module) -> bool:
    """A convolution, not transposed nor parametrized, whose filters have more than one weight."""
    return (
        isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and not parametrize.is_parametrized(module)
        and module.weight[0].numel() > 1
    )


def scales_with_weight(conv: nn.Module) -> bool:
    """Whether twice the weight gives twice the output, bias aside: not so where a class changes its weight first."""
    assert isinstance(conv, _ConvNd)
    if type(conv).__module__.startswith("torch.nn."):
        return True
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, conv.in_channels, *[16] * (conv.weight.dim() - 2), generator=generator).to(
        conv.weight
    )
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.bias = None
        once = twin(probe)
        twin.weight.mul_(2)
        return torch.allclose(twin(probe), 2 * once, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def standardize_(folded: nn.Module, layers: list[str], images: Tensor | None) -> list[Fit]:
    """Replaces the convolutions named `layers`, each called once per image, in place by standardized ones. Fits them to
    `images` in the order of the network, each on what the ones before it now put out: one pass before, one after.

    With images, mean and variance of every channel of every such convolution are those of the folded network on the
    same images, over batch and positions. Without, kernels lose their mean evenly and biases stay.
    """
    lost = {name: _lost_mean(_conv(folded, name)) for name in layers}
    kernels = {name: _conv(folded, name).weight.detach().clone() for name in layers}
    wanted = {} if images is None else _recorded(folded, layers, images)
    for name in layers:
        folded.set_submodule(name, Standardized(folded.get_submodule(name)))
    found: dict[str, float] = {}
    if images is not None:

        def fit(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            assert isinstance(module, Standardized)
            output, found[name] = _fit(module, kernels[name], inputs[0], output, wanted[name])
            return output

        evaluate_with(folded, layers, images, fit)
    return [Fit(name, lost[name], found.get(name)) for name in layers]


# --- one layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What a convolution of the folded network put out: mean and deviation per channel, over all images; and some of
    it, O P, at `positions` of `images`."""

    mean: Tensor
    std: Tensor
    images: Tensor
    positions: Tensor
    some: Tensor


def _fit(
    module: Standardized, kernel: Tensor, x: Tensor, output: Tensor, wanted: _Wanted
) -> tuple[Tensor, float]:
    """Sets kernel, gain and bias of `module` from its input and what its output should be. Returns the new output, and
    the mean square of what is left between the two, by the variance of the latter."""
    conv = module.conv
    assert isinstance(conv, _ConvNd)
    assert conv.bias is not None
    if kernel[0].numel() <= LONGEST:
        _set_kernel_(module, _fitted(conv, kernel, x, wanted))
        output = module.forward(x)
    mean, std = _moments(output)
    ratio = torch.where(std > 1e-6 * std.max(), wanted.std / std, torch.ones_like(std))
    module.gain.mul_(ratio)
    conv.bias.copy_((conv.bias - mean) * ratio + wanted.mean)
    output = module.forward(x)
    gap = (_some(output, wanted.images, wanted.positions) - wanted.some).double().square().mean()
    return output, float(gap / wanted.std.double().square().mean())


def _fitted(conv: _ConvNd, kernel: Tensor, x: Tensor, wanted: _Wanted) -> Tensor:
    """The kernel of mean zero per filter whose response to `x` is nearest to what is wanted, up to a constant per
    channel: least squares with a ridge towards the folded kernel, under the constraint that each filter sums to 0."""
    size, groups = kernel[0].numel(), conv.groups
    patches = torch.cat(
        [_patches(conv, x[i : i + 1], wanted.positions) for i in wanted.images.tolist()], dim=2
    )
    goals = wanted.some.reshape(groups, len(kernel) // groups, -1)  # G O/G P
    patches = patches - patches.mean(dim=2, keepdim=True)
    goals = goals - goals.mean(dim=2, keepdim=True)
    rows = kernel.reshape(groups, len(kernel) // groups, size)
    covariance = patches @ patches.transpose(1, 2) / patches.shape[2]
    scale = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    covariance = covariance + RIDGE * scale * torch.eye(size).to(x)
    missing = patches @ (goals - rows @ patches).transpose(1, 2) / patches.shape[2]  # G N O/G
    solved = torch.linalg.solve(covariance, torch.cat([missing, torch.ones_like(missing[..., :1])], dim=2))
    # what is added to a filter so that it sums to 0, in the direction that costs least
    direction = solved[..., -1:].transpose(1, 2)
    rows = rows + solved[..., :-1].transpose(1, 2)
    rows = rows - rows.sum(dim=2, keepdim=True) * direction / direction.sum(dim=2, keepdim=True)
    return rows.reshape(kernel.shape)


def _patches(conv: _ConvNd, x: Tensor, positions: Tensor) -> Tensor:
    """What each filter sees of an image, G N P. The convolution cuts it out itself, with filters that copy one pixel
    each, and so with whatever padding it has."""
    size, groups = conv.weight[0].numel(), conv.groups
    copies = torch.eye(size).to(x).repeat(groups, 1).reshape(groups * size, *conv.weight.shape[1:])
    out: Tensor = functional_call(conv, {"weight": copies, "bias": x.new_zeros(len(copies))}, (x,))
    return out.flatten(2)[0, :, positions].view(groups, size, -1)


def _set_kernel_(module: Standardized, kernel: Tensor) -> None:
    rows = kernel.flatten(1)
    norm = rows.norm(dim=1)
    weight = module.conv.weight
    assert isinstance(weight, Tensor)
    unit = rows / norm.clamp(min=torch.finfo(norm.dtype).tiny)[:, None]
    weight.copy_(torch.where(norm[:, None] > 0, unit, weight.flatten(1)).view_as(weight))
    module.gain.copy_(norm / module.input_scale)


def _lost_mean(conv: _ConvNd) -> float:
    rows = conv.weight.detach().flatten(1).double()
    lost = rows.mean(dim=1).square().sum() * rows.shape[1]
    return float((lost / rows.square().sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())


# --- the whole network -------------------------------------------------------------------------------


def _conv(model: nn.Module, name: str) -> _ConvNd:
    conv = model.get_submodule(name)
    assert isinstance(conv, _ConvNd)
    return conv


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, over all else."""
    rows = x.transpose(0, 1).flatten(1)
    return rows.mean(dim=1), rows.std(dim=1, correction=0)


def _some(x: Tensor, images: Tensor, positions: Tensor) -> Tensor:
    """O P: the channels at some positions of some images."""
    return x[images].flatten(2)[:, :, positions].transpose(0, 1).flatten(1)


def _recorded(model: nn.Module, layers: list[str], images: Tensor) -> dict[str, _Wanted]:
    kept: dict[str, _Wanted] = {}
    generator = torch.Generator().manual_seed(0)

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        area = output[0, 0].numel()
        count = min(len(output), max(IMAGES, -(-PATCHES // area)))
        chosen = torch.linspace(0, len(output) - 1, count).round().long()
        positions = torch.randperm(area, generator=generator)[: -(-PATCHES // count)]
        kept[name] = _Wanted(*_moments(output), chosen, positions, _some(output, chosen, positions))

    evaluate_with(model, layers, images, record)
    return kept


def evaluate_with(
    model: nn.Module,
    layers: list[str],
    images: Tensor,
    hook: Callable[[str, nn.Module, tuple[Tensor, ...], Tensor], Tensor | None],
) -> None:
    """Evaluates the model on all images at once; `hook` sees every layer's name, input and output, and may replace the
    latter."""
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
