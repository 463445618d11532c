"""`create_model`: timm's names of arguments, tags, and weights for other numbers of channels and classes."""

import logging
from pathlib import Path

import pytest
import timm
import torch
from timm.models import adapt_input_conv

from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained
from normfree.weights import hub
from normfree.weights.load import adapt_input_channels, load_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder of nf_resnet_nano with three classes."""
    torch.manual_seed(1)
    net = create_model("nf_resnet_nano", num_classes=3)
    return save_pretrained(
        TrainedModel(net, Preprocessing(image_size=32), ("a", "b", "c")), tmp_path / "model"
    )


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Downloads return `folder`; the list has their addresses."""
    addresses: list[str] = []
    monkeypatch.setattr(hub, "fetch", lambda address: addresses.append(address) or folder)
    return addresses


def test_timms_arguments_give_the_same_network() -> None:
    torch.manual_seed(0)
    ours = create_model("nf_resnet_nano", num_classes=0, in_channels=2, stochdepth_rate=0.2, drop_rate=0.1)
    torch.manual_seed(0)
    theirs = create_model(
        "nf_resnet_nano", num_classes=0, in_chans=2, drop_path_rate=0.2, drop_rate=0.1, global_pool="avg",
        pretrained=False,
    )  # fmt: skip
    assert theirs.variant == ours.variant
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in theirs.state_dict().items())
    # timm passes None for what is not given
    plain = create_model("nf_resnet_nano", in_chans=None, drop_path_rate=None, pretrained=None)
    assert (plain.in_channels, plain.variant.stochdepth_rate) == (3, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_chans": 1, "in_channels": 3},
            "both 'in_channels' and 'in_chans' are given. Allowed: one of them. Fix: drop 'in_chans', which is timm's "
            "name of the other.",
        ),
        (
            {"drop_path_rate": 0.1, "stochdepth_rate": 0.1},
            "both 'stochdepth_rate' and 'drop_path_rate' are given. Allowed: one of them. Fix: drop 'drop_path_rate', "
            "which is timm's name of the other.",
        ),
        (
            {"pretrained": True, "weights": "m"},
            "both 'weights' and 'pretrained' are given. Allowed: one of them. Fix: drop 'pretrained', which is timm's "
            "name of the other.",
        ),
        ({"drop_path": 0.1}, "unknown model field 'drop_path'. Fix: use 'stochdepth_rate'."),
        ({"act_layer": "silu"}, "unknown model field 'act_layer'. Fix: use 'activation'."),
    ],
)  # fmt: skip
def test_conflicts_and_other_names_are_refused_with_the_right_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        create_model("nf_resnet_nano", **arguments)
    assert str(error.value) == message


def test_tags_choose_published_weights(downloads: list[str]) -> None:
    create_model("timm_eca_nfnet_l0.ra2_in1k", widths=(32, 32, 32, 32), depths=(1, 1, 1, 1), group_width=8)
    assert downloads == []  # as in timm, a tag alone downloads nothing
    with pytest.raises(ValueError, match="does not fit timm_test_nfnet"):
        create_model("timm_test_nfnet.r160_in1k", pretrained=True)
    with pytest.raises(ValueError, match="does not fit nfnet_f0"):
        create_model("nfnet_f0.dm_in1k", weights="download", widths=(32, 32, 32, 32), group_width=8)
    assert downloads == ["hf-hub:timm/test_nfnet.r160_in1k", "hf-hub:timm/dm_nfnet_f0.dm_in1k"]
    with pytest.raises(
        ValueError, match=r"^unknown tag of timm_test_nfnet 'r160'\. Did you mean 'r160_in1k'\?"
    ):
        create_model("timm_test_nfnet.r160")
    with pytest.raises(
        ValueError, match=r"^unknown model 'dm_nfnet_f0'\. timm's .* is 'timm_dm_nfnet_f0'; 'nfnet_f0' "
    ):
        create_model("dm_nfnet_f0.dm_in1k")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [1, 2, 3, 5])
@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 6, 7])
def test_channels_are_adapted_as_in_timm(dtype: torch.dtype, given: int, wanted: int) -> None:
    weight = torch.randn(4, given, 3, 3).to(dtype)
    before = weight.clone()
    ours = adapt_input_channels(weight, wanted)
    assert torch.equal(ours, adapt_input_conv(wanted, weight, base_chans=given))
    assert ours.dtype == dtype
    assert torch.equal(weight, before)


@pytest.mark.parametrize("channels", [1, 4])
def test_weights_for_rgb_load_into_other_channels(folder: Path, channels: int, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="normfree"):
        net = create_model("nf_resnet_nano", num_classes=3, in_channels=channels, weights=folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: adapted from 3 to {channels} image channels"
    ]
    whole = from_pretrained(folder).net.state_dict()
    first = whole.pop("stem.conv0.weight")
    assert torch.equal(net.stem.conv0.weight, adapt_input_conv(channels, first))
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in whole.items())


@pytest.mark.parametrize("channels", [1, 4])
def test_timm_loads_the_same_weights_into_other_channels(channels: int, tmp_path: Path) -> None:
    net = create_model("timm_test_nfnet", num_classes=3)
    folder = save_pretrained(TrainedModel(net, Preprocessing(image_size=32), ("a", "b", "c")), tmp_path)
    theirs = timm.create_model(
        f"local-dir:{folder}", pretrained=True, in_chans=channels, num_classes=3
    ).eval()
    ours = create_model("timm_test_nfnet", num_classes=3, in_chans=channels, weights=folder).eval()
    images = torch.randn(2, channels, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)


def test_a_classifier_for_other_classes_is_new_and_one_line_reports_it(folder: Path, caplog) -> None:
    whole = from_pretrained(folder).net
    torch.manual_seed(0)
    own = create_model("nf_resnet_nano", num_classes=7).head
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=7, weights=folder)
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder} has 3 classes, so the classifier for 7 classes is new"
    ]
    assert torch.equal(net.head.weight, own.weight)
    assert torch.equal(net.stem.conv0.weight, whole.stem.conv0.weight)
    caplog.clear()
    same = create_model("nf_resnet_nano", num_classes=3, weights=folder)
    headless = create_model("nf_resnet_nano", num_classes=0, weights=folder)
    other = create_model("nf_resnet_nano", num_classes=3, weights=folder, head=False)
    assert caplog.records == []
    assert torch.equal(same.head.weight, whole.head.weight)
    assert headless.num_classes == 0
    assert not torch.equal(other.head.weight, whole.head.weight)


def test_a_body_without_classifier_can_be_started_from(caplog) -> None:
    body, net = create_model("nf_resnet_nano", num_classes=0), create_model("nf_resnet_nano", num_classes=2)
    load_weights(net, body.state_dict(), adapt=True)
    assert torch.equal(net.stem.conv0.weight, body.stem.conv0.weight)
    assert [r.getMessage() for r in caplog.records] == [
        "the state dict has no classifier, so the classifier for 2 classes is new"
    ]


def test_without_adapting_other_shapes_are_refused(folder: Path) -> None:
    for net in (
        create_model("nf_resnet_nano", num_classes=7),
        create_model("nf_resnet_nano", num_classes=3, in_channels=1),
    ):
        with pytest.raises(ValueError, match="does not fit nf_resnet_nano"):
            load_weights(net, folder)
    with pytest.raises(ValueError, match="does not fit nf_resnet_micro with 7 classes"):
        create_model("nf_resnet_micro", num_classes=7, weights=folder)
