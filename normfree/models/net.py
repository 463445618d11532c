"""One skeleton for every row: stem, residual blocks, head. It owns the bookkeeping of α, β and γ.

    h_next = shortcut + α · skip_gain · mask · gate · branch(β · γ · act(h)),   β = 1 / σ_expected(h)

Scalars never touch activations: β and γ scale the kernel of the convolution that reads the activation
(`WSConv2d.input_scale`), α, the skip gain, the squeeze-excite gate (doubled) and the stochastic-depth mask
meet in one small tensor, so that a block ends in a single multiply-add.
Legend: B batch, C channels, H W height and width, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.models.activations import GAINS, activation
from normfree.models.layers import (
    Conv2d,
    EfficientChannelAttention,
    SqueezeExcite,
    StochasticDepth,
    WSConv2d,
    avg_pool_same,
    max_pool,
)
from normfree.models.variant import STEMS, Variant, eca_kernel_size
from normfree.native.dispatch import eager_training
from normfree.ops.gated_add import add_branch, kept_images, take_images


def expected_betas(depths: Sequence[int], alpha: float) -> list[list[float]]:
    """β of every block, stage by stage, for residual variance growing by α² per block ([A] section 3).

    A stage's first block reads the previous stage's variance and then resets it to 1, keeping its own α²;
    so block j ≥ 1 of a stage has β = (1 + j·α²) ** -0.5, and a transition (1 + D·α²) ** -0.5 after D blocks.
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
    """Makes convolutions and norms of one row: standardized and none, or plain and batch norm."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.batch_norm = variant.norm == "batch"
        self.gamma = 1.0 if self.batch_norm else GAINS[variant.activation]
        at_activation = variant.gamma_at == "activation"
        #: What convolutions of a raw input carry, and what the pooled features are multiplied by.
        self.raw_scale, self.feature_scale = (1.0, self.gamma) if at_activation else (self.gamma, 1.0)

    def conv(
        self, in_channels: int, out_channels: int, *, scale: float | None = None, **kwargs: Any
    ) -> nn.Module:
        """A convolution of an input that stands for `scale` times itself; None: of one that is no activation."""
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
        return (
            EfficientChannelAttention(eca_kernel_size(channels)) if self.variant.attention == "eca" else None
        )


class Stem(nn.Module):
    """Images B 3 H W to the first block's input. Activation between convolutions, none after the last."""

    def __init__(self, variant: Variant, parts: LayerFactory, in_channels: int) -> None:
        super().__init__()
        row = STEMS[variant.stem]
        self.act, self.max_pool, self.depth = activation(variant.activation), row.max_pool, len(row.convs)
        self.padding = variant.padding
        channels, self.reduction = in_channels, 2 if row.max_pool else 1
        for i, (kernel_size, width, stride) in enumerate(row.convs):
            out = variant.stem_width(width)
            if i:
                self.add_module(f"norm{i}", parts.norm(channels))
            conv = parts.conv(
                channels, out, kernel_size=kernel_size, stride=stride, scale=parts.gamma if i else None
            )
            self.add_module(f"conv{i}", conv)
            channels, self.reduction = out, self.reduction * stride
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("conv0")(x)
        for i in range(1, self.depth):
            x = self.get_submodule(f"conv{i}")(self.get_submodule(f"norm{i}")(x), self.act)
        return max_pool(x, padding=self.padding) if self.max_pool else x


