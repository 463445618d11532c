"""Quantized files are smaller and predict almost the same as the network that they were made from."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto

from normfree.cli import main
from normfree.data.source import Source
from normfree.data.sources.synthetic import open_synthetic
from normfree.data.transforms.normalize import normalize
from normfree.deploy.export import export
from normfree.deploy.quantize import QuantizeReport, images_per_second, quantize
from normfree.models.zoo import create_model
from normfree.onnx_net import open_onnx
from normfree.optim.agc import adaptive_clip_grad_
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained
from normfree.uncertainty import accuracy_text

# model, folder of files, training images, validation images, validation labels
Trained = tuple[TrainedModel, Path, torch.Tensor, torch.Tensor, torch.Tensor]
DATA = "synthetic:classes=3,size=24,train=256,val=96"


def pixels(source: Source, pre: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images of a source, normalized, and their labels."""
    images = torch.stack([pre.transform()(source.image(i)) for i in range(len(source))])
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    return normalize(images, mean=pre.mean, std=pre.std), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a network trained for a few seconds to classify three shapes, the folder of its files, and its images."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    split = open_synthetic(DATA)
    model = TrainedModel(
        create_model("nf_resnet_nano", num_classes=3, drop_rate=0.0, stochdepth_rate=0.0),
        Preprocessing(image_size=24, crop="squash"),
        split.classes,
    )
    (train, labels), (val, truth) = (pixels(s, model.preprocessing) for s in (split.train, split.val))
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=2e-3)
    for step in range(64):
        part = torch.arange(32) + 32 * (step % 8)
        optimizer.zero_grad()
        F.cross_entropy(model.net(train[part]), labels[part]).backward()
        adaptive_clip_grad_(model.net, clipping=0.05)
        optimizer.step()
    model.net.eval()
    folder = tmp_path_factory.mktemp("trained")
    export(model, folder / "float.onnx", images=val)
    save_pretrained(model, folder / "run" / "model")
    (folder / "run" / "config.toml").write_text(f'data = "{DATA}"\n')
    return model, folder, train, val, truth


@pytest.fixture(scope="module")
def int8(trained: Trained) -> QuantizeReport:
    _, folder, train, _, _ = trained
    return quantize(folder / "float.onnx", folder / "int8.onnx", calibration=train.split(32))


def test_a_third_of_the_size_and_the_same_predictions(trained: Trained, int8: QuantizeReport) -> None:
    model, folder, _, val, truth = trained
    with torch.no_grad():
        wanted = model.net(val)
    # The network has learned something: chance is a third.
    assert (wanted.argmax(1) == truth).float().mean() > 0.7
    logits = open_onnx(int8.path)[0](val)
    assert (logits.argmax(1) == wanted.argmax(1)).float().mean() >= 0.9
    assert (
        abs((logits.argmax(1) == truth).float().mean() - (wanted.argmax(1) == truth).float().mean()) <= 0.05
    )
    error = ((logits - wanted).norm(dim=1) / wanted.norm(dim=1)).median()
    # The lower bound shows that something was rounded.
    assert 1e-4 < error < 0.1
    assert int8.bytes == int8.path.stat().st_size < 0.35 * int8.float_bytes
    assert int8.float_bytes == (folder / "float.onnx").stat().st_size


def test_the_report_is_measured_on_the_calibration_images(trained: Trained, int8: QuantizeReport) -> None:
    _, folder, train, _, _ = trained
    ours, theirs = (open_onnx(folder / name)[0](train) for name in ("int8.onnx", "float.onnx"))
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
    assert int8.top1_agreement == pytest.approx(100 * float(same))
    assert int8.error == pytest.approx(
        float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median()), rel=1e-4
    )
    assert int8.images == 256


