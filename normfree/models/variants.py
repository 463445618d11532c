"""The table: one frozen `Variant` row per network name. A row is the whole network.

`zoo` finds a row by its name, `net` builds it, `weights` derives name maps from it, `normfree list` prints
it. Sources: [A] arXiv 2101.08692, [B] arXiv 2102.06171 (table 1, appendix C), and the reference code.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from normfree.models.layers import activation, nearest


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One network. Every field may be overridden by `create_model(name, field=value)`.

    Raises:
        ValueError: the fields contradict each other.
    """

    depths: tuple[int, ...]
    """Residual blocks per stage."""
    widths: tuple[int, ...]
    """Output channels per stage."""
    strides: tuple[int, ...] = (1, 2, 2, 2)
    """Stride of each stage's first block."""
    stem: Literal["deep", "conv7_pool", "conv3_stride2", "conv3"] = "deep"
    """A key of `STEMS`."""
    shortcut: Literal["avgpool", "strided"] = "avgpool"
    """How a transition block's shortcut shrinks: 2x2 average pool then 1x1, or a strided 1x1."""
    bottleneck_ratio: float = 0.5
    """Width inside the branch, relative to `bottleneck_of`."""
    first_bottleneck_ratio: float = 0.0
    """The same for the network's very first block; 0 means no exception (NF-RegNet: 1)."""
    bottleneck_of: Literal["out", "in"] = "out"
    second_conv: bool = True
    """A second 3x3 convolution in the branch ([B] section 4)."""
    group_width: int = 128
    """Channels per group of the 3x3 convolutions; 0 means ungrouped."""
    floor_bottleneck: bool = True
    """Round the branch width down to a multiple of `group_width` (released code). False keeps it whole in
    width // group_width groups, which gives the published NFNet-F4+ of 527 M parameters ([B] table 5)."""
    se: Literal["end", "middle", "none"] = "end"
    """Squeeze-excite after the last convolution, before it, or not at all."""
    se_ratio: float = 0.5
    head_ratio: tuple[int, int] = (2, 1)
    """The final 1x1 convolution's width as a fraction of the last stage's; (0, 1) means none."""
    activation: str = "gelu"
    norm: Literal["none", "batch"] = "none"
    """"batch" is the twin of the row with pre-activation batch norm, no α, β, γ, gains or skip gains."""
    alpha: float = 0.2
    """Scale of each residual branch ([A] section 3; 0.2 throughout the reference)."""
    skip_gain: float = 0.0
    """Initial value of the learnable scalar on each branch (SkipInit). 0 in the reference, whose NF-ResNet lets it
    be chosen; under AGC a gain at 0 moves by at most lr·λ·eps a step, so short runs want 1."""
    classifier_std: float = 0.01
    """Standard deviation of the classifier's initial weight; 0 starts it at zero."""
    drop_rate: float = 0.0
    stochdepth_rate: float = 0.1
    """Of the last block; grows linearly from 0 with the block index."""
    train_size: int = 224
    test_size: int = 224
    randaugment: str = "off"
    """The recipe's strength, "<layers>x<magnitude>" ([B] table 1)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_kind(field.name, getattr(self, field.name), _KINDS[field.name])
        activation(self.activation)
        lengths = {"depths": len(self.depths), "widths": len(self.widths), "strides": len(self.strides)}
        if len(set(lengths.values())) != 1:
            got = ", ".join(f"{k}={getattr(self, k)}" for k in lengths)
            raise ValueError(
                f"{got}: depths, widths and strides need one entry per stage; "
                f"give strides={(1,) + (2,) * (len(self.depths) - 1)} too."
            )
        if min(self.depths) < 1 or min(self.widths) < 1:
            raise ValueError(
                f"depths={self.depths}, widths={self.widths}: every stage needs at least one block "
                "and one channel."
            )
        if self.activation == "glu":
            raise ValueError("activation='glu' halves the channels, so no row can use it; nearest is 'silu'.")
        for rate in ("drop_rate", "stochdepth_rate"):
            if not 0.0 <= getattr(self, rate) < 1.0:
                raise ValueError(f"{rate}={getattr(self, rate)}: expected a number in [0, 1).")

    @property
    def head_width(self) -> int:
        """Channels that the classifier sees."""
        num, den = self.head_ratio
        return self.widths[-1] * num // den if num else self.widths[-1]

    def stem_width(self, width: int | float) -> int:
        """Channels of a stem convolution; a float counts in first-stage widths."""
        return max(1, int(width * self.widths[0])) if isinstance(width, float) else width

    def branch_width(self, *, in_channels: int, out_channels: int, first: bool) -> tuple[int, int]:
        """(width, groups) of a block's 3x3 convolutions."""
        ratio = (
            self.first_bottleneck_ratio if first and self.first_bottleneck_ratio else self.bottleneck_ratio
        )
        width = int((out_channels if self.bottleneck_of == "out" else in_channels) * ratio)
        if not self.group_width:
            return width, 1
        groups = width // self.group_width
        if groups < 1:
            raise ValueError(
                f"group_width={self.group_width} is wider than a branch of {width} channels; "
                f"group_width={width} or less fits."
            )
        if self.floor_bottleneck:
            width = groups * self.group_width
        elif width % groups:
            raise ValueError(
                f"a branch of {width} channels does not split into {groups} equal groups; "
                f"use floor_bottleneck=True or another group_width than {self.group_width}."
            )
        return width, groups

    def with_overrides(self, overrides: dict[str, object]) -> Variant:
        """This row with some fields replaced; lists become tuples.

        Raises:
            ValueError: a name is no field, or the result contradicts itself.
        """
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"unknown model field {name!r}.{nearest(name, known)} Fields: {', '.join(known)}."
                )
        clean = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        return replace(self, **clean)  # type: ignore[arg-type]  # __post_init__ judges the values


