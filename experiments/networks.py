"""The networks of the experiments: small variants, and twins that replace the normalizer-free layers by other
methods.

A twin has the convolutions, the depths and the widths of a variant. Its `method` is one of METHODS:

    nf              the normalizer-free network: scaled weight standardization, α and β
    batch           batch norm
    group           group norm in place of batch norm (Wu and He 2018, arXiv 1803.08494), in groups of 8 channels
    skipinit        no norm; each branch has a gain that starts at 0 (De and Smith 2020, arXiv 2002.10444)
    fixup           no norm; Fixup initialization (Zhang et al. 2019, arXiv 1901.09321)
    unstandardized  α and β of the normalizer-free network, but plain convolutions of He et al. 2015
    plain           nothing: plain convolutions of He et al. 2015
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.data.seeds import key
from normfree.models.activations import GAINS
from normfree.models.layers import Conv2d, WSConv2d
from normfree.models.net import Block, Net
from normfree.models.variant import Variant
from normfree.models.variants import VARIANTS
from normfree.suggest import unknown

METHODS = ("nf", "batch", "group", "skipinit", "fixup", "unstandardized", "plain")
GROUP = 8  # channels in a group of group norm

_THIN = replace(
    VARIANTS["nf_resnet_nano"],
    stem="conv3_stride2",
    depths=(2, 2, 2),
    widths=(32, 64, 128),
    drop_rate=0.0,
    stochdepth_rate=0.0,
)
# NFNet-F0 with an eighth of the channels, for images of 32 px.
_F0 = replace(
    VARIANTS["nfnet_f0"],
    stem="conv3_stride2",
    widths=(32, 64, 192, 192),
    group_width=16,
    strides=(1, 2, 2, 2),
    drop_rate=0.0,
    stochdepth_rate=0.0,
    skip_gain=1.0,
)
BASES: dict[str, Variant] = {
    # Six bottleneck blocks at 16, 8 and 4 px, which two cores can train hundreds of times.
    "thin": _THIN,
    "mini": replace(VARIANTS["nf_resnet_mini"], drop_rate=0.0, stochdepth_rate=0.0),
    # Bottleneck blocks without squeeze-excite, for the experiment on depth; `depths` is set there.
    "deep": replace(_THIN, attention="none", activation="relu"),
    "f0": _F0,
    "tiny": replace(_THIN, depths=(1, 1, 1), widths=(16, 16, 16)),  # for tests
    "tiny_f0": replace(_F0, depths=(1, 1, 1, 1)),
}


def measure_statistics_(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of batch norm to their average over batches of inputs; leave `net` in eval mode."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    net.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    with torch.no_grad():
        for inputs in batches:
            net(inputs)
    net.eval()


def variant_for(base: str, method: str, fields: Mapping[str, Any]) -> Variant:
    """Return the variant of a network: a base with some fields changed, with batch norm if the method builds on it."""
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    variant = BASES[base].with_overrides(dict(fields))
    if method in ("batch", "group"):
        return replace(variant, norm="batch")
    if method == "skipinit":
        return replace(variant, alpha=1.0, skip_gain=0.0)
    if method in ("fixup", "plain"):
        return replace(variant, alpha=1.0, skip_gain=1.0)
    return variant


def build(base: str, method: str, *, classes: int, seed: int, fields: Mapping[str, Any] | None = None) -> Net:
    """Return a network of a method with the initial weights of a seed, which twins with the same layers share.

    Raises:
        ValueError: the method or a field is unknown.
    """
    torch.manual_seed(key(seed, "init"))
    net = Net(variant_for(base, method, fields or {}), name=base, num_classes=classes)
    if method == "group":
        for module in list(net.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, group_norm(child.num_features))
    elif method in ("skipinit", "unstandardized", "plain"):
        _replace_convolutions(net, scaled=method == "unstandardized")
        if method == "plain":
            for block in _blocks(net):
                block.skip_gain = None
    elif method == "fixup":
        _replace_convolutions(net, scaled=False)
        _fixup_(net)
    return net


def group_norm(channels: int) -> nn.GroupNorm:
    """Return group norm with GROUP channels in each group, or one group for fewer channels."""
    return nn.GroupNorm(max(1, channels // GROUP), channels)


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:.6g}"


class ScalarBias(nn.Module):
    """Addition of one learnable number, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _blocks(net: Net) -> list[Block]:
    return [module for module in net.modules() if isinstance(module, Block)]


