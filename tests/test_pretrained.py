"""Model folders survive saving and loading, timm opens our folders and we open timm's, and downloads are explicit."""

import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_for_hf

from normfree.data.transforms.normalize import normalize
from normfree.deploy.fold import fold
from normfree.files import sha256_of
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, push_to_hub, read_config, save_pretrained
from normfree.weights.hub import fetch, repository_of

CLASSES = ("a", "b", "ç")
PRE = Preprocessing(image_size=40, crop="squash", crop_pct=0.9, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))


def random_network(name: str, **fields: Any) -> Net:
    """Return a network with random changes of all parameters, in evaluation mode."""
    torch.manual_seed(1)
    net = create_model(name, num_classes=3, **fields)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


def random_image(width: int = 90, height: int = 61, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nf_resnet_nano", {}),
        ("nf_resnet_nano", {"widths": (16, 32), "depths": (1, 1), "strides": (1, 2), "in_channels": 4}),
        ("resnet_nano", {}),
        ("timm_test_nfnet", {"drop_rate": 0.1}),
        ("timm_test_nfnet", {"alpha": 0.5}),
    ],
)
def test_saving_and_loading_keeps_everything(tmp_path: Path, name: str, fields: dict) -> None:
    net = random_network(name, **fields)
    mean = (0.5,) * net.in_channels
    model = TrainedModel(net, Preprocessing(image_size=33, crop="crop_resize", mean=mean, std=mean), CLASSES)
    assert save_pretrained(model, tmp_path / "model", card="# hi\n") == tmp_path / "model"
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    }
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()}
    # All files have the same permissions.
    assert len(modes) == 1
    # A run folder contains the model folder `model`.
    again = from_pretrained(tmp_path)
    assert (again.preprocessing, again.classes) == (model.preprocessing, CLASSES)
    assert (again.net.name, again.net.variant, again.net.training) == (name, net.variant, False)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.net.state_dict().items())
    headless = create_model(name, num_classes=0, weights=tmp_path, **fields).eval()
    images = torch.randn(2, net.in_channels, 33, 33)
    assert torch.equal(headless(images), net.forward_head(net.forward_features(images), pre_logits=True))


