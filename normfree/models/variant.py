"""`Variant`, the complete description of a network, and `StemSpec`, that of its stem.

`variants` lists variants by name, `net` builds them, `weights` maps names for them, `normfree list` prints them.
Sources: [A] arXiv 2101.08692, [B] arXiv 2102.06171 (table 1, appendix C), and the reference code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from normfree.models.activations import activation
from normfree.suggest import did_you_mean, problem, unknown


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Description of one network. Every field can be overridden: `create_model(name, field=value)`.

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
    """How the shortcut of a transition block reduces its input: 2x2 average pool then 1x1, or a strided 1x1."""
    bottleneck_ratio: float = 0.5
    """Width inside the branch, relative to `bottleneck_of`."""
    first_bottleneck_ratio: float = 0.0
    """The same for the first block of the network; 0 means no exception (NF-RegNet: 1)."""
    bottleneck_of: Literal["out", "in"] = "out"
    second_conv: bool = True
    """A second 3x3 convolution in the branch ([B] section 4)."""
    group_width: int = 128
    """Channels per group of the 3x3 convolutions; 0 means ungrouped."""
    floor_bottleneck: bool = True
    """Round the branch width down to a multiple of `group_width` (released code). False keeps the width, in
    width // group_width groups, which gives the published NFNet-F4+ of 527 M parameters ([B] table 5)."""
    attention: Literal["se", "eca", "none"] = "se"
    """Gate of the branch's channels: squeeze-excite, efficient channel attention, or none."""
    attention_at: Literal["end", "middle"] = "end"
    """After the last convolution of the branch, or before it."""
    se_ratio: float = 0.5
    """Hidden width of squeeze-excite, relative to the channels it gates."""
    se_divisor: int = 1
    """Round that width to a multiple of this; 1 means round it down, as in the reference code (timm: 8)."""
    head_ratio: tuple[int, int] = (2, 1)
    """Width of the final 1x1 convolution as a fraction of the last stage's; (0, 1) means no such convolution."""
    global_pool: Literal["avg", "max", "avgmax", ""] = "avg"
    """How the last map becomes features: its mean, its maximum, the mean of both, or not at all (timm's names)."""
    activation: str = "gelu"
    """A key of `ACTIVATIONS`."""
    norm: Literal["none", "batch"] = "none"
    """"batch" is the twin with pre-activation batch norm and without α, β, γ, gains and skip gains."""
    padding: Literal["same", "symmetric"] = "same"
    """Padding of convolutions and of the stem's max pool, see `pad_input`."""
    ws_eps: Literal["floor", "add"] = "floor"
    """How weight standardization avoids dividing by zero, see `standardize`."""
    gamma_at: Literal["activation", "convolution"] = "activation"
    """Whether γ multiplies each activation, or each convolution: then also those that read no activation, but not the
    pooled features (timm's `gamma_in_act=False`)."""
    width_divisor: int = 1
    """Round branch widths to a multiple of this before they are grouped."""
    alpha: float = 0.2
    """Scale of each residual branch ([A] section 4; 0.2 throughout the reference)."""
    skipinit: Literal["scalar", "channel"] = "scalar"
    """What scales a branch: one learnable number (SkipInit), or the gains of its last convolution."""
    skip_gain: float = 0.0
    """Initial value of that number, or of those gains. It is 0 in the reference code, an option of its NF-ResNet.
    Under AGC a gain at 0 moves by at most lr·λ·eps per step, so short runs need 1."""
    classifier_std: float = 0.01
    """Standard deviation of the classifier's initial weight; 0 starts it at zero."""
    drop_rate: float = 0.0
    """Dropout of the pooled features."""
    stochdepth_rate: float = 0.1
    """Probability of dropping a branch; it grows linearly from 0 with the block index."""
    stochdepth: Literal["plain", "rescaled"] = "plain"
    """"plain": block i of n has rate · i / n, and kept branches are not rescaled (reference code). "rescaled": rate ·
    i / (n - 1), and kept branches are divided by their probability (timm's `DropPath`)."""
    train_size: int = 224
    """Side of the training images in pixels."""
    test_size: int = 224
    """Side of the test images in pixels."""
    randaugment: str = "off"
    """Strength of RandAugment in the published recipe, "<layers>x<magnitude>" ([B] table 1)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_kind(field.name, getattr(self, field.name), _KINDS[field.name])
        activation(self.activation)
        _check_numbers(self)
        lengths = {"depths": len(self.depths), "widths": len(self.widths), "strides": len(self.strides)}
        if len(set(lengths.values())) != 1:
            got = ", ".join(f"{k}={getattr(self, k)}" for k in lengths)
            usual = max(lengths.values(), key=list(lengths.values()).count)
            wrong = [k for k, length in lengths.items() if length != usual]
            fix = f"give {' and '.join(wrong)} {usual} {'entry' if usual == 1 else 'entries'}, or change the others too"
            raise ValueError(problem(got, allowed="one entry per stage", fix=fix))
        if not 1 <= sum(self.depths) <= MAX_BLOCKS:
            given = f"depths={self.depths}"
            raise ValueError(problem(given, allowed=f"1 to {MAX_BLOCKS:,} blocks in all"))
        if len(self.head_ratio) != 2 or self.head_ratio[1] < 1 or self.head_width < 1:
            given = f"head_ratio={self.head_ratio} of {self.widths[-1]} channels"
            raise ValueError(problem(given, allowed="two numbers whose fraction of them is 1 or more"))
        if self.activation == "glu":
            given = "activation='glu' halves the channels"
            allowed = "activations that keep the shape"
            raise ValueError(problem(given, allowed=allowed, fix="use the similar 'silu'"))
        for rate in ("drop_rate", "stochdepth_rate"):
            if not 0.0 <= getattr(self, rate) < 1.0:
                given = f"{rate}={getattr(self, rate)}"
                raise ValueError(problem(given, allowed="0 or more, and less than 1", fix="use 0.0 for none"))

    @property
    def head_width(self) -> int:
        """Number of features that the classifier reads."""
        num, den = self.head_ratio
        return self.widths[-1] * num // den if num else self.widths[-1]

    def stem_width(self, width: int | float) -> int:
        """Return the channels of a stem convolution; a float is a multiple of the first stage's width."""
        return max(1, int(width * self.widths[0])) if isinstance(width, float) else width

    def branch_width(self, *, in_channels: int, out_channels: int, first: bool) -> tuple[int, int]:
        """Return (width, groups) of the 3x3 convolutions of a block."""
        ratio = (
            self.first_bottleneck_ratio if first and self.first_bottleneck_ratio else self.bottleneck_ratio
        )
        wanted = (out_channels if self.bottleneck_of == "out" else in_channels) * ratio
        width = int(wanted) if self.width_divisor == 1 else rounded(wanted, self.width_divisor)
        if width < 1:
            given = f"a branch of {out_channels} channels times {ratio:g} has no width"
            raise ValueError(problem(given, fix="use a larger bottleneck_ratio"))
        if not self.group_width:
            return width, 1
        groups = width // self.group_width
        if groups < 1:
            raise ValueError(
                problem(
                    f"group_width={self.group_width} is wider than a branch of {width} channels",
                    allowed=f"1 to {width}, or 0 for no groups",
                    fix=f"use group_width={width}",
                )
            )
        if self.floor_bottleneck:
            width = groups * self.group_width
        elif width % groups:
            raise ValueError(
                problem(
                    f"a branch of {width} channels cannot be split into {groups} equal groups",
                    allowed="a width that the groups divide",
                    fix=f"use floor_bottleneck=True, or another group_width than {self.group_width}",
                )
            )
        return width, groups

    def se_width(self, channels: int) -> int:
        """Return the hidden width of squeeze-excite on `channels` channels."""
        wanted = channels * self.se_ratio
        return max(1, int(wanted)) if self.se_divisor == 1 else rounded(wanted, self.se_divisor, keep=0.0)

    def stochdepth_rates(self) -> list[float]:
        """Return the rate of stochastic depth of every block, in order."""
        total = sum(self.depths)
        steps = total if self.stochdepth == "plain" else max(1, total - 1)
        return [self.stochdepth_rate * i / steps for i in range(total)]

    def with_overrides(self, overrides: dict[str, object]) -> Variant:
        """Return a copy with some fields replaced; lists become tuples.

        Raises:
            ValueError: a name is not a field, or the fields contradict each other.
        """
        known = [f.name for f in fields(self)]
        for name in overrides:
            if name in SYNONYMS:
                given = f"unknown model field {name!r}"
                raise ValueError(problem(given, fix=f"use {SYNONYMS[name]!r}"))
            if name not in known:
                raise ValueError(unknown("model field", name, known))
        clean = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
        return replace(self, **clean)  # type: ignore[arg-type]  # __post_init__ checks the values


