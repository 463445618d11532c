"""Parameter counts and multiply-accumulates against the papers' tables and the reference code's own counts."""

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
def test_plus_rows_with_an_unfloored_bottleneck(level):
    cost = count(variant_of(f"nfnet_f{level}_plus").with_overrides({"floor_bottleneck": False}))
    parameters, macs = UNFLOORED_PLUS[level]
    assert (cost.parameters, giga(cost.macs, macs)) == (parameters, macs)


@pytest.mark.parametrize("level", range(8))
def test_macs_at_the_training_size(level):
    row = variant_of(f"nfnet_f{level}")
    assert giga(count(row, image_size=row.train_size).macs, TRAIN_MACS[level]) == TRAIN_MACS[level]


@pytest.mark.parametrize(
    ("level", "printed", "computed"),
    [(2, "1.0995", "1.1451"), (5, "10.561", "11.098"), (6, "19.687", "20.137"), (7, "37.448", "38.161")],
)
def test_regnets_whose_test_size_is_no_multiple_of_32(level, printed, computed, monkeypatch):
    """The reference's counting code halves 17 to 8.5, the network (SAME padding) to 9: both are computed."""
    row = variant_of(f"nf_regnet_b{level}")
    assert giga(count(row).macs, computed) == computed
    monkeypatch.setattr(math, "ceil", lambda fraction: fraction)
    assert giga(count(row).macs, printed) == printed


@pytest.mark.parametrize("name", [n for n in list_models() if count(variant_of(n)).parameters < 80e6])
def test_arithmetic_equals_the_network_on_the_meta_device(name):
    row = variant_of(name)
    cost = count(row)
    assert (cost.parameters, cost.macs) == on_meta(row, row.test_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in list_models() if count(variant_of(n)).parameters >= 80e6])
def test_arithmetic_equals_the_large_networks_on_the_meta_device(name):
    row = variant_of(name)
    cost = count(row)
    assert (cost.parameters, cost.macs) == on_meta(row, row.test_size)


def test_resnet50_twin_has_the_size_of_a_resnet50_v2():
    # He et al. 2016 (pre-activation): 25 549 352 with 1000 classes, as in timm's resnetv2_50.
    assert count(variant_of("resnet50")).parameters == 25_549_352


def test_depths_are_multiples_of_f0():
    for level in range(8):
        assert variant_of(f"nfnet_f{level}").depths == tuple(d * (level + 1) for d in (1, 2, 6, 3))


@pytest.mark.parametrize("level", range(4))
def test_ablation_rows_lead_from_the_baseline_to_the_nfnet(level):
    baseline, width, final = (variant_of(f"nfnet_f{level}{s}") for s in ("_baseline", "_width_pattern", ""))
    assert baseline.with_overrides({"widths": final.widths}) == width
    assert width.with_overrides({"second_conv": True}) == final
    assert variant_of(f"nfnet_f{level}_default_width").with_overrides({"widths": final.widths}) == final


def test_every_twin_differs_in_the_norm_alone():
    twins = {f"bn_nfnet_f{i}": f"nfnet_f{i}" for i in range(4)}
    twins |= {n: f"nf_{n}" for n in list_models("resnet*")}
    assert len(twins) == 4 + 6 + len(list_models("nf_resnet_*"))
    for twin, row in twins.items():
        same = {"norm": "none", "classifier_std": VARIANTS[row].classifier_std}
        assert VARIANTS[twin].with_overrides(same) == VARIANTS[row]


def test_small_rows_have_a_third_to_three_million_parameters():
    for name in list_models("nf_resnet_*"):
        row = variant_of(name)
        assert row.train_size <= 64
        assert 0.3e6 < count(row, num_classes=10).parameters < 3.2e6


def test_list_models_matches_patterns_in_table_order():
    assert list_models("nf_regnet_b[01]") == ["nf_regnet_b0", "nf_regnet_b1"]
    assert list_models() == list(VARIANTS)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("nfnet-f0", {}, "unknown model 'nfnet-f0'. Did you mean 'nfnet_f0'? All names: normfree list models"),
        ("nfnet_f0", {"width": (1,)}, "unknown model field 'width'. Did you mean 'widths'? Fields: depths, "),
        ("nfnet_f0", {"activation": "swish"}, "activation 'swish' is not known."),
        ("nfnet_f0", {"activation": "glu"}, "activation='glu' halves the channels, so no row can use it; "
         "nearest is 'silu'."),
        ("nfnet_f0", {"depths": (1, 2)}, "depths=(1, 2), widths=(256, 512, 1536, 1536), strides=(1, 2, 2, 2): "
         "depths, widths and strides need one entry per stage; give strides=(1, 2) too."),
        ("nfnet_f0", {"widths": (64, 128, 128, 128)}, "group_width=128 is wider than a branch of 32 channels; "
         "group_width=32 or less fits."),
        ("nfnet_f0", {"drop_rate": 1.0}, "drop_rate=1.0: expected a number in [0, 1)."),
        ("nfnet_f0", {"depths": (0, 1, 1, 1)}, "depths=(0, 1, 1, 1), widths=(256, 512, 1536, 1536): every stage "
         "needs at least one block and one channel."),
        ("nfnet_f0", {"stem": "conv"}, "stem='conv'. Did you mean 'conv3'? Allowed: deep, deep_128, conv7_pool, "),
        ("nfnet_f0", {"attention": "ecs"}, "attention='ecs'. Did you mean 'eca'? Allowed: se, eca, none."),
        ("nfnet_f0", {"drop_rate": "high"}, "drop_rate='high': expected a number."),
        ("nfnet_f0", {"second_conv": 1}, "second_conv=1: expected True or False."),
        ("nfnet_f0", {"train_size": True}, "train_size=True: expected a whole number."),
        ("nfnet_f0", {"depths": 3}, "depths=3: expected whole numbers, one for each stage or part."),
        ("nfnet_f0", {"num_classes": -1}, "num_classes=-1: expected a count, or 0 for pooled features."),
    ],
)  # fmt: skip
def test_errors_say_what_is_allowed(name, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared below
        create_model(name, **fields)
    assert str(error.value).startswith(message)


def test_a_row_built_from_its_own_fields_is_the_row():
    row = variant_of("nf_regnet_b2")
    assert row.with_overrides({"depths": list(row.depths), "widths": list(row.widths)}) == row
    assert set(STEMS) >= {v.stem for v in VARIANTS.values()}
