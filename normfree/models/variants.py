"""`VARIANTS`, every network by name, from the tables of the papers, of the reference code and of timm.

Sources: [A] arXiv 2101.08692, [B] arXiv 2102.06171 (table 1, appendix C), and the reference code.
"""

from __future__ import annotations

import fnmatch
from dataclasses import replace
from typing import Any, Literal

from normfree.models.variant import Variant, rounded
from normfree.suggest import did_you_mean


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
    variants: dict[str, Variant] = {}
    for level, (train, test, drop, augment) in enumerate(sizes):
        variant = Variant(
            depths=tuple(d * (level + 1) for d in (1, 2, 6, 3)),
            widths=(256, 512, 1536, 1536),
            drop_rate=drop,
            stochdepth_rate=0.25,
            train_size=train,
            test_size=test,
            randaugment=augment,
        )
        variants[f"nfnet_f{level}"] = variant
        variants[f"nfnet_f{level}_plus"] = replace(variant, widths=(384, 768, 2048, 2048))
        if level <= 3:  # [B] table 6: batch-norm twins larger than F3 were unstable
            variants[f"bn_nfnet_f{level}"] = replace(variant, norm="batch")
            # [B] table 6: steps from the NF SE-ResNeXt-D baseline, with the new depths, to the NFNet
            default_widths = (256, 512, 1024, 2048)
            variants[f"nfnet_f{level}_baseline"] = replace(variant, widths=default_widths, second_conv=False)
            variants[f"nfnet_f{level}_width_pattern"] = replace(variant, second_conv=False)
            variants[f"nfnet_f{level}_default_width"] = replace(variant, widths=default_widths)
    return variants


def _nf_resnet() -> dict[str, Variant]:
    # Reference code, `nf_resnet.py`; 26 is timm's depth pattern, which the reference code does not have.
    depths = {
        26: (2, 2, 2, 2),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
        288: (24, 24, 24, 24),
    }
    variants: dict[str, Variant] = {}
    for name, depth in depths.items():
        variant = Variant(
            depths=depth,
            widths=(256, 512, 1024, 2048),
            stem="conv7_pool",
            shortcut="strided",
            bottleneck_ratio=0.25,
            second_conv=False,
            group_width=0,
            attention="none",
            se_ratio=0.25,
            head_ratio=(0, 1),
            activation="relu",
        )
        variants[f"nf_resnet{name}"] = variant
        # Reference code, `resnet.py`: pre-activation (v2), classifier initialized to zero.
        variants[f"resnet{name}"] = replace(variant, norm="batch", classifier_std=0.0)
    return variants


# Reference code, `nf_regnet.py`: base widths (scaled by 0.75), depths, train px, test px, dropout.
_REGNETS = (
    ((48, 104, 208, 440), (1, 3, 6, 6), 192, 224, 0.2),
    ((48, 104, 208, 440), (2, 4, 7, 7), 224, 256, 0.2),
    ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272, 0.3),
    ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320, 0.3),
    ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384, 0.4),
    ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456, 0.4),
    ((88, 184, 376, 792), (3, 8, 16, 16), 448, 528, 0.5),
    ((96, 208, 416, 880), (4, 10, 19, 19), 512, 600, 0.5),
    ((104, 232, 456, 968), (4, 11, 22, 22), 600, 672, 0.5),
)


def _nf_regnet() -> dict[str, Variant]:
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
            attention_at="middle",
            head_ratio=(1280, 440),
            activation="silu",
            classifier_std=0.0,
            drop_rate=drop,
            train_size=train,
            test_size=test,
        )
        for level, (widths, depths, train, test, drop) in enumerate(_REGNETS)
    }


def _small() -> dict[str, Variant]:
    # For images of 32 and 64 px, from no paper: NF-ResNets with squeeze-excite and a third to three million parameters,
    # with CIFAR's 3x3 stem or ResNet's 7x7 stem. Skip gains start at 1 because training runs are short.
    shapes = {
        "nano": ((1, 2, 2), (64, 128, 256)),
        "micro": ((1, 2, 2), (128, 256, 512)),
        "mini": ((2, 4, 4), (128, 256, 512)),
    }
    variants: dict[str, Variant] = {}
    for name, (depths, widths) in shapes.items():
        variant = Variant(
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
            ("", variant),
            ("_64", replace(variant, stem="conv7_pool", train_size=64, test_size=64)),
        ):
            variants[f"nf_resnet_{name}{suffix}"] = sized
            variants[f"resnet_{name}{suffix}"] = replace(sized, norm="batch")
    return variants


