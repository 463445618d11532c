"""Name maps are bijections; a model folder comes back as it was, or not at all."""

import json

import numpy as np
import pytest
import torch

from normfree.models.weights import (
    haiku_from_state_dict,
    load_state_dict_,
    read_model_config,
    save_model_folder,
    state_dict_from_haiku,
)
from normfree.models.zoo import create_model, list_models, variant_of

# modules and tensors of the released trees, from the reference code
RELEASED = {
    "nfnet_f0": (94, 233), "nfnet_f1": (178, 437), "nfnet_f2": (262, 641), "nfnet_f3": (346, 845),
    "nfnet_f4": (430, 1049), "nfnet_f5": (514, 1253), "nfnet_f6": (598, 1457), "nfnet_f7": (682, 1661),
    "nf_resnet50": (70, 177), "nf_regnet_b0": (103, 244),
}  # fmt: skip
HAIKU_ROWS = [n for n in list_models("nf*") if not n.startswith("nf_resnet_")]


def narrow(name):
    """The row's depths at a small width, so that the deepest takes little memory."""
    stages = len(variant_of(name).widths)
    return create_model(name, num_classes=3, widths=(16,) * (stages - 1) + (32,), group_width=4)


def shaken(net):
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("name", HAIKU_ROWS)
def test_round_trip_through_the_released_naming_is_exact(name):
    state = shaken(narrow(name)).state_dict()
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
    net = shaken(create_model("nf_regnet_b0", num_classes=3))
    tree = haiku_from_state_dict(net.state_dict())
    conv = net.stages[2][1].conv1.weight.detach().numpy()
    assert np.array_equal(tree["NF_RegNet/~/nf_block_5/~/conv1"]["w"], conv.transpose(2, 3, 1, 0))
    assert np.array_equal(tree["NF_RegNet/~/linear"]["w"], net.head.weight.detach().numpy().T)
    assert tree["NF_RegNet/~/nf_block"]["skip_gain"].shape == ()


def test_names_that_are_not_released_ones_are_listed():
    tree = haiku_from_state_dict(create_model("nf_resnet26", num_classes=3).state_dict())
    tree["NF_ResNet/~/mystery"] = {"w": np.zeros(3, np.float32)}
    tree["NF_ResNet/~/linear"]["extra"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"2 names in the haiku tree are not of the released NF_ResNet: "
                                         r"NF_ResNet/~/linear:extra, NF_ResNet/~/mystery:w"):  # fmt: skip
        state_dict_from_haiku(tree)
    with pytest.raises(ValueError, match=r"haiku tree with modules of \['VGG'\]: expected one of NFNet"):
        state_dict_from_haiku({"VGG/~/conv": {}})
    with pytest.raises(
        ValueError, match=r"names have no counterpart in the released NF_ResNet: stages.0.0.norm0"
    ):
        haiku_from_state_dict(create_model("resnet26", num_classes=3).state_dict())


def test_model_folder_round_trip(tmp_path):
    fields = {"widths": (16, 32), "depths": (1, 1), "strides": (1, 2)}
    net = shaken(create_model("nf_resnet_nano", num_classes=3, **fields)).eval()
    save_model_folder(
        tmp_path / "model", net, classes=("a", "b", "ç"), preprocessing={"mean": [0.5]}, card="# hi\n"
    )
    config = read_model_config(tmp_path)  # a run folder: finds model/ inside
    assert config["label_names"] == ["a", "b", "ç"]
    assert config["pretrained_cfg"]["mean"] == [0.5]
    args = config["model_args"]
    again = create_model(
        config["architecture"], num_classes=config["num_classes"], weights=tmp_path, **args
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), net(x))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    headless = create_model("nf_resnet_nano", num_classes=0, weights=tmp_path, **fields).eval()
    assert torch.equal(headless(x), net.forward_head(net.forward_features(x), pre_logits=True))


def test_weights_that_do_not_fit_are_refused_whole():
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


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ValueError, match=r"is no model folder: it needs config.json and model.safetensors"):
        create_model("nf_resnet_nano", weights=tmp_path)
    net = create_model("nf_resnet_nano", num_classes=3)
    save_model_folder(tmp_path, net)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        create_model("nf_resnet_nano", num_classes=3, weights=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x"}))
    with pytest.raises(ValueError, match="expected the keys architecture, model_args, num_classes"):
        read_model_config(tmp_path)