class Block(nn.Module):
    """A pre-activation bottleneck block: B C H W -> B out H/stride W/stride ([B] appendix C).

    `beta` is 1 / σ_expected of the input. The first block of each stage (`transition`) takes its shortcut
    from the activated, scaled input through a 1x1 convolution, which resets the variance.
    """

    def __init__(
        self,
        variant: Variant,
        parts: LayerFactory,
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
        gamma, self.normalizer_free = parts.gamma, not parts.batch_norm
        self.act = activation(variant.activation)
        self.alpha = 1.0 if parts.batch_norm else variant.alpha
        self.gate_scale = (
            2.0 if self.normalizer_free else 1.0
        )  # E[sigmoid] is 1/2 (reference; not in its BN ResNet)
        self.attention_in_middle = variant.attention_at == "middle"
        # transition: exactly the first block of each stage, in every row
        self.transition = stride > 1 or in_channels != out_channels
        self.pool = self.transition and stride > 1 and variant.shortcut == "avgpool"

        self.norm0 = parts.norm(in_channels)
        if self.transition:
            self.conv_shortcut = parts.conv(
                in_channels,
                out_channels,
                kernel_size=1,
                stride=1 if self.pool else stride,
                scale=beta * gamma,
            )
        self.conv0 = parts.conv(in_channels, width, kernel_size=1, scale=beta * gamma)
        self.norm1 = parts.norm(width)
        self.conv1 = parts.conv(width, width, stride=stride, scale=gamma, **grouped)
        self.second_conv = variant.second_conv
        if self.second_conv:
            self.norm1b = parts.norm(width)
            self.conv1b = parts.conv(width, width, scale=gamma, **grouped)
        self.norm2 = parts.norm(width)
        self.conv2 = parts.conv(width, out_channels, kernel_size=1, scale=gamma)
        self.attention = parts.attention(width if self.attention_in_middle else out_channels)
        self.stochdepth = StochasticDepth(stochdepth_rate, rescale=variant.stochdepth == "rescaled")
        self.skip_gain: nn.Parameter | None = None
        if isinstance(self.conv2, WSConv2d):
            if variant.skipinit == "scalar":  # 0 starts the branch closed (reference: in all three families)
                self.skip_gain = nn.Parameter(torch.full((), variant.skip_gain))
            else:
                nn.init.constant_(self.conv2.gain, variant.skip_gain)

    def branch_gate(self, branch: Tensor, mask: Tensor | None = None) -> Tensor | float:
        """What the branch is multiplied by before it joins the shortcut: a number, or broadcastable to B C H W.
        `mask`: that of stochastic depth."""
        gate: Tensor | float = self.alpha if self.skip_gain is None else self.alpha * self.skip_gain
        if self.attention is not None and not self.attention_in_middle:
            gate = self.attention(branch) * (self.gate_scale * gate)
        return gate if mask is None else mask * gate

    def kept(self, mask: Tensor | None) -> Tensor | None:
        """The images that the branch has to compute; None: all of them, as always with batch statistics, and where a
        mask has no values to read (tensors that only stand for others, as `training/memory.py` uses)."""
        if type(mask) is not Tensor or mask.device.type != "cpu":
            return None
        if not self.normalizer_free or not eager_training():
            return None
        return kept_images(mask)

    def branch(self, r: Tensor) -> Tensor:
        """The residual branch behind its first convolution, up to, but without, its gate."""
        r = self.conv1(self.norm1(r), self.act)
        if self.second_conv:
            r = self.conv1b(self.norm1b(r), self.act)
        if self.attention is not None and self.attention_in_middle:
            r = r * (self.attention(r) * self.gate_scale)
        return self.conv2(self.norm2(r), self.act)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.stochdepth(x)
        kept = self.kept(mask)
        normed = self.norm0(x)
        if self.pool:  # keeps its own input
            a = self.act(normed)
            shortcut, r = self.conv_shortcut(avg_pool_same(a)), self.conv0(_some(a, kept))
        else:
            shortcut = self.conv_shortcut(normed, self.act) if self.transition else x
            r = self.conv0(_some(normed, kept), self.act)
        r = self.branch(r)
        gate = self.branch_gate(r, mask if mask is None or kept is None else mask[kept])
        return add_branch(shortcut, r, gate, kept=kept)


def _some(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else take_images(x, kept)


class Net(nn.Module):
    """A network built from a row of `VARIANTS`: images B 3 H W -> logits B K.

    Make one with `normfree.create_model`. `feature_info` lists the stem and stages with channels, reduction
    and module name, as timm does. With `num_classes=0` the output is the pooled features B D.
    """

    def __init__(
        self, variant: Variant, *, name: str = "", num_classes: int = 1000, in_channels: int = 3
    ) -> None:
        super().__init__()
        parts = LayerFactory(variant)
        self.variant, self.name, self.in_channels = variant, name, in_channels
        self.feature_scale = parts.feature_scale
        self.act = activation(variant.activation)
        self.grad_checkpointing = False
        self.folded = False  # surgery.fold sets it: the modules are then no longer those of the row
        self.stem = Stem(variant, parts, in_channels)
        channels, reduction = self.stem.out_channels, self.stem.reduction
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "stem"}]
        betas, rates, index = expected_betas(variant.depths, variant.alpha), variant.stochdepth_rates(), 0
        self.stages = nn.Sequential()
        for s, (depth, width) in enumerate(zip(variant.depths, variant.widths, strict=True)):
            stage = nn.Sequential()
            for j in range(depth):
                block = Block(
                    variant,
                    parts,
                    channels,
                    width,
                    stride=variant.strides[s] if j == 0 else 1,
                    beta=betas[s][j],
                    stochdepth_rate=rates[index],
                    first=index == 0,
                )
                stage.append(block)
                channels, index = width, index + 1
            self.stages.append(stage)
            reduction *= variant.strides[s]
            self.feature_info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{s}"})
        self.num_features = variant.head_width
        self.final_conv = (
            parts.conv(channels, self.num_features, kernel_size=1) if variant.head_ratio[0] else None
        )
        self.final_norm = parts.norm(self.num_features)
        self.head_drop = nn.Dropout(variant.drop_rate)
        self.reset_classifier(num_classes)

    # --- the classifier ---

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for `num_classes` classes; 0 removes it, so that the output is the features.

        Raises:
            ValueError: `num_classes` is negative.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected a count, or 0 for pooled features.")
        self.num_classes, self.head_scale = num_classes, self.feature_scale
        self.head: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())  # a new head lives where the network lives
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.head.weight, std=self.variant.classifier_std)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or `nn.Identity` when `num_classes` is 0."""
        return self.head

    # --- forward ---

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward_stage(self, x: Tensor, stage: nn.Module) -> Tensor:
        """One stage, block by block, checkpointed if that is on."""
        for block in stage.children():
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """B 3 H W -> the last activation map B D H/r W/r, before γ, which `forward_head` applies."""
        x = self.stem(images)
        for stage in self.stages:
            x = self.forward_stage(x, stage)
        if self.final_conv is not None:
            x = self.final_conv(x)
        return self.act(self.final_norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Activation map -> logits B K, or with `pre_logits` the pooled features B D (times γ, no dropout)."""
        pooled = x.mean(dim=(2, 3))
        if pre_logits or not self.num_classes:
            return pooled * self.feature_scale
        return self.head(self.head_drop(pooled if self.head_scale == 1.0 else pooled * self.head_scale))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class FeatureNet(nn.Module):
    """The same network without a head: images -> the maps of the stem and stages in `out_indices`.

    Maps are the residual stream itself, before activation. `feature_info` describes those returned.
    """

    def __init__(self, net: Net, *, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(net.feature_info)
        chosen = (
            list(range(count)) if out_indices is None else [i + count if i < 0 else i for i in out_indices]
        )
        if not chosen or min(chosen) < 0 or max(chosen) >= count:
            raise ValueError(
                f"out_indices={tuple(out_indices or ())}: expected indices from 0 (the stem) to "
                f"{count - 1} (the last stage), or negative ones counted from the end."
            )
        self.variant, self.name = net.variant, net.name
        self.out_indices = tuple(sorted(set(chosen)))
        self.feature_info: list[dict[str, Any]] = [net.feature_info[i] for i in self.out_indices]
        self.stem, self.stages = net.stem, net.stages[: max(self.out_indices)]

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = [x] if 0 in self.out_indices else []
        for i, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if i in self.out_indices:
                maps.append(x)
        return maps
