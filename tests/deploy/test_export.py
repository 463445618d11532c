"""An exported file computes the logits of the network, has a plain graph, and contains preprocessing and classes."""

import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL.Image import Image
from torch import nn

import normfree
from normfree.cli import main
from normfree.data.sources.emoji import open_emoji
from normfree.data.transforms.normalize import normalize
from normfree.deploy import fold as folding
from normfree.deploy.comparison import compare
from normfree.deploy.export import export
from normfree.deploy.graph_writers import graph_facts
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.onnx_net import open_onnx
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained

NAMES = ("one", "two", "three", "four", "five", "six", "snö")
SMALL = {"widths": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "group_width": 8}
# variant, overrides, image size. Size 33 gives asymmetric SAME padding at every stride.
CASES = {
    "nano": ("nf_resnet_nano", {"depths": (1, 1, 1)}, 32),
    "nano-bn": ("resnet_nano", {"depths": (1, 1, 1)}, 32),
    "nfnet": ("nfnet_f0", SMALL, 33),
    "regnet": ("nf_regnet_b0", {"widths": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}, 33),
    "eca": ("timm_eca_nfnet_l0", SMALL, 33),
    "max-pool": ("nf_resnet50", {"widths": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}, 47),
}


def network(kind: str) -> TrainedModel:
    """Return a model with open branches and random batch norm statistics."""
    variant, overrides, size = CASES[kind]
    torch.manual_seed(0)
    net = create_model(variant, num_classes=len(NAMES), **overrides).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("skip_gain"):
                parameter.fill_(0.7)
        net.head.weight.normal_(std=0.1)
    return TrainedModel(net, Preprocessing(image_size=size, crop="squash", std=(0.2, 0.21, 0.22)), NAMES)


@pytest.fixture(scope="module")
def emoji() -> list[Image]:
    source = open_emoji().val
    return [source.image(i) for i in range(0, 320, 5)]


def prepared(model: TrainedModel, images: list[Image]) -> torch.Tensor:
    pre = model.preprocessing
    return normalize(torch.stack([pre.transform()(image) for image in images]), mean=pre.mean, std=pre.std)


def reopened(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return open_onnx(path)[0] if path.suffix == ".onnx" else torch.export.load(path).module()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


# --- the file is the network -------------------------------------------------------------------------

QUICK = [("nano", "onnx"), ("nano-bn", "pt2"), ("nfnet", "onnx"), ("eca", "onnx"), ("max-pool", "pt2")]
QUICK += [("nfnet", "pt2")]
LONG = [(k, f) for k in CASES for f in ("onnx", "pt2") if (k, f) not in QUICK]


@pytest.mark.parametrize(
    ("kind", "format"), [*QUICK, *(pytest.param(*p, marks=pytest.mark.slow) for p in LONG)]
)
def test_the_file_computes_the_logits_of_the_network(
    kind: str, format: Literal["onnx", "pt2"], emoji: list[Image], tmp_path: Path
) -> None:
    model = network(kind)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    images = prepared(model, emoji)
    report = export(model, tmp_path / f"model.{format}", format=format, images=images)
    assert report.errors.keys() == {1, 2, 5, 64}
    assert max(report.errors.values()) <= 1e-5
    assert (report.top1_agreement, report.images, report.noise) == (100, 64, False)
    assert report.bytes == report.path.stat().st_size
    run = reopened(report.path)
    # `export` itself does not compare batches of 3.
    for batch in (1, 2, 3, 5, 64):
        with torch.no_grad():
            ours, theirs = run(images[-batch:]), model.net(images[-batch:])
        assert ours.shape == (batch, 7)
        assert relative(ours, theirs) < 1e-5
        assert ours.argmax(1).tolist() == theirs.argmax(1).tolist()
    assert report.batch_norms == report.weight_arithmetic == 0
    assert not [kind for kind in report.census if "norm" in kind.lower() or "std" in kind.lower()]
    # The only means are one in the head and one in each gate.
    gates = sum(
        hasattr(m, "fc0") or type(m).__name__ == "EfficientChannelAttention" for m in model.net.modules()
    )
    assert report.census["ReduceMean"] + report.census["aten.mean.dim"] == gates + 1
    assert [p.name for p in tmp_path.iterdir()] == [f"model.{format}"]
    for name, value in model.net.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["nano", "nfnet"])
