"""The layers that make a network trainable without normalization.

Shapes: images and activations are B C H W, convolution kernels O I H W (I per group), linear weights O I.
Sources: [A] arXiv 2101.08692 (NF-ResNets), [B] arXiv 2102.06171 (NFNets), and DeepMind's released
`nfnets` code, which produced the published weights and wins wherever it differs from the papers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.ops.conv2d import Activation, convolve
from normfree.ops.gated_add import spatial_mean
from normfree.ops.padding import pad_input
from normfree.ops.standardize_torch import WS_EPS

# --- activations and their gains ---------------------------------------------------------------------


# --- scaled weight standardization -------------------------------------------------------------------


def standardize(weight: Tensor, gain: Tensor, *, scale: float = 1.0, eps: str = "floor") -> Tensor:
    """The standardized kernel: per output channel, zero mean and variance (gain·scale)² / fan-in.

    ŵ = (w - μ) · gain · scale / sqrt(max(v·N, 1e-4)), with N the fan-in (I·H·W), μ the mean and v the biased
    variance of a filter. The constant is a floor on v·N, not an addend: below it no gradient flows through v;
    at equality half of it does (reference code, `WSConv2D`). `eps="add"` divides by sqrt((v + 1e-5)·N) instead,
    as timm does. `weight`: O I H W; `gain`: O; result: as `weight`. Computed in float32 at least, returned in the
    weight's type.
    """
    rows = weight.flatten(1)
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.float()
    centered = rows - rows.mean(dim=1, keepdim=True)
    power = centered.square().sum(dim=1)  # v·N
    if eps == "floor":
        power = torch.maximum(power, power.new_full((), WS_EPS["floor"]))
    else:
        power = power + WS_EPS["add"] * rows.shape[1]
    row_scale = (gain.to(rows.dtype) * torch.rsqrt(power) * scale).unsqueeze(1)
    return (centered * row_scale).view_as(weight).to(weight.dtype)


class WSConv2d(nn.Module):
    """Convolution with scaled weight standardization ([A] section 4; reference `WSConv2D`).

    y = conv(x, standardize(weight, gain, scale=input_scale, eps=eps), stride, groups) + bias

    `input_scale` is a constant that the input would otherwise be multiplied by: γ of the activation before
    it and β of the block. It rides in the kernel, so that no activation is touched. Input B C H W, output
    B O ceil(H/stride) ceil(W/stride). Initial values (reference): weight ~ N(0, 1/fan-in), gain 1, bias 0.

    Raises:
        ValueError: the fan-in is 1 (every standardized weight would be 0) or `groups` does not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        input_scale: float = 1.0,
        padding: str = "same",
        eps: str = "floor",
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"WSConv2d({in_channels}, {out_channels}, groups={groups}): groups must divide both channel "
                f"counts; the largest that does is {math.gcd(in_channels, out_channels)}."
            )
        fan_in = in_channels // groups * kernel_size**2
        if fan_in == 1:
            raise ValueError(
                f"WSConv2d({in_channels}, {out_channels}, kernel_size={kernel_size}, groups={groups}): fan-in "
                "is 1, standardized weights would all be zero. Use a larger kernel_size or fewer groups."
            )
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.shared_kernel: Tensor | None = None  # set while `standardized_once` holds the kernels of a step
        self.input_scale, self.padding, self.eps = input_scale, padding, eps
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.normal_(self.weight, std=fan_in**-0.5)

    def standardized_weight(self) -> Tensor:
        """The kernel that the convolution uses, O I H W."""
        if self.shared_kernel is not None:
            return self.shared_kernel
        return standardize(self.weight, self.gain, scale=self.input_scale, eps=self.eps)

    def forward(self, x: Tensor, act: Activation | None = None) -> Tensor:
        """Of `act(x)`, if `act` is given; its value is then not kept for the backward pass."""
        return convolve(
            x, self.standardized_weight(), self.bias, act=act, stride=self.stride, groups=self.groups,
            padding=self.padding,
        )  # fmt: skip

    def extra_repr(self) -> str:
        o, i = self.weight.shape[:2]
        return (
            f"{i * self.groups}, {o}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, input_scale={self.input_scale:.6g}, padding={self.padding!r}, "
            f"eps={self.eps!r}, bias={self.bias is not None}"
        )


class Conv2d(nn.Conv2d):
    """Plain convolution with the same two paddings, for batch-norm twins (no bias: the norm has one) and folded
    networks. `pad_mode` is "same" or "symmetric"; see `pad_input`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        padding: str = "same",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias)
        self.pad_mode = padding
        # He et al. 2015: variance 2 / fan-in, as in the papers' batch-norm signal propagation plots.
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, act: Activation | None = None) -> Tensor:
        """Of `act(x)`, if `act` is given; its value is then not kept for the backward pass."""
        return convolve(
            x,
            self.weight,
            self.bias,
            act=act,
            stride=self.stride[0],
            groups=self.groups,
            padding=self.pad_mode,
        )


def avg_pool_same(x: Tensor) -> Tensor:
    """2x2 average pool, stride 2, SAME; at an odd border it divides by the elements inside (reference)."""
    return F.avg_pool2d(x, 2, stride=2, ceil_mode=True, count_include_pad=False)


def max_pool(x: Tensor, *, padding: str = "same") -> Tensor:
    """3x3 max pool, stride 2 (the NF-ResNet stem)."""
    x, sides = pad_input(x, 3, 2, padding=padding, value=-math.inf)
    return F.max_pool2d(x, 3, stride=2, padding=sides)


# --- gates -------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """sigmoid(fc1(relu(fc0(mean over H, W)))): B C H W -> a gate B C 1 1.

    Plain ReLU without γ: the reference's default, never overridden, though [B] appendix C writes GELU.
    Initial weights: normal cut at two sigma, sigma = fan-in ** -0.5, not corrected for the cut (Haiku's
    default), biases 0.
    """

    def __init__(self, channels: int, *, hidden: int) -> None:
        super().__init__()
        self.fc0 = nn.Linear(channels, hidden)
        self.fc1 = nn.Linear(hidden, channels)
        for fc in (self.fc0, self.fc1):
            sigma = fc.in_features**-0.5
            nn.init.trunc_normal_(fc.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        pooled = spatial_mean(x)
        return torch.sigmoid(self.fc1(F.relu(self.fc0(pooled))))[:, :, None, None]


class EfficientChannelAttention(nn.Module):
    """sigmoid(conv1d over the channels of the mean over H, W): B C H W -> a gate B C 1 1 (arXiv 1910.03151).

    `kernel_size` neighbouring channels decide about one; one filter for all, no bias.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = spatial_mean(x).unsqueeze(1)
        return torch.sigmoid(self.conv(pooled)).transpose(1, 2).unsqueeze(3)


class StochasticDepth(nn.Module):
    """A mask B 1 1 1 of zeros (with probability `rate`) and ones while training; None otherwise.

    The ones are not divided by the keep probability, unlike EfficientNet's (reference, `StochDepth`), unless
    `rescale` is set (timm, `DropPath`).
    """

    def __init__(self, rate: float, *, rescale: bool = False) -> None:
        super().__init__()
        self.rate, self.rescale = rate, rescale

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.training or self.rate <= 0.0:
            return None
        keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=torch.float32) >= self.rate
        mask = keep.to(x.dtype)
        return mask / (1.0 - self.rate) if self.rescale else mask

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}, rescale={self.rescale}"
