"""Tests of loading weights: all of them or none, from any kind of source."""

import pytest
import torch
from safetensors.torch import save_file

from normfree.models.zoo import create_model
from normfree.weights.load import load_state_dict_, load_weights, read_weights
from normfree.weights.names import haiku_from_state_dict, timm_from_state_dict


def test_weights_that_do_not_fit_change_nothing():
    net = create_model("nf_resnet_nano", num_classes=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["head.bias"] = torch.zeros(4)
    state["stranger"] = state.pop("stem.conv0.gain")
    state["stem.conv0.bias"] = state["stem.conv0.bias"] * float("nan")
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        load_state_dict_(net, state, source="x.safetensors")
    assert str(error.value) == (
        "x.safetensors does not fit nf_resnet_nano with 3 classes: head.bias has shape (4,), expected (3,); "
        "stem.conv0.bias has values that are not finite; stem.conv0.gain is missing; stranger is unknown."
    )
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_every_source_and_naming_loads_the_same_weights(tmp_path):
    torch.manual_seed(0)
    net = create_model("nfnet_f0", widths=(32, 32, 32, 32), group_width=8, depths=(1, 1, 1, 1), num_classes=3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    state = net.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ours.safetensors")
    theirs = timm_from_state_dict(state)
    save_file({k: v.contiguous() for k, v in theirs.items()}, tmp_path / "timm.safetensors")
    sources = (
        state,
        theirs,
        haiku_from_state_dict(state),
        tmp_path / "ours.safetensors",
        str(tmp_path / "timm.safetensors"),
    )
    for source in sources:
        other = create_model(
            "nfnet_f0", widths=(32, 32, 32, 32), group_width=8, depths=(1, 1, 1, 1), num_classes=3
        )
        load_weights(other, source)
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_sources_that_cannot_be_read(tmp_path):
    net = create_model("nf_resnet_nano", num_classes=3)
    with pytest.raises(
        ValueError, match=r"no\.safetensors' does not exist\. Fix: give a file or folder of weights\."
    ):
        load_weights(net, tmp_path / "no.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"bad\.safetensors is not a readable safetensors file: "):
        load_weights(net, tmp_path / "bad.safetensors")
    with pytest.raises(
        ValueError,
        match=r"is not a model folder\. Allowed: a folder with config\.json and model\.safetensors",
    ):
        read_weights(tmp_path)


def test_any_module_with_the_names_is_filled():
    """`load_weights` needs names and shapes only, not a class of this package."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    load_weights(net, {"0.weight": torch.ones(3, 2), "0.bias": torch.zeros(3), "head.bias": torch.zeros(7)})
    assert net[0].weight.sum() == 6
    with pytest.raises(ValueError, match=r"^the state dict does not fit Sequential: 0\.bias is missing\.$"):
        load_weights(net, {"0.weight": torch.ones(3, 2)})
