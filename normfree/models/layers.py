"""The layers that make a network trainable without normalization.

Shapes: images and activations are B C H W, weights of convolutions O I H W (I per group), of linear layers O I.
Sources: [A] arXiv 2101.08692 (NF-ResNets), [B] arXiv 2102.06171 (NFNets), and DeepMind's released `nfnets` code,
which produced the published weights and takes precedence where it differs from the papers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.native.dispatch import fx_is_tracing, has_hooks, is_transformed
from normfree.ops.conv2d import Activation, conv2d
from normfree.ops.example_gradients import Convolution, expanded_conv2d, is_expanded
from normfree.ops.gated_add import spatial_mean
from normfree.ops.padding import pad_input
from normfree.ops.standardize import has_kernels, standardize_all
from normfree.ops.standardize_torch import WS_EPS
from normfree.suggest import problem
from normfree.weights.names import shaped_as

# torch.fx records one call for each of these functions, whose control flow depends on shapes or dtypes.
for _name in ("standardize", "conv2d", "max_pool", "spatial_mean", "random_mask"):
    torch.fx.wrap(_name)


# --- scaled weight standardization -------------------------------------------------------------------


def standardize(weight: Tensor, gain: Tensor, *, scale: float = 1.0, eps: str = "floor") -> Tensor:
    """Return the standardized weight: each filter has mean 0 and variance (gain·scale)² / fan-in.

    ŵ = (w - μ) · gain · scale / sqrt(max(v·N, 1e-4)), with N the fan-in (I·H·W), and μ and v the mean and the biased
    variance of a filter. The constant is a lower bound of v·N, it is not added: below it no gradient flows through v,
    and at equality half of it does. `eps="add"` divides by sqrt((v + 1e-5)·N) instead, as timm does.

    Args:
        weight: O I H W.
        gain: O.
        scale: a constant factor, such as γ of the activation that the convolution reads.
        eps: "floor" or "add", see above.

    Returns:
        O I H W in the dtype of `weight`, computed in float32 or wider.

    Examples:
        >>> import torch
        >>> from normfree import standardize
        >>> weight = standardize(torch.randn(4, 8, 3, 3), torch.ones(4))
        >>> float(weight[0].mean().abs()) < 1e-6, round(float(weight[0].square().sum()), 3)
        (True, 1.0)

    Source: [A] section 4, [B] equation 1; reference code, `WSConv2D`.
    """
    filters = weight.flatten(1)
    if filters.dtype in (torch.float16, torch.bfloat16):
        filters = filters.float()
    centered = filters - filters.mean(dim=1, keepdim=True)
    power = centered.square().sum(dim=1)  # v·N
    if eps == "floor":
        power = torch.maximum(power, power.new_full((), WS_EPS["floor"]))
    else:
        power = power + WS_EPS["add"] * filters.shape[1]
    factor = (gain.to(filters.dtype) * torch.rsqrt(power) * scale).unsqueeze(1)
    return (centered * factor).view_as(weight).to(weight.dtype)


class WSConv2d(nn.Module):
    """Convolution with scaled weight standardization.

    y = conv(x, standardize(weight, gain, scale=input_scale, eps=eps), stride, groups) + bias

    Shapes: B C H W -> B O ceil(H/stride) ceil(W/stride). Initial values: weight ~ N(0, 1/fan-in), gain 1, bias 0.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: height and width of the filters.
        stride: of rows and columns.
        groups: must divide both channel counts.
        bias: whether to add a bias.
        input_scale: a constant that the input would otherwise be multiplied by: γ of the activation before the
            convolution and β of the block. It is part of the standardized weight, so no activation is multiplied.
        padding: "same" (XLA) or "symmetric" (torch), see `pad_input`.
        eps: "floor" or "add", see `standardize`.

    Raises:
        ValueError: `groups` does not divide the channels, or the fan-in is 1: every standardized weight would be 0.

    Examples:
        >>> import torch
        >>> from normfree import WSConv2d
        >>> conv = WSConv2d(16, 32, kernel_size=3, stride=2)
        >>> conv(torch.randn(2, 16, 9, 9)).shape
        torch.Size([2, 32, 5, 5])

    Source: [A] section 4; reference code, `WSConv2D`.
    """

    fuses_activation = True

    shared_weight: Tensor | None
    """The standardized weight, if `models.shared_weights.standardized_once` has computed it for a whole step."""

    marker: Callable[[], contextlib.AbstractContextManager[None]]
    """Makes the context manager in which the weight is standardized; `training.profile` sets it to record the time."""

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
        given = f"WSConv2d({in_channels}, {out_channels}, kernel_size={kernel_size}, groups={groups})"
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                problem(
                    given,
                    allowed="groups that divide both channel counts",
                    fix=f"use groups={math.gcd(in_channels, out_channels)}, the largest, or a divisor of it",
                )
            )
        fan_in = in_channels // groups * kernel_size**2
        if fan_in == 1:
            raise ValueError(
                problem(
                    f"{given} has a fan-in of 1, so all standardized weights would be 0",
                    allowed="a fan-in of 2 or more",
                    fix="use a larger kernel_size or fewer groups",
                )
            )
        self.kernel_size, self.stride, self.groups = kernel_size, stride, groups
        self.input_scale, self.padding, self.eps = input_scale, padding, eps
        self.shared_weight, self.marker = None, contextlib.nullcontext
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.gain = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.normal_(self.weight, std=fan_in**-0.5)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    def standardized_weight(self) -> Tensor:
        """Return the weight that the convolution uses, O I H W."""
        with self.marker():
            if self.shared_weight is not None and not is_transformed():
                return self.shared_weight
            if has_kernels(self.weight, self.gain):
                return standardize_all([self.weight], [self.gain], [self.input_scale], eps=self.eps)[0]
            return standardize(self.weight, self.gain, scale=self.input_scale, eps=self.eps)

    def forward(self, x: Tensor, *, act: Activation | None = None) -> Tensor:
        """Return the convolution of `x`, or of `act(x)`, which is then not saved for the backward pass."""
        if any(map(is_expanded, (self.weight, self.gain, self.bias))):
            conv = Convolution(self.stride, self.groups, self.padding, self.input_scale, self.eps)
            return expanded_conv2d(x if act is None else act(x), self.weight, self.gain, self.bias, conv)
        weight = self.standardized_weight()
        return conv2d(
            x, weight, self.bias, act=act, stride=self.stride, groups=self.groups, padding=self.padding
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, input_scale={self.input_scale:.6g}, padding={self.padding!r}, "
            f"eps={self.eps!r}, bias={self.bias is not None}"
        )


class Conv2d(nn.Conv2d):
    """Plain convolution with the paddings of `WSConv2d`, for batch-norm twins and folded networks.

    Batch-norm twins use no bias, since the norm has one. `pad_mode` is "same" or "symmetric", see `pad_input`.
    """

    fuses_activation = True

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
        # He et al. 2015: variance 2 / fan-in, as in the papers' signal propagation plots with batch norm.
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor, *, act: Activation | None = None) -> Tensor:
        """Return the convolution of `x`, or of `act(x)`, which is then not saved for the backward pass."""
        stride = self.stride[0]
        if is_expanded(self.weight):
            x, sides = pad_input(
                x if act is None else act(x), self.kernel_size[0], stride, padding=self.pad_mode
            )
            return F.conv2d(x, self.weight, self.bias, stride, sides, 1, self.groups)
        return conv2d(
            x, self.weight, self.bias, act=act, stride=stride, groups=self.groups, padding=self.pad_mode
        )


def convolve(conv: nn.Module, x: Tensor, act: Activation) -> Tensor:
    """Return conv(act(x)).

    `WSConv2d` and `Conv2d` apply the activation themselves, which saves memory. It is applied before the call if hooks
    observe the convolution, so that they see the tensor that is convolved; while torch.fx traces, so that it is a node
    of the graph; and for any other module that a tool has put in place of the convolution.
    """
    fused = getattr(conv, "fuses_activation", False) and not fx_is_tracing() and not has_hooks(conv)
    y: Tensor = conv(x, act=act) if fused else conv(act(x))
    return y


class Region(nn.Module):
    """A part of a network that can be compiled by itself: `forward` calls `compute`."""

    compiled_compute: Callable[[Tensor], Tensor] | None = None
    """Called in place of `compute` if set; `training.compiled` sets it for the time of a training step."""

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) if self.compiled_compute is None else self.compiled_compute(x)

    def is_observed(self) -> bool:
        """Return True if hooks observe a layer, or if gradients of single examples are recorded."""
        return any(map(has_hooks, self.children())) or any(map(is_expanded, self.parameters()))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None and (key := prefix + name) in state_dict:
                state_dict[key] = shaped_as(state_dict[key], parameter)
        super()._load_from_state_dict(state_dict, prefix, *rest)


# --- pools -------------------------------------------------------------------------------------------


def avg_pool_same(x: Tensor) -> Tensor:
    """Return the 2x2 average pool of stride 2 with SAME padding.

    At an odd border it divides by the number of elements inside (reference code).
    """
    return F.avg_pool2d(x, 2, stride=2, ceil_mode=True, count_include_pad=False)


def max_pool(x: Tensor, *, padding: str = "same") -> Tensor:
    """Return the 3x3 max pool of stride 2, the end of the NF-ResNet stem."""
    x, sides = pad_input(x, 3, 2, padding=padding, value=-math.inf)
    return F.max_pool2d(x, 3, stride=2, padding=sides)


# --- gates -------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Gate sigmoid(fc1(relu(fc0(mean over H, W)))): B C H W -> B C 1 1.

    It uses a plain ReLU without γ, the reference code's default, which no variant overrides, though [B] appendix C
    writes GELU. Initial weights: normal, truncated at two sigma, with sigma = fan-in ** -0.5 not corrected for the
    truncation (Haiku's default); biases 0. Under autocast on a CPU, the gate is computed in float32.
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
        if not (torch.is_autocast_enabled("cpu") and self._is_float32()):
            return self._gate(pooled)
        # For one row per image, a CPU takes longer to convert the weights and their gradients than to multiply them.
        with torch.autocast("cpu", enabled=False):
            return self._gate(pooled.float())

    def _is_float32(self) -> bool:
        weights = list(self.parameters())  # none if the layers are quantized
        return bool(weights) and all(weight.dtype == torch.float32 for weight in weights)

    def _gate(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.fc1(F.relu(self.fc0(pooled))))[:, :, None, None]


class EfficientChannelAttention(nn.Module):
    """Gate sigmoid(conv1d over the channels of the mean over H, W): B C H W -> B C 1 1.

    The gate of a channel depends on `kernel_size` neighboring channels; all channels share one filter without bias.
    Source: arXiv 1910.03151.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = spatial_mean(x).unsqueeze(1)
        return torch.sigmoid(self.conv(pooled)).transpose(1, 2).unsqueeze(3)


