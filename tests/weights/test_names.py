"""Tests of the name maps: they are bijections, and report names that they do not know."""

import numpy as np
import pytest
import torch

from normfree.models.variants import list_models, variant_of
from normfree.models.zoo import create_model
from normfree.weights.names import (
    haiku_from_state_dict,
    naming_of,
    state_dict_from_haiku,
    state_dict_from_timm,
    timm_from_state_dict,
    to_our_names,
)

# Number of modules and tensors in the released trees, from the reference code.
RELEASED = {
    "nfnet_f0": (94, 233), "nfnet_f1": (178, 437), "nfnet_f2": (262, 641), "nfnet_f3": (346, 845),
    "nfnet_f4": (430, 1049), "nfnet_f5": (514, 1253), "nfnet_f6": (598, 1457), "nfnet_f7": (682, 1661),
    "nf_resnet50": (70, 177), "nf_regnet_b0": (103, 244),
}  # fmt: skip
HAIKU_VARIANTS = [n for n in list_models("nf*") if not n.startswith("nf_resnet_")]


def narrow(name):
    """Return a network with the depths of the variant and small widths, so that the deepest one fits in memory."""
    stages = len(variant_of(name).widths)
    return create_model(name, num_classes=3, widths=(16,) * (stages - 1) + (32,), group_width=4)


def randomized(net):
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("name", HAIKU_VARIANTS)
def test_round_trip_through_the_released_naming_is_exact(name):
    state = randomized(narrow(name)).state_dict()
    tree = haiku_from_state_dict(state)
    back = state_dict_from_haiku(tree)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    again = haiku_from_state_dict(back)
    assert {(m, n): a.shape for m, arrays in again.items() for n, a in arrays.items()} == {
        (m, n): a.shape for m, arrays in tree.items() for n, a in arrays.items()
    }
    if name in RELEASED:
        assert (len(tree), sum(map(len, tree.values()))) == RELEASED[name]


def test_layouts_are_hwio_and_io():
    net = randomized(create_model("nf_regnet_b0", num_classes=3))
    tree = haiku_from_state_dict(net.state_dict())
    conv = net.stages[2][1].conv1.weight.detach().numpy()
    assert np.array_equal(tree["NF_RegNet/~/nf_block_5/~/conv1"]["w"], conv.transpose(2, 3, 1, 0))
    assert np.array_equal(tree["NF_RegNet/~/linear"]["w"], net.head.weight.detach().numpy().T)
    assert tree["NF_RegNet/~/nf_block"]["skip_gain"].shape == ()


def test_names_unknown_to_the_released_code_are_listed():
    tree = haiku_from_state_dict(create_model("nf_resnet26", num_classes=3).state_dict())
    tree["NF_ResNet/~/mystery"] = {"w": np.zeros(3, np.float32)}
    tree["NF_ResNet/~/linear"]["extra"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"2 names in the haiku tree are not those of the released NF_ResNet: "
                                         r"NF_ResNet/~/linear:extra, NF_ResNet/~/mystery:w"):  # fmt: skip
        state_dict_from_haiku(tree)
    with pytest.raises(ValueError, match=r"the haiku tree has modules of \['VGG'\]\. Allowed: one of NFNet"):
        state_dict_from_haiku({"VGG/~/conv": {}})
    with pytest.raises(
        ValueError, match=r"names have no counterpart in the released NF_ResNet: stages.0.0.norm0"
    ):
        haiku_from_state_dict(create_model("resnet26", num_classes=3).state_dict())


TIMM_VARIANTS = [
    name for name in list_models("timm_*") if variant_of(name).depths[0] == 1 or "nfnet" not in name
]


@pytest.mark.parametrize("name", [*TIMM_VARIANTS, "nfnet_f0"])
def test_round_trip_through_the_names_of_timm_is_exact(name):
    with torch.device("meta"):
        net = create_model(name, num_classes=7, in_channels=4)
    state = net.state_dict()
    theirs = timm_from_state_dict(state, attention_at=net.variant.attention_at)
    assert len(theirs) == len(state)
    assert all(v.ndim == 4 for k, v in theirs.items() if k.endswith("gain") and "skipinit" not in k)
    again = state_dict_from_timm(theirs)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_the_naming_is_recognized():
    for name in (
        "nfnet_f0",
        "timm_nf_regnet_b0",
        "timm_eca_nfnet_l0",
        "timm_nf_resnet26",
        "timm_nf_seresnet26",
    ):
        state = randomized(create_model(name, num_classes=3)).state_dict()
        theirs = timm_from_state_dict(state, attention_at=variant_of(name).attention_at)
        assert (naming_of(state), naming_of(theirs)) == ("ours", "timm")
        headless = {k: v for k, v in theirs.items() if not k.startswith("head")}
        assert naming_of(headless) == "timm"
        again = to_our_names(theirs)
        assert all(torch.equal(again[k], v) for k, v in state.items())
    tree = haiku_from_state_dict(create_model("nf_resnet26", num_classes=3).state_dict())
    assert naming_of(tree) == "haiku"


def test_names_unknown_to_timm_are_listed():
    theirs = timm_from_state_dict(create_model("timm_test_nfnet", num_classes=3).state_dict())
    theirs["stages.0.0.bn1.weight"] = theirs["head.fc.extra"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"^2 names are not those of timm's NormFreeNet: head\.fc\.extra, "
                                         r"stages\.0\.0\.bn1\.weight\.$"):  # fmt: skip
        state_dict_from_timm(theirs)
    with pytest.raises(ValueError, match=r"names have no counterpart in timm: stages\.0\.0\.norm0\.weight"):
        timm_from_state_dict(create_model("resnet26", num_classes=3).state_dict())


def test_two_names_for_one_parameter_are_refused():
    tree = haiku_from_state_dict(create_model("nf_resnet26", num_classes=3).state_dict())
    tree["NF_ResNet/~/linear"]["bias"] = tree["NF_ResNet/~/linear"]["b"] + 1
    with pytest.raises(
        ValueError, match=r"^two names stand for 'head\.bias'\. Allowed: one name for each parameter\.$"
    ):
        state_dict_from_haiku(tree)
    theirs = timm_from_state_dict(create_model("timm_nf_resnet26", num_classes=3).state_dict())
    theirs["stem.conv1.gain"] = theirs["stem.conv.gain"] + 1
    with pytest.raises(ValueError, match=r"^two names stand for 'stem\.conv0\.gain'"):
        state_dict_from_timm(theirs)
