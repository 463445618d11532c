"""ONNX files as models: outputs of onnxruntime, checks of the metadata, and malformed or malicious files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from normfree.cli import main
from normfree.data.sources.synthetic import open_synthetic
from normfree.inference import evaluate
from normfree.onnx_net import open_onnx
from normfree.preprocessing import Preprocessing
from normfree.pretrained import from_pretrained, save_pretrained

SIZE, NAMES = 8, ("disk", "ring", "square")
PRE = Preprocessing(image_size=SIZE, crop="squash", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
WEIGHT = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
METADATA = {
    "row": "nf_resnet_nano", "version": "0", "classes": list(NAMES), "opset": 20, "folded": True,
    "preprocessing": {"image_size": SIZE, "crop": "squash", "crop_pct": 1.0, "interpolation": "bicubic",
                      "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
}  # fmt: skip


def proto(metadata: object = METADATA) -> onnx.ModelProto:
    """Return an ONNX model that multiplies the mean color by a matrix."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
        ],
        "mean_color",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [
            numpy_helper.from_array(np.array([2, 3]), "axes"),
            numpy_helper.from_array(WEIGHT, "weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        model.metadata_props.add(key="normfree", value=text)
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save_model(proto(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def logits_of(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3)) @ torch.from_numpy(WEIGHT)


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 64])
def test_the_module_computes_the_graph(path: Path, batch: int) -> None:
    net, metadata = open_onnx(path)
    images = torch.randn(batch, 3, SIZE, SIZE)
    torch.testing.assert_close(net(images), logits_of(images))
    torch.testing.assert_close(net(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), net(images))
    assert (net.num_classes, net.in_channels, net.image_size, net.name) == (3, 3, SIZE, "nf_resnet_nano")
    assert metadata == METADATA
    assert net.session.get_session_options().intra_op_num_threads == torch.get_num_threads()
    assert list(net.parameters()) == []


def test_images_of_another_size_are_refused(path: Path) -> None:
    net, _ = open_onnx(path)
    with pytest.raises(
        ValueError, match=r"\(1, 3, 9, 8\)\. Allowed: B x 3 x 8 x 8, for which the file was exported"
    ):
        net(torch.zeros(1, 3, 9, 8))


def test_a_file_can_be_evaluated_and_predicts(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = from_pretrained(path)
    assert model.preprocessing == PRE
    assert model.classes == NAMES
    source = open_synthetic("synthetic:classes=3,size=8,train=3,val=30").val
    score = evaluate(model.net, source, preprocessing=PRE, device="cpu")
    pixels = torch.stack([torch.from_numpy(np.array(source.image(i))) for i in range(30)]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PRE.mean, PRE.std))
    logits = logits_of((pixels / 255 - mean) / std)
    assert score.predictions.tolist() == logits.argmax(1).tolist()
    source.image(4).save(tmp_path / "x.png")
    assert main(["predict", str(path), str(tmp_path / "x.png"), "--format", "jsonl", "--device", "cpu"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    wanted = logits[4].softmax(0)
    assert [t["class"] for t in top] == [NAMES[i] for i in wanted.argsort(descending=True)]
    assert sorted(t["probability"] for t in top) == pytest.approx(wanted.sort().values.tolist(), abs=1e-5)
    with pytest.raises(
        ValueError, match="nf_resnet_nano was read from an ONNX file, which has no trainable weights"
    ):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- invalid files ---------------------------------------------------------------------


def changed(**fields: object) -> dict:
    return METADATA | fields


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "was not written by normfree: it does not contain class names"),
        ("{", "the metadata 'normfree' is not a JSON object."),
        ("[" * 200_000, "the metadata 'normfree' is not a JSON object."),
        ("7", "the metadata 'normfree' is not a JSON object."),
        (list(METADATA), "the metadata 'normfree' is not a JSON object."),
        ({k: v for k, v in METADATA.items() if k != "row"}, "the metadata 'normfree' lacks row."),
        (changed(classes=["a", "b"]), "its metadata has 2 classes for 3 outputs."),
        (changed(classes=["a", "b", 3]), "'classes' in its metadata is not a list of strings."),
        (changed(preprocessing=[]), "'preprocessing' in its metadata is not a JSON object."),
        (changed(preprocessing={"image_size": 9}), "8 x 8 pixels, but the image size of its preprocessing is 9."),
        (changed(preprocessing={"image_size": 8, "crop": "x"}), "the preprocessing in its metadata is invalid: "),
        (changed(preprocessing={"image_size": 8, "eval": "x"}), "the preprocessing in its metadata is invalid: "),
        (changed(preprocessing={"image_size": 8, "mean": [0.5], "std": [0.5]}), "invalid: 1 mean(s) for 3 channels."),
        (changed(preprocessing={"image_size": 8, "mean": [0.5]}), "invalid: mean=(0.5,), std=(0.229, 0.224, 0.225)."),
    ],
)  # fmt: skip
def test_metadata_is_checked(
    metadata: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save_model(proto(metadata), tmp_path / "model.onnx")
    assert main(["predict", str(tmp_path / "model.onnx"), "x.png"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_file_truncated_anywhere_gives_a_single_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.onnx"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        assert main(["predict", str(cut), "x.png"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"normfree: {cut}")
        assert error.count("\n") == 1
    cut.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ValueError, match="is not an ONNX file or is truncated"):
        open_onnx(cut)
    with pytest.raises(ValueError, match=r"'nowhere.onnx' does not exist. Allowed: an ONNX file"):
        from_pretrained("nowhere.onnx")


def test_an_unknown_operator_gives_a_single_line(tmp_path: Path) -> None:
    model = proto()
    model.graph.node[1].op_type = "Shell"
    onnx.save_model(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="onnxruntime refuses this file: ") as caught:
        open_onnx(tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)


def outside(tensor: onnx.TensorProto, location: str) -> onnx.TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def in_a_branch(tensor: onnx.TensorProto) -> onnx.NodeProto:
    """Return a node that contains a tensor two levels deep."""
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [],
                              [helper.make_tensor_value_info("c", TensorProto.FLOAT, [3, 3])])  # fmt: skip
    return helper.make_node("If", ["flag"], ["d"], then_branch=inner, else_branch=inner)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "a/../../secret", "link/secret"])
