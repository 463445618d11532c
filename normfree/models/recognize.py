"""`recognize`: find the variant that weights belong to, from their names and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from normfree.models.net import Net
from normfree.models.variant import STEMS, Variant
from normfree.models.variants import VARIANTS
from normfree.suggest import problem
from normfree.weights.names import naming_of, to_our_names

Shapes = dict[str, tuple[int, ...]]
# Prefix of timm's networks with DeepMind's weights; the reference's variant has the same tensors.
_DEEPMIND = "timm_dm_"


def recognize(source: Mapping[str, Any]) -> list[str]:
    """Return the names of the variants with exactly these tensors, in the order of `VARIANTS`.

    Args:
        source: a state dict with our names or timm's, or a haiku tree. Numbers of classes and image channels are taken
            from its shapes. A haiku tree can only be a variant of the reference code. A state dict with timm's names
            is a `timm_` variant; DeepMind's weights are listed for both networks that compute with them, for example
            `nfnet_f0` and `timm_dm_nfnet_f0`.

    Raises:
        ValueError: the naming is unknown, or no variant fits; the message has the closest one and the first
            differences.
    """
    naming, state = naming_of(source), to_our_names(source)
    if not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            problem(
                f"{len(state)} entries that are not all tensors" if state else "no tensors",
                allowed="a state dict or a haiku tree with at least one tensor and nothing else",
                fix="pass the part of the checkpoint that has the weights",
            )
        )
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    num_classes, in_channels = ends(state)
    candidates = [n for n in VARIANTS if _may_be(n, naming)]
    # the distance is cheap to compute and leaves two or three variants to build
    found = {
        n
        for n in candidates
        if _distance(VARIANTS[n], shapes) == 0
        and shapes_of(VARIANTS[n], num_classes=num_classes, in_channels=in_channels) == shapes
    }
    if naming == "timm":
        found |= {n.removeprefix(_DEEPMIND) for n in found if n.startswith(_DEEPMIND)}
    if not found:
        raise ValueError(_no_match(candidates, shapes, num_classes, in_channels))
    return [n for n in VARIANTS if n in found]


def ends(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (num_classes, in_channels) of a state dict with our names; 0 and 3 without classifier and stem."""
    head = state.get("head.weight", state.get("head.bias"))
    stem = state.get("stem.conv0.weight")
    return (
        head.shape[0] if head is not None and head.ndim else 0,
        stem.shape[1] if stem is not None and stem.ndim == 4 and stem.shape[1] else 3,
    )


@lru_cache(maxsize=8)
def shapes_of(variant: Variant, *, num_classes: int, in_channels: int) -> Shapes:
    """Return names and shapes of a variant's state dict, without allocating it; F6 takes a third of a second."""
    with torch.device("meta"):
        net = Net(variant, num_classes=num_classes, in_channels=in_channels)
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def _may_be(name: str, naming: str) -> bool:
    if naming == "ours":
        return True
    timm = name.startswith("timm_")
    return timm if naming == "timm" else not timm and VARIANTS[name].norm == "none"


def _depths(shapes: Shapes) -> tuple[int, ...]:
    blocks = {(int(m[1]), int(m[2])) for k in shapes if (m := re.match(r"stages\.(\d{1,4})\.(\d{1,4})\.", k))}
    stages = sorted({s for s, _ in blocks})
    return tuple(sum(1 for s, _ in blocks if s == stage) for stage in stages)


def _widths(shapes: Shapes) -> tuple[int, ...]:
    last = [shapes.get(f"stages.{s}.0.conv2.weight", ()) for s in range(len(_depths(shapes)))]
    return tuple(shape[0] if shape else 0 for shape in last)


def _distance(variant: Variant, shapes: Shapes) -> float:
    """Return how much a variant differs from these shapes, by a few features that are cheap to compare."""
    depths, widths = _depths(shapes), _widths(shapes)
    if len(depths) != len(variant.depths):
        return 100.0 + abs(len(depths) - len(variant.depths))
    stem = [s for k, s in shapes.items() if re.fullmatch(r"stem\.conv\d\.weight", k)]
    stem_sizes = [kernel_size for kernel_size, _, _ in STEMS[variant.stem].convs]
    other_stem = sorted(stem_sizes) != sorted(s[-1] for s in stem if s)
    traits = {
        "attention.fc0.weight": variant.attention == "se",
        "attention.conv.weight": variant.attention == "eca",
        "norm0.weight": variant.norm == "batch",
        "conv1b.weight": variant.second_conv,
        "skip_gain": variant.skipinit == "scalar" and variant.norm == "none",
    }
    present = {k.split(".", 3)[-1] for k in shapes if k.startswith("stages.")}
    sizes = zip((*depths, *widths), (*variant.depths, *variant.widths), strict=True)
    # another family is further away than another width
    other_traits = sum((name in present) != has for name, has in traits.items())
    return sum(abs(math.log((a + 1) / (b + 1))) for a, b in sizes) + 10.0 * (other_stem + other_traits)


def _no_match(candidates: list[str], shapes: Shapes, num_classes: int, in_channels: int) -> str:
    """Return the error message: of the nearest three variants that with the fewest differences, and the first four."""
    nearest = sorted(candidates, key=lambda n: _distance(VARIANTS[n], shapes))[:3]
    compared = [
        (n, _differences(shapes, shapes_of(VARIANTS[n], num_classes=num_classes, in_channels=in_channels)))
        for n in nearest
    ]
    name, differences = min(compared, key=lambda pair: len(pair[1]))
    more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
    return problem(
        f"no variant has these {len(shapes)} tensors; the closest is {name}, but {'; '.join(differences[:4])}{more}",
        fix=f"make a changed variant with create_model({name!r}, field=value) and load them into it",
    )


def _differences(given: Shapes, expected: Shapes) -> list[str]:
    missing = [f"{k} is missing" for k in sorted(expected.keys() - given.keys())]
    unknown = [f"{k} is unknown" for k in sorted(given.keys() - expected.keys())]
    both = sorted(k for k in expected.keys() & given.keys() if expected[k] != given[k])
    return [f"{k} has shape {given[k]}, expected {expected[k]}" for k in both] + missing + unknown
