"""What a network is: one frozen `Variant`, a row of the table in `rows`. A row is the whole network.

`zoo` finds a row by its name, `net` builds it, `weights` derives name maps from it, `normfree list` prints
it. Sources: [A] arXiv 2101.08692, [B] arXiv 2102.06171 (table 1, appendix C), and the reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from normfree.models.activations import activation
from normfree.suggest import did_you_mean


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
    stem: Literal["deep", "deep_128", "conv7_pool", "conv3_stride2", "conv3"] = "deep"
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
    attention: Literal["se", "eca", "none"] = "se"
    """What gates the branch's channels: squeeze-excite, efficient channel attention, nothing."""
    attention_at: Literal["end", "middle"] = "end"
    """After the last convolution of the branch, or before it."""
    se_ratio: float = 0.5
    """Hidden width of squeeze-excite, relative to the channels it gates."""
    se_divisor: int = 1
    """That width is rounded to a multiple of this; 1 means rounded down, as in the reference (timm: 8)."""
    head_ratio: tuple[int, int] = (2, 1)
    """The final 1x1 convolution's width as a fraction of the last stage's; (0, 1) means none."""
    activation: str = "gelu"
    norm: Literal["none", "batch"] = "none"
    """"batch" is the twin of the row with pre-activation batch norm, no α, β, γ, gains or skip gains."""
    padding: Literal["same", "symmetric"] = "same"
    """Of convolutions and the stem's max pool (`pad_input`)."""
    ws_eps: Literal["floor", "add"] = "floor"
    """How weight standardization avoids dividing by zero (`WS_EPS`)."""
    gamma_at: Literal["activation", "convolution"] = "activation"
    """γ belongs to each activation; or to each convolution, and then also to those that read no activation
    (timm's `gamma_in_act=False`), while the pooled features go without."""
    width_divisor: int = 1
    """Branch widths are rounded to a multiple of this before they are grouped."""
    alpha: float = 0.2
    """Scale of each residual branch ([A] section 3; 0.2 throughout the reference)."""
    skipinit: Literal["scalar", "channel"] = "scalar"
    """What scales a branch: one learnable number (SkipInit), or only the gains of its last convolution."""
    skip_gain: float = 0.0
    """Initial value of that number, or of those gains. 0 in the reference, whose NF-ResNet lets it be chosen; under
    AGC a gain at 0 moves by at most lr·λ·eps a step, so short runs want 1."""
    classifier_std: float = 0.01
    """Standard deviation of the classifier's initial weight; 0 starts it at zero."""
    drop_rate: float = 0.0
    stochdepth_rate: float = 0.1
    """Probability of dropping a branch; grows linearly from 0 with the block index."""
    stochdepth: Literal["plain", "rescaled"] = "plain"
    """"plain": block i of n has rate · i / n, kept branches stay as they are (reference). "rescaled": rate ·
    i / (n - 1), kept branches are divided by their probability (timm's `DropPath`)."""
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
        wanted = (out_channels if self.bottleneck_of == "out" else in_channels) * ratio
        width = int(wanted) if self.width_divisor == 1 else rounded(wanted, self.width_divisor)
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

    def se_width(self, channels: int) -> int:
        """Hidden width of squeeze-excite on `channels`."""
        wanted = channels * self.se_ratio
        return max(1, int(wanted)) if self.se_divisor == 1 else rounded(wanted, self.se_divisor, keep=0.0)

    def stochdepth_rates(self) -> list[float]:
        """The rate of every block, in order."""
        total = sum(self.depths)
        steps = total if self.stochdepth == "plain" else max(1, total - 1)
        return [self.stochdepth_rate * i / steps for i in range(total)]

    def with_overrides(self, overrides: dict[str, object]) -> Variant:
        """This row with some fields replaced; lists become tuples.

        Raises:
            ValueError: a name is no field, or the result contradicts itself.
        """
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name not in known:
                raise ValueError(
                    f"unknown model field {name!r}.{did_you_mean(name, known)} Fields: {', '.join(known)}."
                )
        clean = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        return replace(self, **clean)  # type: ignore[arg-type]  # __post_init__ judges the values


def rounded(value: float, divisor: int, *, keep: float = 0.9) -> int:
    """`value` to the nearest multiple of `divisor`, one more if that would lose over 1 - keep of it (timm,
    `make_divisible`)."""
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < keep * value else near


def eca_kernel_size(channels: int) -> int:
    """How many neighbouring channels ECA looks at: |log2(C) + 1| / 2, made odd, at least 3 (arXiv 1910.03151)."""
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(size if size % 2 else size + 1, 3)


#: What each field holds.
_KINDS: dict[str, Any] = get_type_hints(Variant)


def _check_kind(name: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r}.{did_you_mean(str(value), allowed)} Allowed: {', '.join(allowed)}."
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
class StemSpec:
    """Convolutions before the first block: (kernel size, channels, stride) each; a float counts in first-stage
    widths. Between them an activation, none after the last."""

    convs: tuple[tuple[int, int | float, int], ...]
    max_pool: bool = False


STEMS: dict[str, StemSpec] = {
    # [B] appendix C: 16, 32 and 64 never scale with the network.
    "deep": StemSpec(((3, 16, 2), (3, 32, 1), (3, 64, 1), (3, 0.5, 2))),
    # timm's, which does not follow the first stage.
    "deep_128": StemSpec(((3, 16, 2), (3, 32, 1), (3, 64, 1), (3, 128, 2))),
    # He et al. 2016: 7x7 to a quarter of the first stage, then a 3x3 max pool.
    "conv7_pool": StemSpec(((7, 0.25, 2),), max_pool=True),
    # NF-RegNet.
    "conv3_stride2": StemSpec(((3, 1.0, 2),)),
    # CIFAR: full resolution, half of the first stage's width.
    "conv3": StemSpec(((3, 0.5, 1),)),
}
