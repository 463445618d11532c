"""`normfree convert` from each format to a model folder or an .npz file, which appear complete or not at all."""

import hashlib
import os
import pickle

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file

from normfree import pretrained
from normfree.cli import main
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained
from normfree.weights import hub
from normfree.weights.haiku import read_haiku, write_haiku
from normfree.weights.names import haiku_from_state_dict, timm_from_state_dict


def shaken(name, **kwargs):
    net = create_model(name, **{"num_classes": 3, **kwargs}).eval()
    net.load_state_dict({k: v + 0.01 * torch.randn_like(v) for k, v in net.state_dict().items()})
    return net


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def failing(args, capsys) -> str:
    """Run a command that exits with 2; return the one line that it prints."""
    assert main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("normfree: ")


def test_a_released_file_to_a_folder_and_back(tmp_path, capsys):
    net = shaken("nf_resnet_nano")
    source, folder, back = (str(tmp_path / n) for n in ("a.npz", "folder", "back.npz"))
    (tmp_path / "a.npz").write_bytes(
        pickle.dumps(haiku_from_state_dict(net.state_dict()))
    )  # the released container
    assert main(["convert", source, folder]) == 0
    sha = hashlib.sha256((tmp_path / "folder" / "model.safetensors").read_bytes()).hexdigest()
    assert capsys.readouterr().out == (
        f"model          nf_resnet_nano, 384,968 parameters, 3 classes\n"
        f"names          DeepMind's (released layout)\n"
        f"preprocessing  32 px, crop_resize, bicubic without antialiasing, mean 0.485 0.456 0.406, "
        f"std 0.229 0.224 0.225 (assumed from the variant)\n"
        f"weights        {folder}/model.safetensors, sha256 {sha}\n"
    )
    model = from_pretrained(folder)
    assert same(model.net, net)
    assert model.classes == ("0", "1", "2")
    assert main(["convert", folder, back]) == 0
    assert (
        f"{back}, sha256 {hashlib.sha256((tmp_path / 'back.npz').read_bytes()).hexdigest()}"
        in capsys.readouterr().out
    )
    first, second = read_haiku(source), read_haiku(back)
    assert first.keys() == second.keys()
    assert all(np.array_equal(a, second[m][n]) for m, arrays in first.items() for n, a in arrays.items())
    assert {p.name for p in tmp_path.iterdir()} == {"a.npz", "folder", "back.npz"}


def test_timm_weights_compute_what_timm_computes(tmp_path, capsys):
    """A file of timm is recognized by its names, and timm opens the folder that is written."""
    theirs = timm.create_model("test_nfnet", num_classes=3).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    args = [
        "convert",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "out"),
        "--classes",
        str(tmp_path / "names.txt"),
    ]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "model          timm_test_nfnet, 190,659 parameters, 3 classes\nnames          timm's\n" in out
    assert (
        "160 px, center, bicubic, mean 0.500 0.500 0.500, std 0.500 0.500 0.500 (assumed from the variant)"
        in out
    )
    ours, images = from_pretrained(tmp_path / "out"), torch.randn(2, 3, 64, 64)
    assert ours.classes == ("ant", "bee", "cat")
    with torch.no_grad():
        expected = theirs(images)
        assert torch.linalg.norm(ours.net(images) - expected) / torch.linalg.norm(expected) < 1e-5
        opened = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(opened(images), expected)


def test_a_torch_file_and_its_key(tmp_path, capsys):
    net, average = shaken("nf_resnet_nano"), shaken("nf_resnet_nano")
    both = {
        "state_dict": net.state_dict(),
        "state_dict_ema": {f"module.{k}": v for k, v in average.state_dict().items()},
    }
    torch.save(both, tmp_path / "a.pth")
    args = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "out")]
    assert failing(args, capsys) == (
        f"{tmp_path}/a.pth: it has several state dicts: state_dict, state_dict_ema. Fix: choose one, for example "
        "--key state_dict_ema."
    )
    assert not (tmp_path / "out").exists()
    assert main([*args, "--key", "state_dict_ema"]) == 0
    assert same(from_pretrained(tmp_path / "out").net, average)


def test_deepminds_weights_compute_in_two_ways(tmp_path, monkeypatch, capsys):
    """The variants differ. A narrow network stands in for F0, to save time."""
    from normfree.models import variants

    narrow = {"widths": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "group_width": 8}
    for name in ("nfnet_f0", "timm_dm_nfnet_f0"):
        monkeypatch.setitem(variants.VARIANTS, name, variants.VARIANTS[name].with_overrides(narrow))
    net = shaken("nfnet_f0")
    write_haiku(tmp_path / "a.npz", haiku_from_state_dict(net.state_dict()))
    save_file(timm_from_state_dict(net.state_dict()), tmp_path / "a.safetensors")
    for source in ("a.npz", "a.safetensors"):
        for numerics, name in (("reference", "nfnet_f0"), ("timm", "timm_dm_nfnet_f0")):
            out = tmp_path / f"{source}-{numerics}"
            assert main(["convert", str(tmp_path / source), str(out), "--numerics", numerics]) == 0
            assert capsys.readouterr().out.startswith(f"model          {name}, ")
            model = from_pretrained(out)
            assert model.net.name == name
            assert same(model.net, net)
            assert model.preprocessing == Preprocessing(256, antialias=source != "a.npz")
    assert main(["convert", str(tmp_path / "a.npz-timm"), str(tmp_path / "back.npz")]) == 0
    assert (tmp_path / "back.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()


def test_a_folder_keeps_its_classes_and_preprocessing(tmp_path, monkeypatch, capsys):
    pre = Preprocessing(
        48, crop="center", crop_pct=0.75, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(1, 1, 1)
    )
    model = TrainedModel(shaken("nf_resnet_nano", depths=(1, 1, 1)), pre, ("a", "b", "ç"))
    save_pretrained(model, tmp_path / "one")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or tmp_path / "one")
    for i, source in enumerate((str(tmp_path / "one"), "hf-hub:someone/one")):
        assert main(["convert", source, str(tmp_path / f"out{i}")]) == 0
        text = capsys.readouterr().out
        assert "names          normfree's\n" in text
        assert (
            "48 px, center, bilinear, mean 0.100 0.200 0.300, std 1.000 1.000 1.000 (from the folder)" in text
        )
        again = from_pretrained(tmp_path / f"out{i}")
        assert (again.classes, again.preprocessing) == (model.classes, pre)
        assert same(again.net, model.net)
    assert asked == ["hf-hub:someone/one"]