def test_all_weights_are_stored_in_the_file_once(kind: str, tmp_path: Path) -> None:
    model = network(kind)
    report = export(model, tmp_path / "model.onnx")
    graph = onnx.load_model(report.path).graph
    stored = {t.name: tuple(t.dims) for t in graph.initializer}
    weighted = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    modules = [m for m in model.net.modules() if hasattr(m, "weight") and m.weight.dim() in (2, 4)]
    assert [n.input[1] in stored for n in weighted] == [True] * len(modules)
    assert sorted(stored[n.input[1]] for n in weighted) == sorted(tuple(m.weight.shape) for m in modules)
    assert report.census == Counter(n.op_type for n in graph.node)
    size = sum(4 * m.weight.numel() for m in modules)
    assert size < report.bytes < 1.2 * size


@pytest.mark.slow
def test_unfolded_files_compute_the_same_with_more_nodes(emoji: list[Image], tmp_path: Path) -> None:
    model = network("nano")
    images = prepared(model, emoji)
    whole = export(model, tmp_path / "whole.onnx", folded=False, images=images)
    plain = export(model, tmp_path / "plain.onnx", images=images)
    assert max(whole.errors.values()) <= 1e-5
    assert sum(plain.census.values()) < sum(whole.census.values())
    # So the check of folded files can fail.
    assert whole.weight_arithmetic > 0
    assert (open_onnx(whole.path)[1]["folded"], open_onnx(plain.path)[1]["folded"]) == (False, True)
    twin = export(network("nano-bn"), tmp_path / "twin.pt2", format="pt2", folded=False)
    assert twin.batch_norms == sum(isinstance(m, nn.BatchNorm2d) for m in network("nano-bn").net.modules())


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 21, 23, 25])
def test_other_opsets(opset: int, emoji: list[Image], tmp_path: Path) -> None:
    # GELU is a single node since opset 20.
    model = network("nfnet")
    report = export(model, tmp_path / "model.onnx", images=prepared(model, emoji), opset=opset)
    assert onnx.load_model(report.path).opset_import[0].version == report.opset == opset
    assert open_onnx(report.path)[1]["opset"] == opset


def test_the_file_contains_preprocessing_and_class_names(tmp_path: Path) -> None:
    model = network("nano")
    report = export(model, tmp_path / "new" / "model.onnx")
    assert report.noise
    again = from_pretrained(report.path)
    assert again.preprocessing == model.preprocessing
    assert again.classes == NAMES
    assert again.net.name == "nf_resnet_nano"
    proto = onnx.load_model(report.path)
    assert [p.key for p in proto.metadata_props] == ["normfree"]
    metadata = json.loads(proto.metadata_props[0].value)
    assert (metadata["version"], metadata["opset"], metadata["folded"]) == (normfree.__version__, 20, True)
    assert [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
            for v in (*proto.graph.input, *proto.graph.output)] == [
        ("images", ["batch", 3, 32, 32]), ("logits", ["batch", 7])]  # fmt: skip
    program = export(model, tmp_path / "model.pt2", format="pt2")
    extra = {"normfree.json": ""}
    torch.export.load(program.path, extra_files=extra)
    assert json.loads(extra["normfree.json"]) == metadata | {"opset": None}


def test_the_file_contains_no_paths_of_this_machine(tmp_path: Path) -> None:
    where = str(Path(normfree.__file__).parent).encode()
    file = export(network("nano"), tmp_path / "model.onnx").path.read_bytes()
    assert where not in file
    assert b'File "' not in file
    with zipfile.ZipFile(export(network("nano"), tmp_path / "model.pt2", format="pt2").path) as archive:
        for name in archive.namelist():
            assert where not in archive.read(name), name
            assert str(tmp_path).encode() not in archive.read(name), name


# --- files that must not be kept ---------------------------------------------------------------------------


