"""One skeleton for every variant: stem, residual blocks, head. It keeps track of α, β and γ.

    h_next = shortcut + α · skip_gain · mask · gate · branch(β · γ · act(h)),   β = 1 / σ_expected(h)

No activation is multiplied by a scalar. β and γ scale the weight of the convolution that reads the activation
(`WSConv2d.input_scale`); α, the skip gain, the squeeze-excite gate (doubled) and the mask of stochastic depth are
multiplied into one small tensor, so that a block ends in a single multiply-add.
Legend: B batch, C channels, H W height and width, D features, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normfree.models.activations import GAINS, activation
from normfree.models.features import Backbone, FeatureNet, feature_info, fine_map_index, take_indices
from normfree.models.layers import (
    Conv2d,
    EfficientChannelAttention,
    Region,
    SqueezeExcite,
    StochasticDepth,
    WSConv2d,
    avg_pool_same,
    convolve,
    max_pool,
)
from normfree.models.variant import LARGEST, STEMS, Variant, eca_kernel_size
from normfree.ops.example_gradients import expanded_number, is_expanded
from normfree.ops.gated_add import gated_add, kept_images, take_images
from normfree.suggest import problem

# torch.fx records one call for each of these functions, whose control flow depends on the type or shape of a tensor.
torch.fx.wrap("gated_add")
torch.fx.wrap("max_pool")


def expected_betas(depths: Sequence[int], alpha: float) -> list[list[float]]:
    """Return β of every block, by stage, for a residual variance that grows by α² per block ([A] section 4).

    A stage's first block reads the variance of the previous stage and then resets it to 1, plus its own α². So block
    j ≥ 1 of a stage has β = (1 + j·α²) ** -0.5, and a transition after D blocks has (1 + D·α²) ** -0.5.
    """
    betas: list[list[float]] = []
    variance = 1.0
    for depth in depths:
        betas.append([])
        for index in range(depth):
            betas[-1].append(variance**-0.5)
            variance = (1.0 if index == 0 else variance) + alpha**2
    return betas


class LayerFactory:
    """Makes the layers of one variant: standardized convolutions without norms, or plain ones with batch norm."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.batch_norm = variant.norm == "batch"
        self.gamma = 1.0 if self.batch_norm else GAINS[variant.activation]
        at_activation = variant.gamma_at == "activation"
        # scale of convolutions that read no activation, and of the pooled features
        self.raw_scale, self.feature_scale = (1.0, self.gamma) if at_activation else (self.gamma, 1.0)

    def conv(
        self, in_channels: int, out_channels: int, *, scale: float | None = None, **kwargs: Any
    ) -> nn.Module:
        """Make a convolution that computes conv(scale · x); `scale` None is for an x that is no activation."""
        kwargs["padding"] = self.variant.padding
        if self.batch_norm:
            return Conv2d(in_channels, out_channels, **kwargs)
        scale = self.raw_scale if scale is None else scale
        return WSConv2d(in_channels, out_channels, input_scale=scale, eps=self.variant.ws_eps, **kwargs)

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if self.batch_norm else nn.Identity()

    def attention(self, channels: int) -> nn.Module | None:
        if self.variant.attention == "se":
            return SqueezeExcite(channels, hidden=self.variant.se_width(channels))
        if self.variant.attention == "eca":
            return EfficientChannelAttention(eca_kernel_size(channels))
        return None


