"""Int8 files: smaller, and they still answer like the network that they were made from."""

from collections import Counter

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto

from normfree.cli import main
from normfree.data.sources.synthetic import open_synthetic
from normfree.data.transforms.normalize import normalize
from normfree.deploy.export import export
from normfree.deploy.quantize import images_per_second, quantize
from normfree.models.zoo import create_model
from normfree.onnx_net import open_onnx
from normfree.optim.agc import adaptive_clip_grad_
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, from_pretrained, save_pretrained

DATA = "synthetic:classes=3,size=24,train=256,val=96"


def pixels(source, pre):
    images = torch.stack([pre.transform()(source.image(i)) for i in range(len(source))])
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    return normalize(images, mean=pre.mean, std=pre.std), labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network that has learnt three shapes in some seconds, its float file and its pictures."""
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
def int8(trained):
    _, folder, train, _, _ = trained
    return quantize(folder / "float.onnx", folder / "int8.onnx", calibration=train.split(32))


def test_a_quarter_of_the_size_and_the_same_answers(trained, int8):
    model, folder, _, val, truth = trained
    with torch.no_grad():
        wanted = model.net(val)
    assert (wanted.argmax(1) == truth).float().mean() > 0.7  # of three classes: it has learnt something
    logits = open_onnx(int8.path)[0](val)
    assert (logits.argmax(1) == wanted.argmax(1)).float().mean() >= 0.9
    assert (
        abs((logits.argmax(1) == truth).float().mean() - (wanted.argmax(1) == truth).float().mean()) <= 0.05
    )
    error = ((logits - wanted).norm(dim=1) / wanted.norm(dim=1)).median()
    assert 1e-4 < error < 0.1  # above the first: something was rounded
    assert int8.bytes == int8.path.stat().st_size < 0.35 * int8.float_bytes
    assert int8.float_bytes == (folder / "float.onnx").stat().st_size


def test_the_report_is_measured_on_the_calibration_pictures(trained, int8):
    _, folder, train, _, _ = trained
    ours, theirs = (open_onnx(folder / name)[0](train) for name in ("int8.onnx", "float.onnx"))
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
    assert int8.top1_agreement == pytest.approx(100 * float(same))
    assert int8.error == pytest.approx(
        float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).median()), rel=1e-4
    )
    assert int8.images == 256


def test_the_graph_holds_bytes_one_scale_for_each_output_channel(trained, int8):
    _, folder, _, _, _ = trained
    model = onnx.load_model(int8.path)
    stored = {t.name: t for t in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    weighted = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    eight = [n for n in weighted if n.input[1] in made_by]
    assert (len(eight), len(weighted) - len(eight)) == (int8.quantized, int8.left_float)
    assert weighted[0].input[1] in stored  # the first convolution stays float
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


def test_logits_are_not_rounded_so_that_classes_do_not_tie(trained, int8):
    _, _, train, val, _ = trained
    logits = open_onnx(int8.path)[0](torch.cat([train, val]))
    assert len(logits.unique()) > 1000  # of 1056; eight bits have 256
    best = logits.topk(2).values
    assert (best[:, 0] > best[:, 1]).all()


def test_metadata_is_carried_over(trained, int8):
    model, folder, _, _, _ = trained
    before, after = (open_onnx(folder / name)[1] for name in ("float.onnx", "int8.onnx"))
    assert after == before | {"int8": True}
    again = from_pretrained(int8.path)
    assert (again.preprocessing, again.classes) == (model.preprocessing, model.classes)


def test_nodes_stay_float_as_asked(trained, tmp_path):
    _, folder, train, _, _ = trained
    heads = [n.name for n in onnx.load_model(folder / "float.onnx").graph.node if n.op_type == "Gemm"]
    report = quantize(folder / "float.onnx", tmp_path / "x.onnx", calibration=[train[:32]], keep_float=heads)
    assert report.left_float == len(heads) == 11
    graph = onnx.load_model(report.path).graph
    stored = {t.name for t in graph.initializer}
    assert [n.input[1] in stored for n in graph.node if n.op_type == "Gemm"] == [True] * 11
    assert not [n for n in graph.node if n.op_type == "Conv" and n.input[1] in stored]
    with pytest.raises(ValueError, match=r"keep_float names nothing. Allowed: node_"):
        quantize(folder / "float.onnx", tmp_path / "y.onnx", calibration=[train[:32]], keep_float=["nothing"])


@pytest.mark.slow
def test_a_max_pool_padded_with_minus_infinity_does_not_set_a_scale(tmp_path):
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


def test_what_cannot_be_quantized(trained, int8, tmp_path):
    model, folder, train, val, _ = trained
    source = folder / "float.onnx"
    with pytest.raises(
        ValueError, match=r"expected a name that ends in .onnx, and is not the float file's. Use '"
    ):
        quantize(source, source, calibration=[train])
    with pytest.raises(ValueError, match=r"no pictures to calibrate .* on. Give batches of at least one."):
        quantize(source, tmp_path / "x.onnx", calibration=[])
    with pytest.raises(ValueError, match="this file was exported for B x 3 x 24 x 24"):
        quantize(source, tmp_path / "x.onnx", calibration=[train[:, :, :20, :20]])
    with pytest.raises(ValueError, match=r"is int8 already. Export it folded, in float, then quantize."):
        quantize(int8.path, tmp_path / "x.onnx", calibration=[train])
    export(model, tmp_path / "unfolded.onnx", folded=False, images=val)
    with pytest.raises(
        ValueError, match=r"is not folded: it standardizes its weights in float. Export it folded"
    ):
        quantize(tmp_path / "unfolded.onnx", tmp_path / "x.onnx", calibration=[train])
    assert [p.name for p in tmp_path.iterdir()] == ["unfolded.onnx"]


def test_a_file_that_lost_the_network_is_not_kept(trained, tmp_path):
    _, folder, train, _, _ = trained
    mixed = [train[:1] * 1e6, *[train[:1]] * 3]  # one picture far outside sets every scale
    with pytest.raises(
        ValueError, match=r"was not kept: its logits differ from the float file's by \d+ % on"
    ):
        quantize(folder / "float.onnx", tmp_path / "x.onnx", calibration=mixed)
    assert list(tmp_path.iterdir()) == []


def test_speed_is_images_over_seconds_of_the_median_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("normfree.deploy.quantize.time.perf_counter", lambda: clock[0])

    def net(*seconds):
        spent = iter(seconds)

        def run(images):
            clock[0] += next(spent) * len(images)

        return run

    nets = [net(9.0, 0.002, 0.002, 0.002), net(9.0, 0.5, 0.004, 0.001)]  # the first round does not count
    assert images_per_second(nets, torch.zeros(5, 3, 2, 2), rounds=3) == pytest.approx([500, 250])


def test_the_command_prints_what_int8_costs(trained, capsys):
    model, folder, _, val, truth = trained
    assert main(["export", str(folder / "run"), "--int8"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    with torch.no_grad():
        before = 100 * float((model.net(val).argmax(1) == truth).float().mean())
    after = 100 * float(
        (open_onnx(folder / "run" / "model.int8.onnx")[0](val).argmax(1) == truth).float().mean()
    )
    wanted = f"top-1 on 96 labelled pictures: float {before:.2f} %, int8 {after:.2f} %, {after - before:+.2f} points\n"
    assert wanted in said.out
    assert "against the float file on the 256 training pictures that set its ranges: " in said.out
    assert said.out.count("images/s at batch ") == 2


@pytest.mark.slow
def test_without_labels_the_command_says_so(trained, tmp_path, capsys):
    _, folder, _, _, _ = trained
    source = open_synthetic(DATA).val
    for i in range(8):
        source.image(i).save(tmp_path / f"{i}.png")
    words = ["export", str(folder / "run" / "model"), "--int8", "--out", str(tmp_path / "m.onnx")]
    words += ["--images", str(tmp_path)]
    assert main(words) == 0
    assert (
        "  accuracy not measured: no labels; give --images a folder of class folders"
        in capsys.readouterr().out
    )
    for i in range(8):
        (tmp_path / "labelled" / source.classes[source.label(i)]).mkdir(parents=True, exist_ok=True)
        source.image(i).save(tmp_path / "labelled" / source.classes[source.label(i)] / f"{i}.png")
    assert main([*words[:-1], str(tmp_path / "labelled")]) == 0
    assert "  top-1 on 8 labelled pictures: float " in capsys.readouterr().out