def test_model_names_the_variant(tmp_path, capsys):
    save_file(shaken("nf_resnet_nano").state_dict(), tmp_path / "a.safetensors")
    args = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out")]
    assert failing([*args, "--model", "nf_resnet_micro"], capsys).startswith(
        f"{tmp_path}/a.safetensors does not fit nf_resnet_micro with 3 classes: head.weight has shape (3, 256), "
    )
    assert failing([*args, "--model", "nano"], capsys).startswith("unknown model 'nano'.")
    assert not (tmp_path / "out").exists()
    assert main([*args, "--model", "nf_resnet_nano"]) == 0


def test_invalid_arguments(tmp_path, capsys):
    net = shaken("nf_resnet_nano")
    source, out = tmp_path / "a.safetensors", tmp_path / "out"
    save_file(net.state_dict(), source)
    save_pretrained(TrainedModel(net, Preprocessing(32), ("a", "b", "c")), tmp_path / "folder")
    save_pretrained(
        TrainedModel(shaken("timm_test_nfnet"), Preprocessing(32), ("a", "b", "c")), tmp_path / "timm"
    )
    (tmp_path / "two.txt").write_text("a\n\n")
    (tmp_path / "file").touch()
    cases = {
        f"{source} {out} --key ema": f"--key ema is given for {source}. Allowed: files written by torch.save (.pth, "
                                     ".pt, .bin, .ckpt, .pkl, .tar). Fix: leave --key out.",
        f"{source} {out} --numerics timm": f"{source}: --numerics is timm. Allowed: reference, except for DeepMind's "
                                           "NFNets, F0 to F6. Fix: leave --numerics out.",
        f"{source} {out} --classes {tmp_path}/two.txt": f"--classes {tmp_path}/two.txt has 2 lines, 1 of them empty. "
                                                        "Allowed: 3 lines with one class name each.",
        f"{tmp_path}/folder {out} --model x": "--model x is given for a folder, whose config.json names the network. "
                                              "Fix: leave --model out.",
        f"{source} {tmp_path}/folder": f"{tmp_path}/folder already exists. Allowed: a new or an empty folder. Fix: "
                                       "choose another name, or remove it first.",
        f"{source} {tmp_path}/file": f"{tmp_path}/file already exists. Allowed: a new or an empty folder. Fix: choose "
                                     "another name, or remove it first.",
        f"{tmp_path}/timm {tmp_path}/b.npz": "timm_test_nfnet computes as timm does, which DeepMind's file format "
                                             "cannot express. Fix: convert it to a folder.",
        f"{tmp_path}/file {out}": f"{tmp_path}/file is of an unknown kind. Allowed: .safetensors, .npz or a model "
                                  "folder.",
        f"{tmp_path}/nothing.npz {out}": f"'{tmp_path}/nothing.npz' does not exist. Fix: give a file or folder of "
                                         "weights.",
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for args, message in cases.items():
        assert failing(["convert", *args.split()], capsys).endswith(message), args
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "b.npz").touch()
    assert failing(["convert", str(source), str(tmp_path / "b.npz")], capsys) == (
        f"{tmp_path}/b.npz already exists. Allowed: a new file. Fix: choose another name, or remove it first."
    )


def test_a_failed_convert_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    save_file(shaken("nf_resnet_nano").state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def full(model, folder, **kwargs):
        save_pretrained(model, folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, "save_pretrained", full)
    assert "No space left on device" in failing(
        ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "out")], capsys
    )
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    monkeypatch.setattr(np, "savez", lambda file, **arrays: file.write(b"half"))
    assert "No space left on device" in failing(
        ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.npz")], capsys
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_the_target_folder_may_be_nested_or_empty(tmp_path, capsys):
    net = shaken("nf_resnet_nano")
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "empty").mkdir()
    for target in ("empty", "new/folder"):
        assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / target)]) == 0
        assert sorted(p.name for p in (tmp_path / target).iterdir()) == [
            "SHA256SUMS",
            "config.json",
            "model.safetensors",
        ]
        assert torch.equal(load_file(tmp_path / target / "model.safetensors")["head.bias"], net.head.bias)
    assert capsys.readouterr().err == ""