class Stem(Region):
    """Images B 3 H W to the input of the first block, with activations between the convolutions."""

    def __init__(self, variant: Variant, factory: LayerFactory, in_channels: int) -> None:
        super().__init__()
        spec = STEMS[variant.stem]
        self.act, self.max_pool, self.depth = activation(variant.activation), spec.max_pool, len(spec.convs)
        self.padding, self.fine_map_index = variant.padding, fine_map_index(variant)
        channels = in_channels
        for i, (kernel_size, width, stride) in enumerate(spec.convs):
            out = variant.stem_width(width)
            if i:
                self.add_module(f"norm{i}", factory.norm(channels))
            scale = factory.gamma if i else None
            conv = factory.conv(channels, out, kernel_size=kernel_size, stride=stride, scale=scale)
            self.add_module(f"conv{i}", conv)
            channels = out
        self.out_channels = channels

    def compute(self, x: Tensor) -> Tensor:
        return self.after_fine_map(self.fine_map(x))

    def fine_map(self, images: Tensor) -> Tensor:
        """Return the map before the last reduction, or the output if the stem reduces at most once."""
        return self._convs(self.get_submodule("conv0")(images), 1, self.fine_map_index + 1)

    def after_fine_map(self, x: Tensor) -> Tensor:
        """Return the output of the stem, given its fine map."""
        x = self._convs(x, self.fine_map_index + 1, self.depth)
        return max_pool(x, padding=self.padding) if self.max_pool else x

    def _convs(self, x: Tensor, start: int, stop: int) -> Tensor:
        for i in range(start, stop):
            x = convolve(self.get_submodule(f"conv{i}"), self.get_submodule(f"norm{i}")(x), self.act)
        return x

    def without_rest(self) -> Stem:
        """Return a stem that shares the layers of this one up to the fine map and has no others."""
        stem = copy.copy(self)
        stem._modules = dict(self._modules)
        for i in range(self.fine_map_index + 1, self.depth):
            del stem._modules[f"conv{i}"], stem._modules[f"norm{i}"]
        stem.depth, stem.max_pool = self.fine_map_index + 1, False
        return stem


class Block(Region):
    """A pre-activation bottleneck block: B C H W -> B out H/stride W/stride ([B] appendix C).

    `beta` is 1 / σ_expected of the input. The first block of each stage (`transition`) takes its shortcut from the
    activated, scaled input through a 1x1 convolution, which resets the variance.
    """

    def __init__(
        self,
        variant: Variant,
        factory: LayerFactory,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        beta: float,
        stochdepth_rate: float,
        first: bool,
    ) -> None:
        super().__init__()
        width, groups = variant.branch_width(in_channels=in_channels, out_channels=out_channels, first=first)
        grouped = {"kernel_size": 3, "groups": groups}
        gamma, self.normalizer_free = factory.gamma, not factory.batch_norm
        self.act = activation(variant.activation)
        self.alpha = variant.alpha if self.normalizer_free else 1.0
        # 1 / E[sigmoid] (reference code, which has no such factor in its batch-norm ResNet)
        self.gate_scale = 2.0 if self.normalizer_free else 1.0
        self.attention_in_middle = variant.attention_at == "middle"
        self.second_conv = variant.second_conv
        self.transition = stride > 1 or in_channels != out_channels
        self.pool = self.transition and stride > 1 and variant.shortcut == "avgpool"

        self.norm0 = factory.norm(in_channels)
        if self.transition:
            self.conv_shortcut = factory.conv(
                in_channels,
                out_channels,
                kernel_size=1,
                stride=1 if self.pool else stride,
                scale=beta * gamma,
            )
        self.conv0 = factory.conv(in_channels, width, kernel_size=1, scale=beta * gamma)
        self.norm1 = factory.norm(width)
        self.conv1 = factory.conv(width, width, stride=stride, scale=gamma, **grouped)
        if self.second_conv:
            self.norm1b = factory.norm(width)
            self.conv1b = factory.conv(width, width, scale=gamma, **grouped)
        self.norm2 = factory.norm(width)
        self.conv2 = factory.conv(width, out_channels, kernel_size=1, scale=gamma)
        self.attention = factory.attention(width if self.attention_in_middle else out_channels)
        self.stochdepth = StochasticDepth(stochdepth_rate, rescale=variant.stochdepth == "rescaled")
        self.skip_gain: nn.Parameter | None = None
        if isinstance(self.conv2, WSConv2d):
            if (
                variant.skipinit == "scalar"
            ):  # at 0 the branch starts closed (all three families of the reference)
                self.skip_gain = nn.Parameter(torch.full((1,), variant.skip_gain))
            else:
                nn.init.constant_(self.conv2.gain, variant.skip_gain)

    def compute(self, x: Tensor) -> Tensor:
        mask, kept = self.stochdepth(x) if self.stochdepth.is_active else None, None
        if mask is not None:  # hooks and gradients of single examples see all images
            independent = self.normalizer_free and not self.is_observed()
            mask, kept = kept_images(mask, independent=independent)
        normed = self.norm0(x)
        if self.pool:
            a = self.act(normed)
            shortcut = self.conv_shortcut(avg_pool_same(a))
            r = self.conv0(take_images(a, kept))
        else:
            shortcut = convolve(self.conv_shortcut, normed, self.act) if self.transition else x
            r = convolve(self.conv0, take_images(normed, kept), self.act)
        r = self.branch(r)
        return gated_add(shortcut, r, self.branch_gate(r, mask), kept=kept)

    def branch(self, r: Tensor) -> Tensor:
        """Return the residual branch after its first convolution, without its final gate."""
        r = convolve(self.conv1, self.norm1(r), self.act)
        if self.second_conv:
            r = convolve(self.conv1b, self.norm1b(r), self.act)
        if self.attention is not None and self.attention_in_middle:
            r = r * (self.attention(r) * self.gate_scale)
        return convolve(self.conv2, self.norm2(r), self.act)

    def branch_gate(self, branch: Tensor, mask: Tensor | None = None) -> Tensor | float:
        """Return the factor of the branch: a number, or a tensor that broadcasts to B C H W.

        `mask` is that of stochastic depth, B 1 1 1.
        """
        gate: Tensor | float = self.alpha
        if self.skip_gain is not None:
            each = is_expanded(self.skip_gain)
            gate = self.alpha * (expanded_number(self.skip_gain, len(branch)) if each else self.skip_gain)
        if self.attention is not None and not self.attention_in_middle:
            gate = self.attention(branch) * (self.gate_scale * gate)
        return gate if mask is None else mask * gate

    def remove_scales_(self) -> tuple[float, float]:
        """Set all constant factors to 1; return those of the branch (α · skip_gain) and of its gate.

        For `deploy.fold`, which moves them into the weights. Stochastic depth is switched off as well.
        """
        branch = self.alpha * (1.0 if self.skip_gain is None else float(self.skip_gain))
        gate = self.gate_scale
        self.alpha, self.gate_scale, self.skip_gain = 1.0, 1.0, None
        self.stochdepth.rate = 0.0
        return branch, gate


