"""Export and quantization of modules of users: any shape of input, any outputs, files of other programs."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from normfree import create_model, export, fold, from_pretrained, quantize
from normfree.cli import main
from normfree.onnx_net import open_graph
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel


class Spectrogram(nn.Module):
    """Spectrograms B 1 H W to clip and frame probabilities, as people put around a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model(
            "nf_resnet_nano", in_channels=1, num_classes=0, depths=(1, 1, 1), skip_gain=0.7
        )
        self.attention, self.classes = nn.Conv1d(256, 4, 1), nn.Conv1d(256, 4, 1)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        frames = self.backbone.forward_features(x).mean(dim=2)
        scores = self.norm(self.classes(frames))
        return {
            "clip": (self.attention(frames).softmax(dim=-1) * scores.sigmoid()).sum(dim=-1),
            "frames": scores,
        }


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    module = Spectrogram().eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture(scope="module")
def exported(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "sed.onnx"
    report = export(model, path, images=torch.randn(5, 1, 32, 75))
    assert report.errors.keys() == {1, 2, 5}
    assert max(report.errors.values()) < 1e-5
    assert (report.images, report.noise, report.batch_norms, report.weight_arithmetic) == (5, False, 0, 0)
    return path


@pytest.mark.works("ONNX Runtime", "export")
def test_a_module_with_one_channel_a_wide_input_and_two_outputs(model: nn.Module, exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    assert [(v.name, v.shape) for v in session.get_inputs()] == [("images", ["batch", 1, 32, 75])]
    assert [v.name for v in session.get_outputs()] == ["clip", "frames"]
    images = torch.randn(3, 1, 32, 75)
    found = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        wanted = model(images)
    for ours, theirs in zip(found, wanted.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_the_command_refuses_a_file_without_classes(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(exported), "x.png"]) == 2
    error = capsys.readouterr().err
    assert "was not written by normfree" in error or "without class names and preprocessing" in error
    assert error.count("\n") == 1


@pytest.mark.works("ONNX Runtime", "quantize")
@pytest.mark.slow
def test_quantization_of_a_file_and_of_the_module_agree(
    model: nn.Module, exported: Path, tmp_path: Path
) -> None:
    batches = torch.randn(12, 1, 32, 75).split(4)
    one = quantize(exported, tmp_path / "one.onnx", calibration=batches)
    two = quantize(model, tmp_path / "two.onnx", calibration=batches)
    for report in (one, two):
        assert report.quantized > 10
        assert (report.left_float, report.images) == (1, 12)
        assert 0 < report.error < 0.1
        assert report.bytes < 0.5 * report.float_bytes
    images = torch.randn(2, 1, 32, 75)
    first, second = (open_graph(r.path).run(images) for r in (one, two))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        wanted = model(images)["frames"]
    assert float((first[1] - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(ValueError, match=r"one.onnx is already quantized. Allowed: float files."):
        quantize(one.path, tmp_path / "three.onnx", calibration=batches)
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 70\). Allowed: B x 1 x 32 x 75, for which the file"):
        quantize(exported, tmp_path / "three.onnx", calibration=[torch.randn(2, 1, 32, 70)])
    assert not (tmp_path / "three.onnx").exists()


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != 3:
            raise RuntimeError("three spectrograms, please")
        return x.reshape(3, -1)


def test_a_fixed_batch_size(tmp_path: Path) -> None:
    images = torch.randn(3, 2, 4)
    with pytest.raises(
        ValueError, match=r"^FixedBatch cannot be run on a batch of 2: three .*, dynamic_batch=False\.$"
    ):
        export(FixedBatch(), tmp_path / "m.onnx", images=images)
    assert list(tmp_path.iterdir()) == []
    report = export(FixedBatch(), tmp_path / "m.onnx", images=images, dynamic_batch=False)
    assert report.errors == {3: 0.0}
    torch.testing.assert_close(open_graph(report.path)(images), images.reshape(3, -1))


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_what_cannot_be_exported_is_named(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"m.{format}"
    with pytest.raises(
        ValueError, match=r"^torch.export cannot trace ByValue: \w+: .*move such code out of forward"
    ):
        export(ByValue(), path, format=format, images=torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"^ReLU is exported without images, .* Fix: pass images=\.$"):
        export(nn.ReLU(), path, format=format)
    with pytest.raises(ValueError, match=r"^ReLU has no preprocessing\. Allowed: a TrainedModel\."):
        export(nn.ReLU(), path, format=format, with_preprocessing=True)
    with pytest.raises(
        ValueError, match=r"^export cannot write str\. Allowed: a TrainedModel or a torch.nn.Module"
    ):
        export("runs/demo-1", path, format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_module_with_preprocessing_and_classes_can_predict(tmp_path: Path) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    model = TrainedModel(module, Preprocessing(image_size=16, crop="squash"), ("a", "b", "c", "d"))
    report = export(model, tmp_path / "m.onnx")
    assert report.batch_norms == 0
    again = from_pretrained(tmp_path / "m.onnx")
    assert (again.classes, again.preprocessing, again.net.name) == (
        model.classes,
        model.preprocessing,
        "Sequential",
    )
    # A folder with such a file is a model as well.
    assert from_pretrained(tmp_path).classes == model.classes
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.net(images), module(images).detach())
    wrong = TrainedModel(module, model.preprocessing, ("a", "b"))
    with pytest.raises(ValueError, match=r"there are 2 class names for outputs of the shape \(2, 4\)"):
        export(wrong, tmp_path / "wrong.onnx")


def proto(*, opset: int = 13, computed: bool = False, inputs: int = 1) -> onnx.ModelProto:
    """Return a network that another program might have written: names of its own, no metadata."""
    weight = np.random.default_rng(0).normal(size=(6, 2, 3, 3)).astype(np.float32)
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Conv", ["spectrogram", "w2" if computed else "w"], ["maps"], name="first"),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("Conv", ["active", "v"], ["scores"], name="second"),
    ]
    if computed:
        nodes.insert(0, helper.make_node("ReduceMax", ["spectrogram"], ["size"], keepdims=0))
        nodes.insert(1, helper.make_node("Mul", ["w", "size"], ["w2"]))
    graph = helper.make_graph(
        nodes, "g",
        [value(name, TensorProto.FLOAT, ["n", 2, 9, 14]) for name in ("spectrogram", "other")[:inputs]],
        [value("scores", TensorProto.FLOAT, ["n", 5, 7, 12])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight[:5, :1].repeat(6, 1)[..., :1, :1], "v")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_a_file_of_another_program_is_quantized(tmp_path: Path) -> None:
    onnx.save_model(proto(), tmp_path / "theirs.onnx")
    batches = torch.randn(16, 2, 9, 14).split(8)
    report = quantize(tmp_path / "theirs.onnx", tmp_path / "int8.onnx", calibration=batches)
    assert (report.quantized, report.left_float, report.images) == (1, 1, 16)
    assert 0 < report.error < 0.05
    assert json.loads(onnx.load_model(report.path).metadata_props[0].value) == {"int8": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 11}, "has version 11 of the ONNX operator set. Allowed: 13 or newer."),
        ({"computed": True}, "computes the weight of 'first'. Allowed: files with stored weights."),
        ({"inputs": 2}, "has the inputs spectrogram tensor(float), other tensor(float). Allowed: one input"),
    ],
)
def test_files_that_cannot_be_quantized(options: dict, message: str, tmp_path: Path) -> None:
    onnx.save_model(proto(**options), tmp_path / "theirs.onnx")
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(tmp_path / "theirs.onnx", tmp_path / "int8.onnx", calibration=[torch.randn(4, 2, 9, 14)])
    assert not (tmp_path / "int8.onnx").exists()


def test_folding_before_the_export_changes_nothing(model: nn.Module, exported: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 1, 32, 75)
    export(fold(model), tmp_path / "m.onnx", images=images, folded=False)
    torch.testing.assert_close(open_graph(tmp_path / "m.onnx").run(images), open_graph(exported).run(images))