@pytest.mark.parametrize("deep", [False, True])
def test_weights_outside_the_folder_are_not_read(location: str, deep: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    os.symlink(tmp_path, folder / "link")
    model = proto()
    if deep:
        tensor = outside(numpy_helper.from_array(WEIGHT, "hidden"), location)
        model.graph.node.append(in_a_branch(tensor))
    else:
        outside(model.graph.initializer[1], location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=f"refers to the file '{location}', which was not opened. Allowed: files in the"
    ):
        open_onnx(folder / "model.onnx")


def test_weights_in_the_same_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(WEIGHT.tobytes())
    model = proto()
    outside(model.graph.initializer[1], "weights")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(open_onnx(tmp_path / "model.onnx")[0](images), logits_of(images))


# --- missing packages and devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    module: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["predict", str(path), "x.png"]) == 2
    assert (
        capsys.readouterr().err
        == f'normfree: an ONNX file needs {module}, which is not installed. Fix: pip install "normfree[onnx]".\n'
    )


def test_an_unknown_device_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"device is 'tpu'. Allowed: cpu.* for ONNX files. Fix: use 'cpu'."):
        open_onnx(path, device="tpu")


def test_the_preprocessing_of_the_file_is_used(path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "red.png")
    model = from_pretrained(path)
    pixels = model.preprocessing.transform()(Image.open(tmp_path / "red.png"))
    assert pixels.shape == (3, SIZE, SIZE)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