def test_weights_are_int8_with_one_scale_per_output_channel(trained: Trained, int8: QuantizeReport) -> None:
    _, folder, _, _, _ = trained
    model = onnx.load_model(int8.path)
    stored = {t.name: t for t in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    weighted = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    eight = [n for n in weighted if n.input[1] in made_by]
    assert (len(eight), len(weighted) - len(eight)) == (int8.quantized, int8.left_float)
    # The first convolution stays in float.
    assert weighted[0].input[1] in stored
    assert int8.left_float == 1
    for node in eight:
        pair = made_by[node.input[1]]
        weight, scale, zero = (stored[name] for name in pair.input)
        assert pair.op_type == "DequantizeLinear"
        assert weight.data_type == TensorProto.INT8
        outputs = weight.dims[0] if node.op_type == "Conv" else weight.dims[pair.attribute[0].i]
        assert list(scale.dims) == list(zero.dims) == [outputs]
        activation = made_by[node.input[0]]
        assert stored[activation.input[2]].data_type == TensorProto.UINT8
    assert {entry.domain for entry in model.opset_import} == {""}
    kinds = Counter(n.op_type for n in model.graph.node)
    plain = Counter(n.op_type for n in onnx.load_model(folder / "float.onnx").graph.node)
    assert kinds - Counter(plain) == {k: kinds[k] for k in ("QuantizeLinear", "DequantizeLinear")}


def test_logits_are_not_rounded_so_classes_do_not_tie(trained: Trained, int8: QuantizeReport) -> None:
    _, _, train, val, _ = trained
    logits = open_onnx(int8.path)[0](torch.cat([train, val]))
    # There are 1056 logits, and eight bits have 256 values.
    assert len(logits.unique()) > 1000
    best = logits.topk(2).values
    assert (best[:, 0] > best[:, 1]).all()


def test_metadata_is_copied(trained: Trained, int8: QuantizeReport) -> None:
    model, folder, _, _, _ = trained
    before, after = (open_onnx(folder / name)[1] for name in ("float.onnx", "int8.onnx"))
    assert after == before | {"int8": True}
    again = from_pretrained(int8.path)
    assert (again.preprocessing, again.classes) == (model.preprocessing, model.classes)


def test_named_nodes_stay_in_float(trained: Trained, tmp_path: Path) -> None:
    _, folder, train, _, _ = trained
    heads = [n.name for n in onnx.load_model(folder / "float.onnx").graph.node if n.op_type == "Gemm"]
    report = quantize(folder / "float.onnx", tmp_path / "x.onnx", calibration=[train[:32]], keep_float=heads)
    assert report.left_float == len(heads) == 11
    graph = onnx.load_model(report.path).graph
    stored = {t.name for t in graph.initializer}
    assert [n.input[1] in stored for n in graph.node if n.op_type == "Gemm"] == [True] * 11
    assert not [n for n in graph.node if n.op_type == "Conv" and n.input[1] in stored]
    with pytest.raises(
        ValueError, match=r"unknown convolution or linear layer in keep_float 'nothing'. Allowed: 'node_"
    ):
        quantize(folder / "float.onnx", tmp_path / "y.onnx", calibration=[train[:32]], keep_float=["nothing"])


@pytest.mark.slow
def test_the_padding_of_a_max_pool_with_minus_infinity_does_not_affect_a_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model(
        "nf_resnet50", num_classes=3, widths=(16, 32, 48, 64), depths=(1, 1, 1, 1), skip_gain=0.7
    )
    torch.nn.init.normal_(net.head.weight)
    images = torch.randn(64, 3, 48, 48)
    export(
        TrainedModel(net.eval(), Preprocessing(image_size=48), tuple("abc")),
        tmp_path / "x.onnx",
        images=images,
    )
    pads = [n for n in onnx.load_model(tmp_path / "x.onnx").graph.node if n.op_type in ("Pad", "MaxPool")]
    assert len(pads) == 2
    assert quantize(tmp_path / "x.onnx", tmp_path / "y.onnx", calibration=images.split(32)).error < 0.1


def test_what_cannot_be_quantized(trained: Trained, int8: QuantizeReport, tmp_path: Path) -> None:
    _, folder, train, _, _ = trained
    source = folder / "float.onnx"
    with pytest.raises(
        ValueError,
        match=r"Allowed: names that end in .onnx or .xml, except that of the float file. Fix: use '",
    ):
        quantize(source, source, calibration=[train])
    with pytest.raises(ValueError, match=r"calibration has no images. Allowed: at least one batch"):
        quantize(source, tmp_path / "x.onnx", calibration=[])
    with pytest.raises(ValueError, match="Allowed: B x 3 x 24 x 24"):
        quantize(source, tmp_path / "x.onnx", calibration=[train[:, :, :20, :20]])
    with pytest.raises(ValueError, match=r"is already quantized. Allowed: float files."):
        quantize(int8.path, tmp_path / "x.onnx", calibration=[train])
    with pytest.raises(ValueError, match=r"Fix: pass batches, images\[None\] of one"):
        quantize(source, tmp_path / "x.onnx", calibration=list(train[:2]))
    with pytest.raises(ValueError, match=r"is a folder. Allowed: ONNX files and networks. Fix: quantize the"):
        quantize(folder, tmp_path / "x.onnx", calibration=[train])
    with pytest.raises(ValueError, match=r"is an OpenVINO file. Allowed: ONNX files and networks"):
        quantize(folder / "float.xml", tmp_path / "x.onnx", calibration=[train])
    with pytest.raises(ValueError, match=r"does not exist. Allowed: an ONNX file"):
        quantize(folder / "none.onnx", tmp_path / "x.onnx", calibration=[train])
    with pytest.raises(TypeError, match=r"keep_float is a string. Allowed: .* Fix: keep_float=\['head'\]"):
        quantize(source, tmp_path / "x.onnx", calibration=[train], keep_float="head")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda x: x, TypeError, r"calibration is a tensor. .* Fix: calibration=images.split\(32\)"),
        (lambda x: [(x, x)], TypeError, r"batch 0 is a tuple. .* Fix: \(images for images, _ in"),
        (lambda x: [x, x.numpy()], TypeError, "batch 1 is a ndarray. Allowed: float tensors"),
        (lambda x: [x.byte()], TypeError, "batch 0 has the type torch.uint8. Allowed: float tensors"),
        (lambda x: [x / 0], ValueError, "batch 0 has values that are not finite"),
        (lambda x: [x[:0]], ValueError, "calibration has no images"),
    ],
)
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_calibration_inputs_that_cannot_be_used(
    trained: Trained, tmp_path: Path, make: Any, kind: type[Exception], message: str, suffix: str
) -> None:
    _, folder, train, _, _ = trained
    with pytest.raises(kind, match=message):
        quantize(folder / "float.onnx", tmp_path / f"x{suffix}", calibration=make(train))