#: What each field holds.
_KINDS: dict[str, Any] = get_type_hints(Variant)


def _check_kind(name: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r}.{nearest(str(value), allowed)} Allowed: {', '.join(allowed)}."
            )
    elif get_origin(kind) is tuple:
        if not isinstance(value, tuple) or any(type(v) is not int for v in value):
            raise ValueError(f"{name}={value!r}: expected whole numbers, one for each stage or part.")
    elif not (isinstance(value, kind) or (kind is float and type(value) is int)) or (type(value) is bool) != (
        kind is bool
    ):
        raise ValueError(f"{name}={value!r}: expected {_WORDS[kind]}.")


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word"}


@dataclass(frozen=True)
class Stem:
    """Convolutions before the first block: (kernel size, channels, stride) each; a float counts in first-stage
    widths. Between them an activation, none after the last."""

    convs: tuple[tuple[int, int | float, int], ...]
    max_pool: bool = False


STEMS: dict[str, Stem] = {
    # [B] appendix C: 16, 32 and 64 never scale with the network.
    "deep": Stem(((3, 16, 2), (3, 32, 1), (3, 64, 1), (3, 0.5, 2))),
    # He et al. 2016: 7x7 to a quarter of the first stage, then a 3x3 max pool.
    "conv7_pool": Stem(((7, 0.25, 2),), max_pool=True),
    # NF-RegNet.
    "conv3_stride2": Stem(((3, 1.0, 2),)),
    # CIFAR: full resolution, half of the first stage's width.
    "conv3": Stem(((3, 0.5, 1),)),
}