def _replace_convolutions(net: Net, *, scaled: bool) -> None:
    """Replace each standardized convolution by a plain one with bias, of variance 2 / fan-in, 1 / fan-in in the stem.

    Args:
        scaled: keep β, which scales the input, but not γ, which belongs to the standardized weight.
    """
    gamma = GAINS[net.variant.activation]
    for name, conv in list(net.named_modules()):
        if not isinstance(conv, WSConv2d):
            continue
        size, stem = conv.weight.shape[-1], name == "stem.conv0"
        plain = Conv2d(
            conv.in_channels,
            conv.out_channels,
            kernel_size=size,
            stride=conv.stride,
            groups=conv.groups,
            bias=True,
            padding=conv.padding,
        )
        assert plain.bias is not None
        nn.init.zeros_(plain.bias)
        if stem:  # its input has passed no ReLU
            with torch.no_grad():
                plain.weight.mul_(0.5**0.5)
        beta = 1.0 if stem or not scaled else conv.input_scale / gamma
        net.set_submodule(name, plain if beta == 1.0 else nn.Sequential(Scale(beta), plain))


def _fixup_(net: Net) -> None:
    """Initialize a network of plain convolutions by Fixup, for branches of three or four convolutions.

    1. The classifier and the last convolution of each branch start at 0.
    2. The others of a branch are scaled by L^(-1 / (2m - 2)), for L blocks and m convolutions in a branch.
    3. A learnable number is added before each convolution and activation, and one multiplies each branch.
    """
    blocks = _blocks(net)
    nn.init.zeros_(net.head.weight)
    for block in blocks:
        convs = ["conv0", "conv1", *(["conv1b"] if block.second_conv else []), "conv2"]
        factor = len(blocks) ** (-1 / (2 * len(convs) - 2))
        for name in convs:
            conv = block.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            with torch.no_grad():
                conv.weight.mul_(0.0 if name == "conv2" else factor)
            conv.bias = None
            block.set_submodule(name, nn.Sequential(ScalarBias(), conv))
        for name in ("norm0", "norm1", *(["norm1b"] if block.second_conv else []), "norm2"):
            block.set_submodule(name, ScalarBias())


class VirtualBatchNorm(nn.Module):
    """Batch norm with the statistics of each of `devices` equal, consecutive parts of the batch.

    In evaluation it uses running statistics, averaged over the devices, as distributed training does.
    """

    def __init__(self, norm: nn.BatchNorm2d, devices: int) -> None:
        super().__init__()
        self.norm, self.devices = norm, devices
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).repeat(devices))

    def forward(self, x: Tensor) -> Tensor:
        g, (count, channels, height, width) = self.devices, x.shape
        if not self.training:
            mean, var = (b.view(g, channels).mean(dim=0) for b in (self.running_mean, self.running_var))
            return F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        parts = x.reshape(g, count // g, channels, height, width).transpose(0, 1)
        normed = F.batch_norm(
            parts.reshape(count // g, g * channels, height, width),
            self.running_mean,
            self.running_var,
            self.norm.weight.repeat(g),
            self.norm.bias.repeat(g),
            training=True,
            momentum=0.1,
            eps=self.norm.eps,
        )
        return normed.view(count // g, g, channels, height, width).transpose(0, 1).reshape(x.shape)


def on_devices_(net: nn.Module, devices: int) -> None:
    """Give each batch norm of a network the statistics of `devices` virtual devices."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, VirtualBatchNorm(child, devices))