def test_empty_batches_and_repeated_names_are_counted_once(trained: Trained, tmp_path: Path) -> None:
    _, folder, train, _, _ = trained
    source = folder / "float.onnx"
    name = next(n.name for n in onnx.load_model(source).graph.node if n.op_type == "Conv")
    batches = [train[:0], train[:16], train[:0]]
    report = quantize(source, tmp_path / "x.onnx", calibration=batches, keep_float=[name, name])
    assert (report.images, report.left_float) == (16, 1)


def test_eval_names_the_file_that_computes(int8: QuantizeReport, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(int8.path), DATA]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" on 96 images, computed by {int8.path}")


@pytest.mark.slow
def test_an_unfolded_file_is_quantized_as_well(
    trained: Trained, int8: QuantizeReport, tmp_path: Path
) -> None:
    model, _, train, val, _ = trained
    export(model, tmp_path / "unfolded.onnx", folded=False, images=val)
    # Its weights are computed from stored ones, once.
    report = quantize(tmp_path / "unfolded.onnx", tmp_path / "x.onnx", calibration=train.split(32))
    assert (report.quantized, report.left_float) == (int8.quantized, int8.left_float)
    assert report.error < 0.1


def test_a_file_with_wrong_scales_is_not_kept(trained: Trained, tmp_path: Path) -> None:
    _, folder, train, _, _ = trained
    # One image with extreme values determines every scale.
    mixed = [train[:1] * 1e6, *[train[:1]] * 3]
    with pytest.raises(
        ValueError, match=r"was not kept: its logits differ from those of the float file by \d+ % on"
    ):
        quantize(folder / "float.onnx", tmp_path / "x.onnx", calibration=mixed)
    assert list(tmp_path.iterdir()) == []


def test_speed_is_images_over_seconds_of_the_median_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("normfree.deploy.quantize.time.perf_counter", lambda: clock[0])

    def net(*seconds: float) -> Any:
        spent = iter(seconds)

        def run(images: torch.Tensor) -> None:
            clock[0] += next(spent) * len(images)

        return run

    # The first round is not counted.
    nets = [net(9.0, 0.002, 0.002, 0.002), net(9.0, 0.5, 0.004, 0.001)]
    assert images_per_second(nets, torch.zeros(5, 3, 2, 2), rounds=3) == pytest.approx([500, 250])