# Names of options in other libraries, whose spelling suggests another field -> our name.
SYNONYMS = {
    "drop_path": "stochdepth_rate",
    "drop_path_rate": "stochdepth_rate",
    "stochastic_depth": "stochdepth_rate",
    "stochastic_depth_prob": "stochdepth_rate",
    "survival_prob": "stochdepth_rate",
    "dropout": "drop_rate",
    "act_layer": "activation",
    "channels": "widths",
    "layers": "depths",
    "stem_type": "stem",
    "in_chans": "in_channels",
    "img_size": "train_size",
    "classes": "num_classes",
    "checkpoint_path": "weights",
    "pretrained": "weights",
}


def rounded(value: float, divisor: int, *, keep: float = 0.9) -> int:
    """Return the multiple of `divisor` nearest to `value`, or the next one if that is less than keep · value.

    Source: timm, `make_divisible`.

    >>> rounded(68, 8), rounded(11, 8)
    (72, 16)
    """
    near = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return near + divisor if near < keep * value else near


def eca_kernel_size(channels: int) -> int:
    """Return the kernel size of ECA for C channels: |log2(C) + 1| / 2, made odd, at least 3 (arXiv 1910.03151)."""
    size = int(abs(math.log2(channels) + 1) / 2)
    return max(size if size % 2 else size + 1, 3)