@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26", "nf_regnet_b0"])
def test_timm_opens_our_folder(tmp_path: Path, name: str) -> None:
    net = random_network(f"timm_{name}")
    save_pretrained(TrainedModel(net, PRE, CLASSES), tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert ((theirs(images) - net(images)).norm() / net(images).norm()).item() < 1e-5
    config = resolve_data_config(model=theirs)
    assert (tuple(config["mean"]), tuple(config["std"])) == (PRE.mean, PRE.std)
    ours = normalize(PRE.transform()(random_image())[None], mean=PRE.mean, std=PRE.std)[0]
    torch.testing.assert_close(create_transform(**config)(random_image()), ours, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == list(CLASSES)


@pytest.mark.parametrize("name", ["test_nfnet", "nf_resnet26", "nf_regnet_b0", "eca_nfnet_l0"])
def test_we_open_timms_folder(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    theirs = timm.create_model(name, num_classes=3).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    labels = {"label_names": list(CLASSES)}
    args = {"drop_path_rate": 0.2}
    save_for_hf(theirs, tmp_path, model_config=labels, model_args=args, safe_serialization=True)
    model = from_pretrained(tmp_path)
    assert (model.net.name, model.classes) == (f"timm_{name}", CLASSES)
    assert model.net.variant.stochdepth_rate == 0.2
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert ((model.net(images) - theirs(images)).norm() / theirs(images).norm()).item() < 1e-5
    config = resolve_data_config(model=theirs, use_test_size=True)
    pre = model.preprocessing
    assert pre.image_size == config["input_size"][-1]
    photo = random_image(500, 371)
    ours = normalize(pre.transform()(photo)[None], mean=pre.mean, std=pre.std)[0]
    torch.testing.assert_close(create_transform(**config)(photo), ours, rtol=0, atol=1e-5)


def test_deepminds_weights_can_be_computed_with_either_numerics(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = timm.create_model("dm_nfnet_f0", num_classes=3).eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith("skipinit_gain"):
            parameter.data.fill_(0.5)
    save_for_hf(theirs, tmp_path, safe_serialization=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted, apart = theirs(images), {}
        for numerics in ("reference", "timm"):
            model = from_pretrained(tmp_path, numerics=numerics)
            apart[numerics] = ((model.net(images) - wanted).norm() / wanted.norm()).item()
    assert (from_pretrained(tmp_path).net.name, model.net.name) == ("nfnet_f0", "timm_dm_nfnet_f0")
    assert apart["timm"] < 1e-5 < 1e-3 < apart["reference"]
    assert (model.preprocessing.crop, model.preprocessing.image_size) == ("squash", 256)
    with pytest.raises(ValueError, match=r"^unknown numerics 'jax'\. Allowed: 'reference', 'timm'\.$"):
        from_pretrained(tmp_path, numerics="jax")


@pytest.mark.parametrize("size", [32, 96, 256, 288, 352, 416, 544, 576])
def test_reference_crops_with_timms_keys_give_the_same_pixels(size: int) -> None:
    exact = Preprocessing(image_size=size)
    through = Preprocessing.from_config(exact.to_config())
    assert torch.equal(through.transform()(random_image(700, 640)), exact.transform()(random_image(700, 640)))


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    """Save a model and change entries of its config.json."""
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (tmp_path / "SHA256SUMS").unlink()  # accepts the edit
    return tmp_path


def test_invalid_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json has 2 class names for 3 outputs\.$"):
        from_pretrained(folder_with(tmp_path, label_names=["a", "b"]))
    with pytest.raises(
        ValueError,
        match=r"timm's architecture 'vgg16' is not supported\..* Allowed: normalizer-free networks of timm: ",
    ):
        from_pretrained(folder_with(tmp_path, normfree=None, architecture="vgg16"))
    foreign = {"normfree": None, "architecture": "nf_resnet50", "model_args": {"act_layer": "silu"}}
    with pytest.raises(ValueError, match=r"model_args act_layer of timm's nf_resnet50 are not supported\.$"):
        from_pretrained(folder_with(tmp_path, **foreign))
    with pytest.raises(ValueError, match=r"config\.json does not describe a network: 'row'\.$"):
        from_pretrained(folder_with(tmp_path, normfree={}))
    with pytest.raises(ValueError, match=r"does not fit nf_resnet_nano with 7 classes: head\.bias has shape"):
        from_pretrained(folder_with(tmp_path, num_classes=7, label_names=list("abcdefg")))
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    with pytest.raises(ValueError, match=r"Allowed: the keys architecture, num_classes, pretrained_cfg\.$"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"cannot be read as a model's config: "):
        from_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"is not a model folder\. Allowed: a folder with config\.json and model\.safetensors",
    ):
        from_pretrained(tmp_path / "nowhere")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    net = random_network("nf_resnet_nano")
    with pytest.raises(
        ValueError, match=r"^there are 2 class names for 3 outputs\. Allowed: one class name per output\.$"
    ):
        save_pretrained(TrainedModel(net, PRE, ("a", "b")), tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"^the network is folded, .* Fix: save the network before `fold`, or"
    ):
        save_pretrained(TrainedModel(fold(net), PRE, CLASSES), tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- a local replacement of the hub ----------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """Replace huggingface_hub by a module that serves files of tmp_path/hub, and return the list of its calls."""
    calls = []

    def hf_hub_download(repository: str, name: str, *, revision: str | None) -> str:
        calls.append((repository, name, revision))
        path = tmp_path / "hub" / repository / name
        if not path.is_file():
            raise FileNotFoundError(f"404 {repository}/{name}\nsecond line")
        return str(path)

    fake = types.ModuleType("huggingface_hub")
    fake.hf_hub_download = hf_hub_download
    fake.create_repo = lambda repository, **k: calls.append((repository, k)) or f"https://hub/{repository}"
    fake.upload_folder = lambda **k: calls.append(k)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return calls


def test_nothing_is_downloaded_unless_requested(hub: list, tmp_path: Path) -> None:
    net = random_network("timm_test_nfnet")
    save_pretrained(TrainedModel(net, PRE, CLASSES), tmp_path / "hub" / repository_of("timm_test_nfnet"))
    for call in (
        lambda: from_pretrained("timm/test_nfnet.r160_in1k"),
        lambda: create_model("timm_test_nfnet", num_classes=3, weights="test_nfnet.r160_in1k"),
    ):
        with pytest.raises(
            ValueError, match=r"test_nfnet\.r160_in1k'? ?(is not a model folder|does not exist)"
        ):
            call()
    assert hub == []
    for source in ("hf-hub:timm/test_nfnet.r160_in1k", "hf-hub:test_nfnet.r160_in1k"):
        assert torch.equal(from_pretrained(source).net.head.weight, net.head.weight)
    again = create_model("timm_test_nfnet", num_classes=3, weights="download")
    assert torch.equal(again.head.weight, net.head.weight)
    again = create_model("timm_test_nfnet", num_classes=3, weights="hf-hub:test_nfnet.r160_in1k@v1")
    files = ("config.json", "model.safetensors", "SHA256SUMS")
    assert hub[-3:] == [("timm/test_nfnet.r160_in1k", name, "v1") for name in files]
    assert len(hub) == 12


def test_failed_downloads_give_a_single_line(hub: list, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^hf-hub:a/b could not be downloaded: 404 a/b/config\.json$"):
        from_pretrained("hf-hub:a/b")
    for source in ("hf-hub:", "hf-hub:a/b/c", "a/b"):
        with pytest.raises(ValueError, match=r"Allowed: hf-hub:OWNER/NAME\. Fix: for example"):
            fetch(source)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'needs huggingface_hub, .* pip install "normfree\[hub\]"\.$'
    ):
        fetch("hf-hub:a/b")


def test_push_to_hub(hub: list, tmp_path: Path) -> None:
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path / "run" / "model")
    assert push_to_hub(tmp_path / "run", "me/x", private=True) == "https://hub/me/x"
    assert hub[0] == ("me/x", {"private": True, "exist_ok": True})
    assert hub[1]["folder_path"] == tmp_path / "run" / "model"
    with pytest.raises(ValueError, match="is not a model folder"):
        push_to_hub(tmp_path, "me/x")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["head.bias"] = state["head.bias"] * float("inf")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"head\.bias has values that are not finite"):
        from_pretrained(tmp_path)


# --- checksums and hostile folders -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_anywhere_in_a_model_folder_is_noticed(tmp_path: Path, name: str) -> None:
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path)
    path = tmp_path / name
    data = path.read_bytes()
    for position in range(0, len(data), len(data) // 40):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            from_pretrained(tmp_path)
    path.write_bytes(data)
    from_pretrained(tmp_path)


def test_an_edited_config_is_accepted_once_its_line_is_deleted(tmp_path: Path) -> None:
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path)
    path, sums = tmp_path / "config.json", tmp_path / "SHA256SUMS"
    path.write_text(path.read_text().replace(CLASSES[2], "z"))
    with pytest.raises(ValueError, match="is not the file that was saved") as error:
        from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{path} is not the file that was saved: its SHA-256 differs from SHA256SUMS. "
        f"Fix: restore it, or, to accept your own edit, delete its line in {sums}."
    )
    lines = sums.read_text().splitlines()
    assert [line[66:] for line in lines] == ["config.json", "model.safetensors"]
    sums.write_text(lines[1] + "\n")
    assert from_pretrained(tmp_path).classes != CLASSES
    sums.write_text("")
    with pytest.raises(ValueError, match="SHA256SUMS is empty"):
        from_pretrained(tmp_path)
    sums.write_text("x" * 64 + "  config.json\n")
    with pytest.raises(ValueError, match="Allowed: a SHA-256 and a file name"):
        from_pretrained(tmp_path)


def test_a_damaged_download_is_noticed_by_the_name_of_its_blob(tmp_path: Path) -> None:
    save_pretrained(TrainedModel(random_network("nf_resnet_nano"), PRE, CLASSES), tmp_path / "snapshots")
    (tmp_path / "snapshots" / "SHA256SUMS").unlink()
    weights = tmp_path / "snapshots" / "model.safetensors"
    blob = tmp_path / "blobs" / sha256_of(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    from_pretrained(tmp_path / "snapshots")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ValueError, match="was damaged after the download"):
        from_pretrained(tmp_path / "snapshots")


@pytest.mark.parametrize("argument", ["weights", "features_only", "wdths"])
def test_a_config_reaches_no_argument_that_is_no_field_of_a_variant(
    tmp_path: Path, argument: str, hub: list
) -> None:
    folder = folder_with(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["normfree"]["model_args"] = {argument: "hf-hub:x/y"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'{argument}' in 'model_args' is no field of a variant"):
        from_pretrained(folder)
    assert hub == []


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", "\udcff", "\u202egpj", ""])
def test_class_names_that_cannot_be_printed_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"has a class named .* Allowed: printable text") as error:
        from_pretrained(folder_with(tmp_path, label_names=[name, "b", "c"]))
    assert str(error.value).isprintable()


def test_a_pipe_instead_of_the_config_is_not_waited_for(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match="is not a"):
        from_pretrained(folder)
    with pytest.raises(ValueError, match="is not a regular file"):
        read_config(folder)