def test_compare_follows_its_definition() -> None:
    base = torch.eye(4) + 0.1
    images = torch.randn(10, 4, 1, 1).abs()

    def net(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ base

    errors, same = compare(lambda x: net(x) * (1 + 3e-4), net, images)
    assert errors == pytest.approx(dict.fromkeys((1, 2, 5, 64), 3e-4), rel=1e-3)
    assert same == 100
    errors, same = compare(lambda x: net(x).flip(1), net, images)
    top = net(images).argmax(1)
    agree = (net(images).flip(1).argmax(1) == top).float()
    expected = sum(float(agree[torch.arange(b) % 10].sum()) for b in (1, 2, 5, 64)) / 72
    assert same == pytest.approx(100 * expected)
    assert same < 100
    # The logits of an untrained classifier are all 0.
    zero, same = compare(lambda x: 0 * net(x), lambda x: 0 * net(x), images)
    assert (set(zero.values()), same) == ({0.0}, 100)
    broken, _ = compare(lambda x: net(x) + 1, lambda x: 0 * net(x), images)
    assert set(broken.values()) == {float("inf")}
    tied = torch.ones(4, 4)
    _, same = compare(
        lambda x: x.flatten(1) @ tied + 1e-7 * torch.arange(4), lambda x: x.flatten(1) @ tied, images
    )
    assert same == 100


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("fault", ["wrong", "nan"])
def test_a_file_that_differs_is_not_kept(
    format: Literal["onnx", "pt2"], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = folding.fold

    def off(net: Net) -> Net:
        copy = real(net)
        copy.head.weight.data.mul_(1 + 1e-4 if fault == "wrong" else float("nan"))
        return copy

    monkeypatch.setattr(folding, "fold", off)
    path = tmp_path / f"model.{format}"
    path.write_bytes(b"the one before")
    value = "1.0e-04" if fault == "wrong" else "nan"
    with pytest.raises(
        ValueError, match=f"was not kept: its logits differ from those of the network by {value} at batch 1, "
    ):
        export(network("nano"), path, format=format)
    assert path.read_bytes() == b"the one before"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("kind", "format", "what"), [("nano", "onnx", "Conv with a computed weight"),
                         ("nano-bn", "pt2", "aten.batch_norm"), ("nano", "pt2", "aten.rsqrt")])  # fmt: skip
def test_a_graph_that_is_not_folded_is_not_kept(
    kind: str, format: Literal["onnx", "pt2"], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "fold", lambda net: net)
    with pytest.raises(
        ValueError,
        match=f"was not kept: the folded graph still contains .*{what}.* Fix: export it with folded=False",
    ):
        export(network(kind), tmp_path / f"model.{format}", format=format)
    assert list(tmp_path.iterdir()) == []


def test_graph_facts_of_a_handmade_graph() -> None:
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Mul", ["w", "w"], ["w2"]),
        helper.make_node("Gemm", ["images", "w2"], ["a"]),
        helper.make_node("Constant", [], ["c"], value_float=1.0),
        helper.make_node("Gemm", ["a", "w"], ["b"]),
        helper.make_node("Add", ["b", "c"], ["logits"]),
    ]
    shape = (TensorProto.FLOAT, [None, 3])
    graph = helper.make_graph(nodes, "g", [value("images", *shape)], [value("logits", *shape)],
                              [numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")])  # fmt: skip
    census, idle, computed = graph_facts(helper.make_model(graph))
    assert census == {"Mul": 1, "Gemm": 2, "Constant": 1, "Add": 1}
    assert (idle, computed) == (["Mul"], ["Gemm with a computed weight"])


# --- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("model.onnx", {"format": "onx"}, "unknown format 'onx'. Did you mean 'onnx'? Allowed: 'onnx', 'pt2'"),
        ("model.xml", {}, "with format='onnx'. Allowed: names that end in .onnx. Fix: use '"),
        ("model.pt", {"format": "pt2"}, "with format='pt2'. Allowed: names that end in .pt2. Fix: use '"),
        ("model.onnx", {"opset": 17}, "opset is 17. Allowed: 18 to 25. Fix: use 18."),
        ("model.onnx", {"opset": 99}, "opset is 99. Allowed: 18 to 25. Fix: use 25."),
        ("model.onnx", {"images": torch.zeros(4, 3, 31, 32)}, "have the shape (4, 3, 31, 32). Allowed: B x 3 x 32"),
        ("model.onnx", {"images": torch.zeros(0, 3, 32, 32)}, "B at least 1. Fix: prepare them with model.pre"),
    ],
)  # fmt: skip
def test_wrong_arguments(name: str, arguments: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        export(network("nano"), tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_networks_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("nano")
    with pytest.raises(
        ValueError, match=r"there are 2 class names for 7 outputs\. Allowed: one class name per output"
    ):
        export(TrainedModel(model.net, model.preprocessing, NAMES[:2]), tmp_path / "x.onnx")
    export(model, tmp_path / "x.onnx")
    with pytest.raises(
        ValueError, match=r"nf_resnet_nano was read from an exported file. Fix: export the run or model"
    ):
        export(from_pretrained(tmp_path / "x.onnx"), tmp_path / "y.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'to ONNX needs onnxscript, .* pip install "normfree\[onnx\]"'
    ):
        export(model, tmp_path / "y.onnx")


def test_the_command(emoji: list[Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network("nano")
    folder, photos = tmp_path / "model", tmp_path / "photos"
    save_pretrained(model, folder)
    photos.mkdir()
    for i in range(3):
        emoji[i].save(photos / f"{i}.png")
    assert main(["export", str(folder), "--images", str(photos)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    size, nodes = (
        (folder / "model.onnx").stat().st_size,
        len(onnx.load_model(folder / "model.onnx").graph.node),
    )
    assert printed.out.startswith(
        f"{folder / 'model.onnx'}: {size / 1e6:.2f} MB, ONNX opset 20, float32, folded, {nodes} nodes\n"
    )
    assert "  0 batch norms, 0 nodes that compute on weights alone\n" in printed.out
    assert "against the network on 3 images: largest relative error " in printed.out
    assert "first class the same on 100 %" in printed.out
    args = [
        "export",
        str(folder),
        "--format",
        "pt2",
        "--out",
        str(tmp_path / "x.pt2"),
        "--images",
        str(photos),
    ]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'x.pt2'}: ")
    images = prepared(model, emoji[:5])
    with torch.no_grad():
        assert relative(reopened(tmp_path / "x.pt2")(images), model.net(images)) < 1e-5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--int8", "--format", "pt2"], "--int8 is given with --unfolded, --with-preprocessing or --format pt2. "
         "Allowed: --int8 with a folded ONNX or OpenVINO file."),
        (["--int8", "--unfolded"], "--int8 is given with --unfolded, --with-preprocessing or --format pt2."),
        (["--int8", "--with-preprocessing"], "--int8 is given with --unfolded, --with-preprocessing or --format pt2."),
        ([], "names no data, because it is not a run, and the exported file is compared on real images. Fix: add "),
        (["--images", "nowhere.png"], "'nowhere.png' does not exist."),
    ],
)  # fmt: skip
def test_mistakes_in_the_command(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(network("nano"), tmp_path / "model")
    before = sorted(p.name for p in (tmp_path / "model").iterdir())
    assert main(["export", str(tmp_path / "model"), *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == before


def test_the_command_reads_the_data_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    save_pretrained(network("nano"), run / "model")
    (run / "config.toml").write_text('data = "synthetic:classes=7,size=32,train=14,val=9"\n')
    assert main(["export", str(run)]) == 0
    assert "against the network on 9 validation images" in capsys.readouterr().out
    assert (run / "model.onnx").is_file()
    (run / "config.toml").write_text('data = "moved"\n')
    assert main(["export", str(run)]) == 2
    error = capsys.readouterr().err
    assert "are not there. Allowed: the same images in any folder. Fix: normfree export" in error
    assert error.count("Fix: ") == 1
    assert main(["export", str(run / "model.onnx")]) == 2
    assert "model.onnx' is a file. Allowed: a run or model folder." in capsys.readouterr().err
