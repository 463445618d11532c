"""Parameters and multiply-accumulates of a variant, by arithmetic alone: microseconds instead of seconds.

The tests compare the results with the network itself, built and run on the meta device, for every variant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from normfree.models.variant import STEMS, Variant, eca_kernel_size


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulates for one image (called FLOPs in [B] table 3)."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class _Conv:
    """One convolution: channels, kernel size, groups, and the side of its output map in pixels."""

    inputs: int
    outputs: int
    kernel_size: int
    groups: int
    side: int

    @property
    def weights(self) -> int:
        return self.outputs * (self.inputs // self.groups) * self.kernel_size**2


def _shrink(side: int, stride: int) -> int:
    return math.ceil(side / stride)  # SAME padding


def _block(
    variant: Variant, inputs: int, outputs: int, stride: int, side: int, first: bool
) -> Iterator[_Conv]:
    width, groups = variant.branch_width(in_channels=inputs, out_channels=outputs, first=first)
    after = _shrink(side, stride)
    if stride > 1 or inputs != outputs:
        yield _Conv(inputs, outputs, 1, 1, after)
    yield _Conv(inputs, width, 1, 1, side)
    yield _Conv(width, width, 3, groups, after)
    if variant.second_conv:
        yield _Conv(width, width, 3, groups, after)
    yield _Conv(width, outputs, 1, 1, after)


def count(
    variant: Variant, *, image_size: int | None = None, num_classes: int = 1000, in_channels: int = 3
) -> Cost:
    """Return parameters and multiply-accumulates of a variant for one square image.

    Convolutions and matrix products are counted, elementwise operations are not, as in [B] table 3.

    Args:
        variant: the network.
        image_size: side in pixels; None is the variant's test size.
        num_classes: of the classifier.
        in_channels: of the image.
    """
    side = image_size or variant.test_size
    batch_norm = variant.norm == "batch"
    stem = STEMS[variant.stem]
    convs: list[_Conv] = []
    channels, norms, linears, others, eca_macs = in_channels, 0, 0, 0, 0
    for i, (kernel_size, width, stride) in enumerate(stem.convs):
        out, side = variant.stem_width(width), _shrink(side, stride)
        norms += channels if i else 0
        convs.append(_Conv(channels, out, kernel_size, 1, side))
        channels = out
    side = _shrink(side, 2) if stem.max_pool else side
    for s, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
        for j in range(depth):
            stride, first = variant.strides[s] if j == 0 else 1, s == j == 0
            convs += _block(variant, channels, width, stride, side, first)
            side = _shrink(side, stride)
            branch, _ = variant.branch_width(in_channels=channels, out_channels=width, first=first)
            norms += channels + branch * (3 if variant.second_conv else 2)
            gated = branch if variant.attention_at == "middle" else width
            if variant.attention == "se":
                hidden = variant.se_width(gated)
                linears += 2 * gated * hidden
                others += gated + hidden  # biases
            elif variant.attention == "eca":
                others += eca_kernel_size(gated)
                eca_macs += gated * eca_kernel_size(gated)
            others += 0 if batch_norm or variant.skipinit == "channel" else 1  # skip gain
            channels = width
    if variant.head_ratio[0]:
        convs.append(_Conv(channels, variant.head_width, 1, 1, side))
    norms += variant.head_width
    linears += variant.head_width * num_classes
    # scale and shift of a norm, or gain and bias of a convolution
    per_channel = 2 * norms if batch_norm else 2 * sum(c.outputs for c in convs)
    parameters = sum(c.weights for c in convs) + per_channel + linears + others + num_classes
    return Cost(parameters, sum(c.weights * c.side**2 for c in convs) + linears + eca_macs)
