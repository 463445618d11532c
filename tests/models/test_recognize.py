"""Every variant is recognized by its names and shapes, in each of its namings; nothing else is."""

import numpy as np
import pytest
import torch

from normfree.models.net import Net
from normfree.models.recognize import recognize, shapes_of
from normfree.models.variants import VARIANTS
from normfree.weights.names import haiku_from_state_dict, timm_from_state_dict

# Variants up to the depth of F2 by default; the others are as different from each other, but slow.
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if sum(v.depths) > 36 else []) for n, v in VARIANTS.items()]


def meta_state(name: str, num_classes: int = 7, in_channels: int = 2) -> dict[str, torch.Tensor]:
    shapes = shapes_of(VARIANTS[name], num_classes=num_classes, in_channels=in_channels)
    return {k: torch.empty(s, device="meta") for k, s in shapes.items()}


def same_weights(name: str) -> list[str]:
    """Return the variants with the same tensors: DeepMind's, which timm computes in another way."""
    bare = name.removeprefix("timm_dm_")
    return [n for n in (bare, f"timm_dm_{bare}") if n in VARIANTS]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_is_recognized_and_no_other(name):
    state = meta_state(name)
    assert recognize(state) == same_weights(name)
    if name.startswith("timm_"):
        theirs = timm_from_state_dict(state, attention_at=VARIANTS[name].attention_at)
        assert recognize(theirs) == same_weights(name)


@pytest.mark.parametrize("name", ["nf_resnet_nano", "nf_resnet26", "nf_regnet_b0", "nfnet_f0"])
def test_haiku_trees_are_variants_of_the_reference(name):
    shapes = shapes_of(VARIANTS[name], num_classes=1, in_channels=3)
    state = {k: torch.zeros(s) for k, s in shapes.items()}
    assert recognize(haiku_from_state_dict(state)) == [name]


def test_shapes_are_those_of_the_network():
    net = Net(VARIANTS["timm_test_nfnet"], num_classes=3, in_channels=1)
    assert shapes_of(VARIANTS["timm_test_nfnet"], num_classes=3, in_channels=1) == {
        k: tuple(v.shape) for k, v in net.state_dict().items()
    }


@pytest.mark.parametrize("num_classes", [0, 1, 1000])
def test_any_number_of_classes_and_channels(num_classes):
    assert recognize(meta_state("nf_resnet_nano", num_classes, 5)) == ["nf_resnet_nano"]


def test_the_error_names_the_closest_variant_and_the_differences():
    state = meta_state("nf_resnet_nano")
    state["stranger"] = state.pop("stem.conv0.gain")
    state["head.bias"] = torch.empty(9, device="meta")
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        recognize(state)
    assert str(error.value) == (
        "no variant has these 84 tensors; the closest is nf_resnet_nano, but head.bias has shape (9,), "
        "expected (7,); stem.conv0.gain is missing; stranger is unknown. "
        "Fix: make a changed variant with create_model('nf_resnet_nano', field=value) and load them into it."
    )
    del state["stages.2.1.conv2.bias"], state["stages.2.1.conv2.gain"]
    with pytest.raises(ValueError, match=r"stages.2.1.conv2.bias is missing; .*; and 1 more\. Fix"):
        recognize(state)


@pytest.mark.parametrize(
    "name", ["nfnet_f0", "bn_nfnet_f0", "nf_resnet50", "nf_regnet_b1", "timm_eca_nfnet_l0"]
)
def test_the_closest_variant_is_of_the_same_family(name):
    state = meta_state(name)
    state["head.bias"] = torch.empty(9, device="meta")
    with pytest.raises(
        ValueError, match=rf"closest is {name}, but head.bias has shape \(9,\), expected \(7,\)\. Fix"
    ):
        recognize(state)


@pytest.mark.parametrize("source", [{}, {"a": 3}, {"head.weight": np.zeros(3)}])
def test_other_objects_are_refused(source):
    with pytest.raises(ValueError, match="Allowed: a state dict or a haiku tree with at least one tensor"):
        recognize(source)
    with pytest.raises(ValueError, match="no variant has these 1 tensors; the closest is "):
        recognize({"a": torch.zeros(3)})
