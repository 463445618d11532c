"""Parameters and multiply-accumulates against the tables of the papers and the counts of the reference code."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from normfree.models.cost import count
from normfree.models.net import Net
from normfree.models.variant import STEMS, Variant
from normfree.models.variants import VARIANTS, list_models, variant_of
from normfree.models.zoo import create_model

# Reference code, counted by running it: name -> (parameters, MACs at test size as printed, in G).
PUBLISHED = {
    "nfnet_f0": (71_489_284, "12.384"),
    "nfnet_f1": (132_634_256, "35.539"),
    "nfnet_f2": (193_779_228, "62.593"),
    "nfnet_f3": (254_924_200, "114.764"),
    "nfnet_f4": (316_069_172, "215.241"),
    "nfnet_f5": (377_214_144, "289.757"),
    "nfnet_f6": (438_359_116, "377.280"),
    "nfnet_f7": (499_504_088, "478.782"),
    "nfnet_f0_plus": (118_824_516, "19.520"),
    "nfnet_f1_plus": (220_357_008, "55.445"),
    "nfnet_f2_plus": (321_889_500, "97.275"),
    "nfnet_f3_plus": (423_421_992, "177.987"),
    "nfnet_f4_plus": (524_954_484, "333.390"),
    "nfnet_f5_plus": (626_486_976, "448.427"),
    "nfnet_f6_plus": (728_019_468, "583.517"),
    "nfnet_f7_plus": (829_551_960, "740.158"),
    "nf_resnet50": (25_557_048, None),
    "nf_resnet101": (44_549_193, None),
    "nf_resnet152": (60_192_858, None),
    "nf_resnet200": (64_673_898, None),
    "nf_resnet288": (146_460_552, None),
    "nf_regnet_b0": (8_595_372, "0.4437"),
    "nf_regnet_b1": (10_019_208, "0.7335"),
    "nf_regnet_b2": (13_785_904, None),
    "nf_regnet_b3": (18_136_667, "1.9992"),
    "nf_regnet_b4": (29_315_830, "4.4673"),
    "nf_regnet_b5": (48_707_138, None),
    "nf_regnet_b6": (70_045_805, None),
    "nf_regnet_b7": (101_743_204, None),
    "nf_regnet_b8": (142_314_441, "63.719"),
}
# With squeeze-excite (ratio 0.25), from the same source.
WITH_SE = {
    "nf_resnet50": 35_635_704,
    "nf_resnet101": 63_562_505,
    "nf_resnet152": 86_565_402,
    "nf_resnet200": 93_153_834,
    "nf_resnet288": 213_422_472,
}
# The right column of the "+" table: stage 1 keeps 192 channels in one group. F4+ is the 527 M of [B] table 5.
UNFLOORED_PLUS = [
    (119_230_404, "21.181"), (221_181_072, "60.714"), (323_131_740, "106.886"), (425_082_408, "195.929"),
    (527_033_076, "367.414"), (628_983_744, "494.564"), (730_934_412, "643.906"), (832_885_080, "817.095"),
]  # fmt: skip
TRAIN_MACS = ["6.977", "17.438", "33.139", "67.944", "121.122", "169.498", "228.293", "298.477"]


def giga(macs: int, digits: str) -> str:
    return f"{macs / 1e9:.{len(digits.split('.')[1])}f}"


def on_meta(variant: Variant, image_size: int) -> tuple[int, int]:
    """Parameters and MACs of the built network, counted by torch on the meta device."""
    with torch.device("meta"):
        net = Net(variant).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, image_size, image_size))
    return sum(p.numel() for p in net.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_ones(name):
    parameters, macs = PUBLISHED[name]
    cost = count(variant_of(name))
    assert cost.parameters == parameters
    if macs:
        assert giga(cost.macs, macs) == macs


@pytest.mark.parametrize("name", WITH_SE)
def test_nf_resnets_with_squeeze_excite(name):
    assert count(variant_of(name).with_overrides({"attention": "se"})).parameters == WITH_SE[name]


@pytest.mark.parametrize("level", range(8))
def test_plus_variants_with_an_unfloored_bottleneck(level):
    cost = count(variant_of(f"nfnet_f{level}_plus").with_overrides({"floor_bottleneck": False}))
    parameters, macs = UNFLOORED_PLUS[level]
    assert (cost.parameters, giga(cost.macs, macs)) == (parameters, macs)


@pytest.mark.parametrize("level", range(8))
def test_macs_at_the_training_size(level):
    variant = variant_of(f"nfnet_f{level}")
    assert giga(count(variant, image_size=variant.train_size).macs, TRAIN_MACS[level]) == TRAIN_MACS[level]


@pytest.mark.parametrize(
    ("level", "printed", "computed"),
    [(2, "1.0995", "1.1451"), (5, "10.561", "11.098"), (6, "19.687", "20.137"), (7, "37.448", "38.161")],
)
def test_regnets_whose_test_size_is_no_multiple_of_32(level, printed, computed, monkeypatch):
    """The reference code counts with 17 / 2 = 8.5, its network (SAME padding) has 9: both are computed here."""
    variant = variant_of(f"nf_regnet_b{level}")
    assert giga(count(variant).macs, computed) == computed
    monkeypatch.setattr(math, "ceil", lambda fraction: fraction)
    assert giga(count(variant).macs, printed) == printed


@pytest.mark.parametrize("name", [n for n in list_models() if count(variant_of(n)).parameters < 80e6])
def test_arithmetic_equals_the_network_on_the_meta_device(name):
    variant = variant_of(name)
    cost = count(variant)
    assert (cost.parameters, cost.macs) == on_meta(variant, variant.test_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in list_models() if count(variant_of(n)).parameters >= 80e6])
def test_arithmetic_equals_the_large_networks_on_the_meta_device(name):
    variant = variant_of(name)
    cost = count(variant)
    assert (cost.parameters, cost.macs) == on_meta(variant, variant.test_size)


def test_resnet50_twin_has_the_size_of_a_resnet50_v2():
    # He et al. 2016 (pre-activation): 25 549 352 with 1000 classes, as in timm's resnetv2_50.
    assert count(variant_of("resnet50")).parameters == 25_549_352


def test_depths_are_multiples_of_f0():
    for level in range(8):
        assert variant_of(f"nfnet_f{level}").depths == tuple(d * (level + 1) for d in (1, 2, 6, 3))


@pytest.mark.parametrize("level", range(4))
def test_ablation_variants_lead_from_the_baseline_to_the_nfnet(level):
    baseline, width, final = (variant_of(f"nfnet_f{level}{s}") for s in ("_baseline", "_width_pattern", ""))
    assert baseline.with_overrides({"widths": final.widths}) == width
    assert width.with_overrides({"second_conv": True}) == final
    assert variant_of(f"nfnet_f{level}_default_width").with_overrides({"widths": final.widths}) == final


def test_every_twin_differs_only_in_the_norm():
    twins = {f"bn_nfnet_f{i}": f"nfnet_f{i}" for i in range(4)}
    twins |= {n: f"nf_{n}" for n in list_models("resnet*")}
    assert len(twins) == 4 + 6 + len(list_models("nf_resnet_*"))
    for twin, name in twins.items():
        same = {"norm": "none", "classifier_std": VARIANTS[name].classifier_std}
        assert VARIANTS[twin].with_overrides(same) == VARIANTS[name]


def test_small_variants_have_a_third_to_three_million_parameters():
    for name in list_models("nf_resnet_*"):
        variant = variant_of(name)
        assert variant.train_size <= 64
        assert 0.3e6 < count(variant, num_classes=10).parameters < 3.2e6


def test_list_models_matches_patterns_in_table_order():
    assert list_models("nf_regnet_b[01]") == ["nf_regnet_b0", "nf_regnet_b1"]
    assert list_models() == list(VARIANTS)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nfnet-f0", {}, "unknown model 'nfnet-f0'. Did you mean 'nfnet_f0'? All names: normfree list models"),
        ("nfnet_f0", {"width": (1,)}, "unknown model field 'width'. Did you mean 'widths'? Allowed: 'depths', "),
        ("nfnet_f0", {"activation": "sil"}, "unknown activation 'sil'. Did you mean 'silu'? Allowed: 'identity', "),
        ("nfnet_f0", {"activation": "glu"}, "activation='glu' halves the channels. Allowed: activations that keep the "
         "shape. Fix: use the similar 'silu'."),
        ("nfnet_f0", {"depths": (1, 2)}, "depths=(1, 2), widths=(256, 512, 1536, 1536), strides=(1, 2, 2, 2). "
         "Allowed: one entry per stage. Fix: give depths 4 entries, or change the others too."),
        ("nfnet_f0", {"widths": (64, 128, 128, 128)}, "group_width=128 is wider than a branch of 32 channels. "
         "Allowed: 1 to 32, or 0 for no groups. Fix: use group_width=32."),
        ("nfnet_f0", {"drop_rate": 1.0}, "drop_rate=1.0. Allowed: 0 or more, and less than 1. Fix: use 0.0 for none."),
        ("nfnet_f0", {"depths": (0, 1, 1, 1)}, "depths=(0, 1, 1, 1). Allowed: 1 to 1,000,000. Fix: use 1."),
        ("nfnet_f0", {"depths": (1, 1, 1, 998)}, "depths=(1, 1, 1, 998). Allowed: 1 to 1,000 blocks in all."),
        ("nfnet_f0", {"strides": (1, 2, 2, 0)}, "strides=(1, 2, 2, 0). Allowed: 1 to 1,000,000. Fix: use 1."),
        ("nfnet_f0", {"alpha": float("inf")}, "alpha=inf. Allowed: -1,000,000 to 1,000,000. Fix: use 1,000,000."),
        ("nfnet_f0", {"head_ratio": (1, 2000)}, "head_ratio=(1, 2000) of 1536 channels. Allowed: two numbers"),
        ("nfnet_f0", {"bottleneck_ratio": 0.001}, "a branch of 256 channels times 0.001 has no width."),
        ("nfnet_f0", {"in_channels": 0}, "in_channels=0. Allowed: 1 to 1,000,000."),
        ("nfnet_f0", {"stem": "conv"}, "stem='conv'. Did you mean 'conv3'? Allowed: deep, deep_128, conv7_pool, "),
        ("nfnet_f0", {"attention": "ecs"}, "attention='ecs'. Did you mean 'eca'? Allowed: se, eca, none."),
        ("nfnet_f0", {"drop_rate": "high"}, "drop_rate='high'. Allowed: a number."),
        ("nfnet_f0", {"second_conv": 1}, "second_conv=1. Allowed: True or False."),
        ("nfnet_f0", {"train_size": True}, "train_size=True. Allowed: an integer."),
        ("nfnet_f0", {"depths": 3}, "depths=3. Allowed: a tuple of integers."),
        ("nfnet_f0", {"num_classes": -1}, "num_classes=-1. Allowed: a count, or 0 for pooled features."),
    ],
)  # fmt: skip
def test_errors_name_the_allowed_values(name, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared below
        create_model(name, **fields)
    assert str(error.value).startswith(message)


def test_a_variant_built_from_its_own_fields_is_equal():
    variant = variant_of("nf_regnet_b2")
    fields = {"depths": list(variant.depths), "widths": list(variant.widths)}
    assert variant.with_overrides(fields) == variant
    assert set(STEMS) >= {v.stem for v in VARIANTS.values()}
