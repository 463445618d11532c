"""OpenVINO as format of export and as runtime of the commands."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from normfree import create_model, evaluate, export, from_pretrained, predict, quantize
from normfree.cli import main
from normfree.data.source import ArraySource
from normfree.deploy.preprocessed import example_pixels
from normfree.openvino_net import open_openvino
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3, depths=(1, 1, 1), skip_gain=0.7).eval()
    nn.init.normal_(net.head.weight, std=0.5)
    return TrainedModel(net, Preprocessing(image_size=24, crop="squash"), ("a", "b", "snö"))


@pytest.fixture(scope="module")
def exported(model: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    report = export(model, path, format="openvino")
    assert max(report.errors.values()) < 1e-4
    assert (report.top1_agreement, report.batch_norms) == (100, 0)
    assert report.bytes == path.stat().st_size + path.with_suffix(".bin").stat().st_size
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.bin", "model.xml"]
    return path


@pytest.mark.works("OpenVINO", "export")
def test_logits_are_those_of_the_network(model: TrainedModel, exported: Path) -> None:
    net, metadata = open_openvino(exported)
    assert (metadata["classes"], metadata["row"]) == (list(model.classes), "nf_resnet_nano")
    for batch in (0, 1, 3, 64):
        images = torch.randn(batch, 3, 24, 24)
        with torch.no_grad():
            wanted = model.net(images) if batch else torch.empty(0, 3)
        torch.testing.assert_close(net(images), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match=r"\(1, 3, 24, 25\)\. Allowed: B x 3 x 24 x 24, for which the file was"
    ):
        net(torch.zeros(1, 3, 24, 25))
    # Results of one call are not overwritten by the next.
    first = net(torch.ones(1, 3, 24, 24))
    kept = first.clone()
    net(torch.zeros(1, 3, 24, 24))
    assert torch.equal(first, kept)
    half = open_openvino(exported, precision="bfloat16")[0](images)
    assert 0 < float((half - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(ValueError, match=r"unknown precision 'bfloat61'. Did you mean 'bfloat16'\?"):
        open_openvino(exported, precision="bfloat61")


@pytest.mark.works("OpenVINO", "predict and evaluate")
def test_files_and_folders_are_models_of_the_commands(
    model: TrainedModel, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [image.numpy() for image in example_pixels()]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    wanted = list(predict(model, [tmp_path], device="cpu"))
    for source in (exported, exported.parent):
        found = list(predict(from_pretrained(source), [tmp_path], device="cpu"))
        assert [p.classes for p in found] == [p.classes for p in wanted]
        assert np.allclose([p.probabilities for p in found], [p.probabilities for p in wanted], atol=1e-4)
    capsys.readouterr()
    assert main(["predict", str(exported), str(tmp_path / "0.png"), "--format", "jsonl", "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["top"][0]["class"] == wanted[0].classes[0]
    small = np.stack([np.asarray(Image.fromarray(image).resize((30, 30))) for image in images])
    source = ArraySource(small, [0, 1, 2, 0, 1], classes=model.classes, names=list("vwxyz"))
    scores = [evaluate(m.net, source, preprocessing=model.preprocessing, device="cpu")
              for m in (model, from_pretrained(exported))]  # fmt: skip
    assert scores[0].predictions.tolist() == scores[1].predictions.tolist()
    assert scores[0].loss == pytest.approx(scores[1].loss, abs=1e-4)


@pytest.mark.works("OpenVINO", "serve")
def test_the_server_runs_the_file(model: TrainedModel, exported: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")

    from normfree.serve.app import create_app

    stream = io.BytesIO()
    Image.fromarray(example_pixels()[0].numpy()).save(stream, "PNG")
    app = create_app(from_pretrained(exported), name="m", device="cpu")
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        answer = client.post(
            "/predict?top=3", content=stream.getvalue(), headers={"Content-Type": "image/png"}
        )
    assert answer.status_code == 200
    assert '"class"' in answer.text


@pytest.mark.works("OpenVINO", "quantize")
def test_int8(model: TrainedModel, exported: Path, tmp_path: Path) -> None:
    batches = torch.randn(64, 3, 24, 24).split(16)
    report = quantize(model, tmp_path / "int8.xml", calibration=batches)
    assert report.bytes < 0.6 * report.float_bytes
    assert 0 < report.error < 0.1
    again = from_pretrained(report.path)
    with torch.no_grad():
        wanted = model.net(batches[0])
    assert float((again.net(batches[0]) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.works("OpenVINO", "quantize")
def test_int8_of_a_network_whose_silu_is_a_sigmoid_and_a_product(tmp_path: Path) -> None:
    """As an ONNX graph, NNCF would make a network of it whose outputs are 0."""
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=5, skip_gain=0.7).eval()
    torch.nn.init.normal_(net.head.weight)
    batches = torch.randn(32, 3, 32, 32).split(8)
    report = quantize(net, tmp_path / "a.xml", calibration=batches)
    assert report.error < 0.2  # 0.105 with these random weights; 1 if the outputs were 0
    assert report.left_float == 0
    export(net, tmp_path / "a.onnx", images=batches[0])
    graph = pytest.importorskip("onnx").load_model(tmp_path / "a.onnx").graph
    layers = [node.name for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == report.quantized
    # OpenVINO names the last layer differently, after the output.
    for names in ([layers[0]], [layers[-1]], layers[::3]):
        kept = quantize(tmp_path / "a.onnx", tmp_path / "b.xml", calibration=batches, keep_float=names)
        assert (kept.left_float, kept.quantized) == (len(names), report.quantized - len(names))
    with pytest.raises(ValueError, match="unknown convolution or linear layer in keep_float 'nothing'"):
        quantize(tmp_path / "a.onnx", tmp_path / "c.xml", calibration=batches, keep_float=["nothing"])


@pytest.mark.works("OpenVINO", "quantize")
def test_int8_layers_behind_reshapes_are_counted(tmp_path: Path) -> None:
    """The convolution of channel attention reads 8 bits through an operation that only adds an axis."""
    net = create_model("timm_eca_nfnet_l0", num_classes=5).eval()
    report = quantize(net, tmp_path / "a.xml", calibration=torch.randn(2, 3, 64, 64).split(1))
    assert (report.quantized, report.left_float) == (70, 0)


@pytest.mark.works("OpenVINO", "export with preprocessing")
def test_preprocessing_inside_of_the_graph(model: TrainedModel, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    report = export(model, tmp_path / "m.xml", format="openvino", with_preprocessing=True)
    assert report.errors[1] < 5e-3
    run = openvino.Core().compile_model(tmp_path / "m.xml", "CPU")
    assert run.input(0).get_any_name() == "image"
    assert float(run(example_pixels()[1].numpy())[0].sum()) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="contains its preprocessing"):
        from_pretrained(tmp_path / "m.xml")


@pytest.mark.works("OpenVINO", "normfree export")
def test_the_command(model: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    save_pretrained(model, tmp_path / "model")
    for i, image in enumerate(example_pixels()):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i}.png")
    args = ["export", str(tmp_path / "model"), "--format", "openvino", "--int8", "--images", str(tmp_path)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'model' / 'model.xml'}: " in out
    assert ", OpenVINO, float32, folded, " in out
    assert f"{tmp_path / 'model' / 'model.int8.xml'}: " in out
    assert from_pretrained(tmp_path / "model" / "model.int8.xml").classes == model.classes


@pytest.mark.parametrize("damage", ["no weights", "truncated", "no metadata"])
def test_damaged_files_give_a_single_line(
    damage: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    openvino = pytest.importorskip("openvino")
    path = tmp_path / "model.xml"
    path.write_bytes(exported.read_bytes())
    path.with_suffix(".bin").write_bytes(exported.with_suffix(".bin").read_bytes())
    if damage == "no weights":
        path.with_suffix(".bin").unlink()
    elif damage == "truncated":
        path.write_bytes(exported.read_bytes()[:5000])
    else:
        graph = openvino.Core().read_model(exported)
        graph.set_rt_info("", ["normfree"])
        openvino.save_model(graph, path)
    assert main(["predict", str(path), "x.png"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert {"no weights": "model.bin' does not exist", "truncated": "is not an OpenVINO file or is damaged",
            "no metadata": "is not a JSON object"}[damage] in error  # fmt: skip


def test_a_missing_package_is_named_with_its_extra(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert main(["predict", str(exported), "x.png"]) == 2
    error = capsys.readouterr().err
    assert error == (
        'normfree: an OpenVINO file needs openvino, which is not installed. Fix: pip install "normfree[openvino]".\n'
    )