def test_the_command_prints_the_accuracy_of_both_files(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, _, val, truth = trained
    assert main(["export", str(folder / "run"), "--int8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    with torch.no_grad():
        before = 100 * float((model.net(val).argmax(1) == truth).float().mean())
    after = 100 * float(
        (open_onnx(folder / "run" / "model.int8.onnx")[0](val).argmax(1) == truth).float().mean()
    )
    shown = [accuracy_text(round(0.96 * top1), 96) for top1 in (before, after)]
    wanted = (
        f"top-1 on 96 labeled images: float {shown[0]} %, int8 {shown[1]} %, {after - before:+.2f} points\n"
    )
    assert wanted in printed.out
    assert "against the float file on 256 training images that set its ranges: " in printed.out
    assert "images set its ranges. Fix" not in printed.out
    assert printed.out.count("images/s at batch ") == 2


@pytest.mark.slow
def test_the_command_reports_missing_labels(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, _, _, _ = trained
    source = open_synthetic(DATA).val
    for i in range(8):
        source.image(i).save(tmp_path / f"{i}.png")
    args = ["export", str(folder / "run" / "model"), "--int8", "--out", str(tmp_path / "m.onnx")]
    args += ["--images", str(tmp_path)]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "  accuracy not measured, because the images have no labels. Fix: --images FOLDER" in printed
    assert "  only 8 images set its ranges. Fix: --images with a few hundred\n" in printed
    for i in range(8):
        (tmp_path / "labelled" / source.classes[source.label(i)]).mkdir(parents=True, exist_ok=True)
        source.image(i).save(tmp_path / "labelled" / source.classes[source.label(i)] / f"{i}.png")
    assert main([*args[:-1], str(tmp_path / "labelled")]) == 0
    assert "  top-1 on 8 labeled images: float " in capsys.readouterr().out


def test_nodes_without_names_are_quantized(trained: Trained, tmp_path: Path) -> None:
    """Names are optional in ONNX."""
    _, folder, train, _, _ = trained
    named = onnx.load_model(folder / "float.onnx")
    layers = [node for node in named.graph.node if node.op_type in ("Conv", "Gemm")]
    head = layers[-1].output[0]
    for node in named.graph.node:
        node.name = ""
    onnx.save_model(named, tmp_path / "float.onnx")
    batches = train[:64].split(32)
    report = quantize(tmp_path / "float.onnx", tmp_path / "a.onnx", calibration=batches)
    assert (report.quantized, report.left_float) == (len(layers) - 1, 1)
    assert 0 < report.error < 0.2
    kept = quantize(tmp_path / "float.onnx", tmp_path / "b.onnx", calibration=batches, keep_float=[head])
    assert (kept.quantized, kept.left_float) == (len(layers) - 1, 1)


class Tokens(torch.nn.Module):
    """A linear layer of every pixel, and a product of two activations, both MatMul in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return ((self.linear(tokens) @ tokens.transpose(1, 2)) @ tokens).mean(1)


def test_linear_layers_of_tokens_are_quantized_and_products_of_activations_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = torch.randn(16, 3, 16, 16).split(8)
    report = quantize(Tokens().eval(), tmp_path / "a.onnx", calibration=batches, keep_float=[])
    assert (report.quantized, report.left_float) == (2, 0)
    assert 0 < report.error < 0.1


def test_a_file_without_weights_is_refused(tmp_path: Path) -> None:
    export(torch.nn.ReLU(), tmp_path / "relu.onnx", images=torch.randn(2, 3, 8, 8))
    with pytest.raises(
        ValueError, match=r"has no layers with weights. Allowed: networks with convolutions or"
    ):
        quantize(tmp_path / "relu.onnx", tmp_path / "x.onnx", calibration=[torch.randn(2, 3, 8, 8)])


def test_weights_in_another_file_are_quantized_and_counted(trained: Trained, tmp_path: Path) -> None:
    """`torch.onnx.export` writes such files."""
    _, folder, train, _, _ = trained
    onnx.save_model(
        onnx.load_model(folder / "float.onnx"), tmp_path / "float.onnx", save_as_external_data=True,
        location="float.onnx.data", size_threshold=1024,
    )  # fmt: skip
    batches = train[:64].split(32)
    inside, beside = (
        quantize(path / "float.onnx", tmp_path / f"{number}.onnx", calibration=batches)
        for number, path in enumerate((folder, tmp_path))
    )
    assert (beside.quantized, beside.left_float, beside.error) == (
        inside.quantized,
        inside.left_float,
        inside.error,
    )
    assert beside.float_bytes == pytest.approx(inside.float_bytes, rel=0.05)