# Pooling of the last map to features, by timm's names. "" returns the map.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean(dim=(2, 3)),
    "max": lambda x: x.amax(dim=(2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean(dim=(2, 3)) + x.amax(dim=(2, 3))),
    "": lambda x: x,
}


class Net(Backbone):
    """A network built from a `Variant`: images B 3 H W -> logits B K. Make one with `normfree.create_model`.

    `feature_info` lists channels, stride and module of every feature map, as timm does. With `num_classes=0` the
    output is the pooled features B D, or with `global_pool=""` the last map B D H/r W/r.
    """

    folded = False
    """True in networks made by `deploy.fold`, whose modules are no longer those of the variant."""

    def __init__(
        self, variant: Variant, *, name: str = "", num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        if type(in_channels) is not int or not 1 <= in_channels <= LARGEST:
            raise ValueError(problem(f"in_channels={in_channels!r}", allowed=f"1 to {LARGEST:,}"))
        factory = LayerFactory(variant)
        self.variant, self.name, self.in_channels = variant, name, in_channels
        self.feature_scale = factory.feature_scale
        self.act = activation(variant.activation)
        self.feature_info = feature_info(variant)
        self.stem_map = len(self.feature_info) > len(variant.depths)
        self.stem = Stem(variant, factory, in_channels)
        channels = self.stem.out_channels
        betas, rates = expected_betas(variant.depths, variant.alpha), iter(variant.stochdepth_rates())
        self.stages = nn.Sequential()
        for s, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                block = Block(
                    variant,
                    factory,
                    channels,
                    width,
                    stride=variant.strides[s] if j == 0 else 1,
                    beta=betas[s][j],
                    stochdepth_rate=next(rates),
                    first=s == j == 0,
                )
                stage.append(block)
                channels = width
            self.stages.append(stage)
        self.num_features, self.final_conv = variant.head_width, None
        if variant.head_ratio[0]:
            self.final_conv = factory.conv(channels, self.num_features, kernel_size=1)
        self.final_norm = factory.norm(self.num_features)
        self.head_drop = nn.Dropout(variant.drop_rate)
        self.reset_classifier(num_classes)

    # --- forward ---

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last activation map, B 3 H W -> B D H/r W/r, before γ, which `forward_head` applies."""
        x = self.stem(images)
        if self.grad_checkpointing:
            for stage in self.stages:
                x = self.forward_stage(x, stage)
        else:
            x = self.stages(x)  # one call, which hooks observe
        if self.final_conv is not None:
            x = self.final_conv(x)
        return self.act(self.final_norm(x))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last activation map and the feature maps, with the arguments of timm's method of this name.

        Args:
            images: B 3 H W.
            indices: which maps of `feature_info`: a list, or a number n for the last n; None means all.
            norm: no effect, since the maps have no norm after them.
            stop_early: compute nothing after the last map wanted; that is then returned instead of the activation map.
            output_fmt: "NCHW".
            intermediates_only: return only the list of feature maps.

        Raises:
            ValueError: an index is out of range, or the format is another one.
        """
        if output_fmt != "NCHW":
            raise ValueError(problem(f"output_fmt={output_fmt!r}", allowed="NCHW"))
        wanted = take_indices(len(self.feature_info), indices)
        x, maps = self.feature_maps(images, wanted, stop_early=stop_early)
        if intermediates_only:
            return maps
        complete = not stop_early or wanted[-1] == len(self.feature_info) - 1
        return self.act(self.final_norm(x)) if complete else x, maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits B K of an activation map, or the pooled features B D (times γ) with `pre_logits`."""
        pooled = POOLS[self.variant.global_pool](x)
        if pre_logits or not self.num_classes:
            return pooled * self.feature_scale
        return self.head(self.head_drop(pooled if self.head_scale == 1.0 else pooled * self.head_scale))

    # --- the classifier ---

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier for `num_classes` classes; 0 removes it, so that the output is the features.

        Args:
            num_classes: the number of classes, or 0.
            global_pool: "avg", "max", "avgmax", or "" to return the map; None changes nothing.

        Raises:
            ValueError: `num_classes` is negative, or not 0 without pooling, or the pooling is unknown.
        """
        if global_pool is not None:
            self.variant = replace(self.variant, global_pool=global_pool)  # type: ignore[arg-type]  # checked there
        if num_classes < 0:
            given = f"num_classes={num_classes}"
            raise ValueError(problem(given, allowed="a count, or 0 for pooled features", fix="use 0 or more"))
        if num_classes and not self.variant.global_pool:
            given = f"num_classes={num_classes} with global_pool=''"
            raise ValueError(problem(given, allowed="num_classes=0", fix="use it, or global_pool='avg'"))
        self.num_classes, self.head_scale = num_classes, self.feature_scale
        self.head: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())  # the new layer gets the network's device and dtype
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.head.weight, std=self.variant.classifier_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer, or `nn.Identity` if `num_classes` is 0."""
        return self.head

    def remove_head_scale_(self) -> float:
        """Switch dropout off, set the factor of the classifier's input to 1 and return it, for `deploy.fold`."""
        scale = 1.0
        if self.num_classes:
            scale, self.head_scale = self.head_scale, 1.0
        self.head_drop = nn.Dropout(0.0)
        return scale

    # --- other methods of timm's networks ---

    @property
    def in_chans(self) -> int:
        """`in_channels`, by timm's name."""
        return self.in_channels

    @property
    def head_hidden_size(self) -> int:
        """`num_features`, by timm's name."""
        return self.num_features

    @property
    def global_pool(self) -> str:
        """How the last map becomes features, see `reset_classifier`."""
        return self.variant.global_pool

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm sorts parameters into layers, for example for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final_(?:conv|norm)", (99999,))]}

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the feature maps `indices` do not need, and the classifier; return the indices.

        Args:
            indices: as in `forward_intermediates`.
            prune_norm: remove the norm after the last map, which only batch-norm twins have.
            prune_head: remove the classifier even if all other layers are needed.
        """
        taken = take_indices(len(self.feature_info), indices)
        pruned = taken[-1] < len(self.feature_info) - 1
        if pruned:
            part = FeatureNet(self, out_indices=taken)
            self.stem, self.stages, self.final_conv = part.stem, part.stages, part.final_conv
            self.num_features = self.feature_info[taken[-1]]["num_chs"]
        if prune_norm or pruned:
            self.final_norm = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return list(taken)