def _timm() -> dict[str, Variant]:
    # The networks of timm 1.0.31 (`models/nfnet.py`), named with the prefix timm_. They differ from the reference code
    # in the fields set here; dm_* are for the released weights.
    common: dict[str, Any] = {
        "ws_eps": "add",
        "stochdepth": "rescaled",
        "stochdepth_rate": 0.0,
        "shortcut": "avgpool",
    }
    own = {
        **common, "padding": "symmetric", "gamma_at": "convolution", "skipinit": "channel", "drop_rate": 0.0,
        "se_divisor": 8, "width_divisor": 8, "randaugment": "off", "classifier_std": 0.01,
    }  # fmt: skip
    variants: dict[str, Variant] = {}
    nfnets = _nfnet()
    for level in range(8):
        variant = replace(nfnets[f"nfnet_f{level}"], activation="gelu_erf", **common)
        if level <= 6:
            variants[f"dm_nfnet_f{level}"] = replace(variant, drop_rate=0.0, randaugment="off")
        variants[f"nfnet_f{level}"] = replace(variant, **own)
    light = replace(
        variants["nfnet_f0"], activation="silu", bottleneck_ratio=0.25, group_width=64, se_ratio=0.25
    )
    variants["nfnet_l0"] = replace(light, head_ratio=(3, 2), train_size=224, test_size=288)
    for level, (train, test) in enumerate(((224, 288), (256, 320), (320, 384), (352, 448))):
        variants[f"eca_nfnet_l{level}"] = replace(
            light,
            depths=variants[f"nfnet_f{level}"].depths,
            head_ratio=(2, 1) if level else (3, 2),
            attention="eca",
            train_size=train,
            test_size=test,
        )
    variants["test_nfnet"] = replace(
        variants["nfnet_l0"], depths=(1, 1, 1, 1), widths=(32, 64, 96, 128), group_width=8, stem="deep_128",
        train_size=160, test_size=160,
    )  # fmt: skip
    sizes = {"nf_resnet50": (256, 288)}
    kinds: dict[str, Literal["none", "se", "eca"]] = {"": "none", "se": "se", "eca": "eca"}
    for infix, attention in kinds.items():
        for depth in (26, 50, 101):
            name = f"nf_{infix}resnet{depth}"
            train, test = sizes.get(name, (224, 224))
            variants[name] = replace(
                _nf_resnet()[f"nf_resnet{depth}"], attention=attention, **{**own, "se_ratio": 1 / 16},
                train_size=train, test_size=test,
            )  # fmt: skip
    for level in range(6):
        name, base = f"nf_regnet_b{level}", _REGNETS[level][0]
        widths = tuple(rounded(0.75 * w, 8) for w in base)
        head = rounded(0.75 * (1280 * base[-1] // 440), 8)
        variants[name] = replace(_nf_regnet()[name], widths=widths, head_ratio=(head, widths[-1]), **own)
    variants["nf_regnet_b0"] = replace(variants["nf_regnet_b0"], test_size=256)
    variants["nf_regnet_b1"] = replace(variants["nf_regnet_b1"], train_size=256, test_size=288)
    return {f"timm_{name}": variant for name, variant in variants.items()}


# Every network by name.
VARIANTS: dict[str, Variant] = {**_nfnet(), **_nf_resnet(), **_nf_regnet(), **_small(), **_timm()}


def variant_of(name: str) -> Variant:
    """Return the variant called `name`.

    Raises:
        ValueError: the name is unknown; the message has the nearest one.
    """
    if name not in VARIANTS:
        hint, full = did_you_mean(name, VARIANTS), name
        name = name.partition(".")[0]  # timm's names may end in a tag
        if f"timm_{name}" in VARIANTS:
            hint = f" timm's network of that name is 'timm_{name}'"
            published = name.removeprefix("dm_")
            hint += f"; {published!r} computes it as DeepMind's code does." if published != name else "."
        raise ValueError(f"unknown model {full!r}.{hint} All names: normfree list models")
    return VARIANTS[name]


# ResNets of our table whose names timm 1.0.31 gives to networks with another function.
_TIMM_RESNETS = ("resnet26", "resnet50", "resnet101", "resnet152", "resnet200")


def name_in_timm(name: str) -> str:
    """Return the name under which `normfree.timm` registers a variant with timm.

    It is the variant's own, or the one after `normfree_` if timm has a network of that name, which computes something
    else or has other names of parameters.

    >>> name_in_timm("nf_resnet_nano"), name_in_timm("nfnet_f0")
    ('nf_resnet_nano', 'normfree_nfnet_f0')
    """
    taken = name in _TIMM_RESNETS or f"timm_{name}" in VARIANTS
    return f"normfree_{name}" if taken else name


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of all networks that match a shell pattern, in the order of `VARIANTS`.

    Args:
        pattern: with * for any characters and [ab] for one of some.

    Examples:
        >>> from normfree import list_models
        >>> list_models("nf_regnet_b[01]")
        ['nf_regnet_b0', 'nf_regnet_b1']
    """
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