# Far above all networks, and below what overflows or never ends.
LARGEST, MAX_BLOCKS = 1_000_000, 1_000
# Smallest value of each field that is a number or several, without those that `__post_init__` checks by itself.
_LEAST: dict[str, float] = {
    **dict.fromkeys(
        ("depths", "widths", "strides", "se_divisor", "width_divisor", "train_size", "test_size"), 1
    ),
    **dict.fromkeys(
        ("group_width", "bottleneck_ratio", "first_bottleneck_ratio", "se_ratio", "head_ratio"), 0
    ),
    **dict.fromkeys(("alpha", "skip_gain"), -LARGEST),
    "classifier_std": 0,
}

# Types of the fields.
_KINDS: dict[str, Any] = get_type_hints(Variant)


def _check_numbers(variant: Variant) -> None:
    """Raise `ValueError` for numbers with which no network can be computed. A variant may come from a file."""
    for name, least in _LEAST.items():
        value = getattr(variant, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not least <= number <= LARGEST:  # also False for NaN
                nearest = LARGEST if number > LARGEST else least
                raise ValueError(
                    problem(f"{name}={value}", allowed=f"{least:,} to {LARGEST:,}", fix=f"use {nearest:,}")
                )


def _check_kind(name: str, value: object, kind: Any) -> None:
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        if value not in allowed:
            given = f"{name}={value!r}.{did_you_mean(str(value), allowed)}"
            raise ValueError(problem(given, allowed=", ".join(allowed)))
    elif get_origin(kind) is tuple:
        if not isinstance(value, tuple) or any(type(v) is not int for v in value):
            raise ValueError(problem(f"{name}={value!r}", allowed="a tuple of integers"))
    elif not (isinstance(value, kind) or (kind is float and type(value) is int)) or (type(value) is bool) != (
        kind is bool
    ):
        raise ValueError(problem(f"{name}={value!r}", allowed=_KIND_NAMES[kind]))


_KIND_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


@dataclass(frozen=True)
class StemSpec:
    """Convolutions before the first block, with an activation between them and none after the last.

    convs: (kernel size, channels, stride) of each; channels given as a float are a multiple of the first stage's width.
    max_pool: whether a 3x3 max pool of stride 2 follows.
    """

    convs: tuple[tuple[int, int | float, int], ...]
    max_pool: bool = False


STEMS: dict[str, StemSpec] = {
    # [B] appendix C: 16, 32 and 64 do not scale with the network.
    "deep": StemSpec(((3, 16, 2), (3, 32, 1), (3, 64, 1), (3, 0.5, 2))),
    # timm: the last width does not depend on the first stage either.
    "deep_128": StemSpec(((3, 16, 2), (3, 32, 1), (3, 64, 1), (3, 128, 2))),
    # He et al. 2016: 7x7 to a quarter of the first stage's width, then a 3x3 max pool.
    "conv7_pool": StemSpec(((7, 0.25, 2),), max_pool=True),
    # NF-RegNet.
    "conv3_stride2": StemSpec(((3, 1.0, 2),)),
    # CIFAR: full resolution, half of the first stage's width.
    "conv3": StemSpec(((3, 0.5, 1),)),
}
