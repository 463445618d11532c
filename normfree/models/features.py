"""Feature maps of a network at every resolution, for detection and segmentation.

The maps are those of timm (1.0.31, `NormFreeNet`): the finest map of the stem, then the outputs of the stages, the last
one after the final convolution if there is one. All are read before the activation that follows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normfree.models.variant import STEMS, Variant
from normfree.suggest import problem


def fine_map_index(variant: Variant) -> int:
    """Return the index of the stem's convolution whose output is its fine map."""
    spec = STEMS[variant.stem]
    last = len(spec.convs) - 1
    return last - 1 if last and not spec.max_pool and spec.convs[last][2] > 1 else last


def feature_info(variant: Variant) -> list[dict[str, Any]]:
    """Return channels (`num_chs`), stride (`reduction`) and module of every feature map, in timm's format.

    The stem has a map of its own only if that is finer than the output of the first stage.
    """
    spec, index = STEMS[variant.stem], fine_map_index(variant)
    fine = 1
    for _, _, stride in spec.convs[: index + 1]:
        fine *= stride
    reduction = fine * (2 if spec.max_pool else 1)
    for _, _, stride in spec.convs[index + 1 :]:
        reduction *= stride
    info: list[dict[str, Any]] = []
    if fine < reduction * variant.strides[0]:
        channels = variant.stem_width(spec.convs[index][1])
        info.append({"num_chs": channels, "reduction": fine, "module": f"stem.conv{index}"})
    for s, (width, stride) in enumerate(zip(variant.widths, variant.strides, strict=True)):
        reduction *= stride
        info.append({"num_chs": width, "reduction": reduction, "module": f"stages.{s}"})
    if variant.head_ratio[0]:
        info[-1] |= {"num_chs": variant.head_width, "module": "final_conv"}
    return info


def take_indices(count: int, indices: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return indices of feature maps as ascending numbers from 0.

    Args:
        count: number of maps.
        indices: which maps; negative ones count from the end, a number n means the last n, None means all.

    Raises:
        ValueError: an index is out of range, or there is none.
    """
    if isinstance(indices, int):
        given, chosen = str(indices), list(range(count - indices, count)) if indices > 0 else []
    else:
        wanted = range(count) if indices is None else indices
        given, chosen = str(tuple(wanted)), [i + count if i < 0 else i for i in wanted]
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise ValueError(
            problem(
                f"out_indices={given}",
                allowed=f"indices from 0 (the finest map) to {count - 1} (the last stage), "
                "or negative ones counted from the end",
                fix=f"use out_indices={tuple(range(count))} for all maps, or a part of it",
            )
        )
    return tuple(sorted(set(chosen)))


class Backbone(nn.Module):
    """A stem, stages and perhaps a final convolution, which return feature maps."""

    stem: Any
    """A `Stem`."""
    stages: nn.Sequential
    final_conv: nn.Module | None
    stem_map: bool
    """Whether the stem's fine map is feature map 0."""
    grad_checkpointing: bool = False

    def forward_stage(self, x: Tensor, stage: nn.Module) -> Tensor:
        """Return the output of one stage, with gradient checkpointing if that is on."""
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of saving its activations."""
        self.grad_checkpointing = enable

    def feature_maps(
        self, images: Tensor, wanted: Collection[int], *, stop_early: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last map computed, and those with the indices `wanted`.

        `stop_early` ends after the last map wanted.
        """
        x = self.stem.fine_map(images)
        maps = [x] if self.stem_map and 0 in wanted else []
        if not len(self.stages) or (stop_early and self.stem_map and max(wanted) == 0):
            return x, maps
        x = self.stem.after_fine_map(x)
        last = len(self.stages) - 1 + self.stem_map
        for index, stage in enumerate(self.stages, start=int(self.stem_map)):
            x = self.forward_stage(x, stage)
            if index == last and self.final_conv is not None:
                x = self.final_conv(x)
            if index in wanted:
                maps.append(x)
            if stop_early and index >= max(wanted):
                break
        return x, maps


class FeatureNet(Backbone):
    """A network without its head: images -> the feature maps in `out_indices`, from the finest to the coarsest.

    `feature_info` describes the maps that are returned. Layers that none of them needs are left out.
    """

    def __init__(self, net: Any, *, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(net.feature_info)
        self.out_indices = take_indices(count, out_indices)
        self.variant, self.name, self.stem_map = net.variant, net.name, net.stem_map
        self.feature_info: list[dict[str, Any]] = [net.feature_info[i] for i in self.out_indices]
        last = self.out_indices[-1]
        self.stages = net.stages[: last + 1 - net.stem_map]
        self.stem = net.stem if len(self.stages) else net.stem.without_rest()
        self.final_conv = net.final_conv if last == count - 1 else None

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.feature_maps(images, self.out_indices)[1]