class StochasticDepth(nn.Module):
    """Mask B 1 1 1 of zeros (with probability `rate`) and ones in training mode; None otherwise.

    Kept branches are not divided by the probability to keep them, unlike EfficientNet's (reference code,
    `StochDepth`), unless `rescale` is set (timm, `DropPath`).
    """

    rate_tensors: tuple[Tensor, Tensor] | None
    """`rate` and 1 - `rate` as tensors, read instead of `rate` if set, so that one compiled graph serves blocks of
    different rates; `training.compiled` sets it."""

    def __init__(self, rate: float, *, rescale: bool = False) -> None:
        super().__init__()
        self.rate, self.rescale, self.rate_tensors = rate, rescale, None

    @property
    def is_active(self) -> bool:
        """True if branches are dropped: in training mode, with a rate above 0."""
        return self.training and (self.rate_tensors is not None or self.rate > 0.0)

    def forward(self, x: Tensor) -> Tensor | None:
        if not self.is_active:
            return None
        rate: Tensor | float
        kept: Tensor | float
        if self.rate_tensors is not None:
            rate, kept = self.rate_tensors
        else:
            rate, kept = self.rate, 1.0 - self.rate
        mask = random_mask(x, rate)
        return mask / kept if self.rescale else mask

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}, rescale={self.rescale}"


def random_mask(x: Tensor, rate: Tensor | float) -> Tensor:
    """Return B 1 1 1 in the dtype of `x`, B C H W: 0 with probability `rate`, else 1."""
    keep = torch.rand(x.shape[0], 1, 1, 1, device=x.device, dtype=torch.float32) >= rate
    return keep.to(x.dtype)