def _nfnet() -> dict[str, Variant]:
    # [B] table 1 and the reference table: train px, test px, dropout, RandAugment. Depths are N * (1, 2, 6, 3).
    sizes = [
        (192, 256, 0.2, "4x5"),
        (224, 320, 0.3, "4x10"),
        (256, 352, 0.4, "4x10"),
        (320, 416, 0.4, "4x15"),
        (384, 512, 0.5, "4x15"),
        (416, 544, 0.5, "4x15"),
        (448, 576, 0.5, "4x15"),
        (480, 608, 0.5, "4x15"),
    ]
    rows: dict[str, Variant] = {}
    for level, (train, test, drop, augment) in enumerate(sizes):
        row = Variant(
            depths=tuple(d * (level + 1) for d in (1, 2, 6, 3)),
            widths=(256, 512, 1536, 1536),
            drop_rate=drop,
            stochdepth_rate=0.25,
            train_size=train,
            test_size=test,
            randaugment=augment,
        )
        rows[f"nfnet_f{level}"] = row
        rows[f"nfnet_f{level}_plus"] = replace(row, widths=(384, 768, 2048, 2048))
        if level <= 3:  # [B] table 6: batch-norm twins above F3 were unstable
            rows[f"bn_nfnet_f{level}"] = replace(row, norm="batch")
            # [B] table 6, from the NF SE-ResNeXt-D baseline (with the new depths) to the NFNet:
            default_widths = (256, 512, 1024, 2048)
            rows[f"nfnet_f{level}_baseline"] = replace(row, widths=default_widths, second_conv=False)
            rows[f"nfnet_f{level}_width_pattern"] = replace(row, second_conv=False)
            rows[f"nfnet_f{level}_default_width"] = replace(row, widths=default_widths)
    return rows


def _nf_resnet() -> dict[str, Variant]:
    # Reference `nf_resnet.py`; 26 is timm's depth pattern, absent from the reference.
    depths = {
        26: (2, 2, 2, 2),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
        288: (24, 24, 24, 24),
    }
    rows: dict[str, Variant] = {}
    for name, depth in depths.items():
        row = Variant(
            depths=depth,
            widths=(256, 512, 1024, 2048),
            stem="conv7_pool",
            shortcut="strided",
            bottleneck_ratio=0.25,
            second_conv=False,
            group_width=0,
            se="none",
            se_ratio=0.25,
            head_ratio=(0, 1),
            activation="relu",
        )
        rows[f"nf_resnet{name}"] = row
        # Reference `resnet.py`: pre-activation (v2), classifier at zero.
        rows[f"resnet{name}"] = replace(row, norm="batch", classifier_std=0.0)
    return rows


def _nf_regnet() -> dict[str, Variant]:
    # Reference `nf_regnet.py`: base widths (scaled by 0.75), depths, train px, test px, dropout.
    table = [
        ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
        ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
        ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
        ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
        ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
        ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
        ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
        ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
        ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
    ]
    return {
        f"nf_regnet_b{level}": Variant(
            depths=depths,
            widths=tuple(int(0.75 * w) for w in widths),
            strides=(2, 2, 2, 2),
            stem="conv3_stride2",
            bottleneck_ratio=2.25,
            first_bottleneck_ratio=1.0,
            bottleneck_of="in",
            second_conv=False,
            group_width=8,
            se="middle",
            head_ratio=(1280, 440),
            activation="silu",
            classifier_std=0.0,
            drop_rate=drop,
            train_size=train,
            test_size=test,
        )
        for level, (widths, depths, train, test, drop) in enumerate(table)
    }


def _small() -> dict[str, Variant]:
    # For 32 and 64 px images; ours, from no paper: an NF-ResNet body of a third to three million parameters with
    # squeeze-excite, under CIFAR's 3x3 stem or ResNet's 7x7 one. Skip gains start at 1 because their runs are short.
    shapes = {
        "nano": ((1, 2, 2), (64, 128, 256)),
        "micro": ((1, 2, 2), (128, 256, 512)),
        "mini": ((2, 4, 4), (128, 256, 512)),
    }
    rows: dict[str, Variant] = {}
    for name, (depths, widths) in shapes.items():
        row = Variant(
            depths=depths,
            widths=widths,
            strides=(1, 2, 2),
            stem="conv3",
            bottleneck_ratio=0.25,
            second_conv=False,
            group_width=0,
            head_ratio=(0, 1),
            activation="silu",
            skip_gain=1.0,
            train_size=32,
            test_size=32,
        )
        for suffix, sized in (
            ("", row),
            ("_64", replace(row, stem="conv7_pool", train_size=64, test_size=64)),
        ):
            rows[f"nf_resnet_{name}{suffix}"] = sized
            rows[f"resnet_{name}{suffix}"] = replace(sized, norm="batch")
    return rows


#: Every network by name.
VARIANTS: dict[str, Variant] = {**_nfnet(), **_nf_resnet(), **_nf_regnet(), **_small()}
