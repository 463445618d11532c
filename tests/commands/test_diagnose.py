"""`normfree diagnose` on a model name, a run and networks of other libraries: tables, JSON, plots and errors."""

import json
import shlex

import pytest
from PIL import Image

from normfree.cli import main
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained

SOURCE = "synthetic:classes=3,size=16,train=6,val=6"
CLASSES = ("disk", "ring", "square")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder):
    """Return a run folder as training leaves it, with sampled ratios in metrics.jsonl."""
    from normfree.training.config_io import to_toml, with_overrides
    from normfree.training.recipes import RECIPES

    config = with_overrides(
        RECIPES["demo"](), ["--data", SOURCE, "--model", "nf_resnet_nano", "--input.test_fraction", "0"]
    )
    net = create_model("nf_resnet_nano", num_classes=3).eval()
    save_pretrained(TrainedModel(net, Preprocessing(image_size=16), CLASSES), folder / "run" / "model")
    (folder / "run" / "config.toml").write_text(to_toml(config))
    ratios = {"all": [0.001, 0.01, 0.07]}
    rows = [{"step": i, "epoch": i / 4, "ratios": ratios} for i in range(10)] + [{"step": 10, "epoch": 2.5}]
    write_metrics(folder / "run", rows)
    return folder / "run"


def write_metrics(run, rows):
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_name_is_measured_on_noise_with_open_branches(folder, capsys):
    assert main(["diagnose", "nf_resnet_nano", "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("nf_resnet_nano, random weights, skip gains 1, 4 images of N(0, 1) at 32 px\n")
    assert "(1.040)" in out
    assert "training: no, bit for bit the same\nevaluation: no, bit for bit the same\n" in out
    assert " would clip 10 % of the units" not in out  # there is no recommendation for random weights
    plots = ["diagnose-nf_resnet_nano/signal.png", "diagnose-nf_resnet_nano/ratios.png"]
    assert out.endswith(f"\nplots: {', '.join(plots)}\n")
    for name in plots:
        with Image.open(folder / name) as image:
            assert image.width <= 600  # legible on a phone
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_a_run_is_measured_on_its_own_data_and_recommends_by_its_samples(run, capsys):
    assert main(["diagnose", "run", "--batch-size", "4", "--out", "plots"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"run, 4 images of {SOURCE} at 16 px\n")
    assert (
        "λ 0.07 would clip 10 % of the units that have a gradient, according to 10 samples of the run\n"
        in out
    )
    assert sorted(p.name for p in (run.parent / "plots").iterdir()) == ["ratios.png", "signal.png"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"loss": 2.0, "ratios": {"all": [0.1, 0.2, 0.3]}}] * 2,
         "the run has 2 finite samples of its gradients, 10 are needed"),
        ([{"loss": 2.0, "ratios": {"all": [0.1, 0.2, 0.3]}}] * 20 + [{"loss": 8.0}], "the run diverged"),
    ],
)  # fmt: skip
def test_a_short_or_diverged_run_recommends_nothing(run, capsys, rows, reason):
    write_metrics(run, [{"step": i, "epoch": i / 4, **row} for i, row in enumerate(rows)])
    assert main(["diagnose", "run", "--batch-size", "4", "--out", "plots"]) == 0
    out = capsys.readouterr().out
    assert f"\nno λ is recommended: {reason}\n" in out
    assert "would clip 10 %" not in out


def test_predictions_that_pooling_invalidates_have_a_note(folder, capsys):
    note = "the predictions assume that average pooling on the shortcuts keeps the variance"
    for name, pooled in (("nf_resnet_nano", True), ("resnet_nano", False)):
        assert main(["diagnose", name, "--batch-size", "2"]) == 0
        assert (note in capsys.readouterr().out) == pooled


def test_json_contains_every_number_and_draws_only_with_out(run, capsys):
    assert main(["diagnose", "run/model", SOURCE, "--batch-size", "4", "--image-size", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["what"] == f"run/model, 4 images of {SOURCE} at 8 px"
    assert [b["module"] for b in report["signal"]["blocks"]][:2] == ["stages.0.0", "stages.1.0"]
    assert report["dependence"]["train"] == {"output": 0.0, "gradient": 0.0, "leak": 0.0, "guilty": []}
    assert report["gradients"]["layers"][-2]["name"] == "head.weight"
    assert report["gradients"]["recommended"] > 0
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_networks_of_other_libraries(folder, capsys):
    pytest.importorskip("torchvision")
    assert (
        main(["diagnose", "torchvision:resnet18", "--batch-size", "2", "--image-size", "32", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [b["module"] for b in report["signal"]["blocks"]][:2] == ["layer1.0", "layer1.1"]
    assert report["dependence"]["train"]["guilty"][0] == "bn1"
    assert report["dependence"]["eval"]["guilty"] == []
    assert [x["name"] for x in report["gradients"]["layers"] if x["exempt"]] == ["fc.weight"]
    assert main(["diagnose", "torchvision:squeezenet1_1", "--batch-size", "2", "--image-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "SqueezeNet has no residual block: " in out
    assert out.endswith("\nplots: diagnose-torchvision-squeezenet1_1/ratios.png\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "nf_resnet_nanno",
            "unknown model 'nf_resnet_nanno'. Did you mean 'nf_resnet_nano'? All names: normfree list models. Also "
            "allowed: a run or model folder, timm:NAME or torchvision:NAME.",
        ),
        (
            "torchvision:resnt18",
            "torchvision has no network 'resnt18'. Did you mean 'resnet18'? Allowed: the names that "
            "torchvision.models.list_models(torchvision.models) returns.",
        ),
        (
            "nf_resnet_nano --batch-size 1",
            "--batch-size is 1. Allowed: 2 or more, to compare an image in different batches. Fix: --batch-size 16.",
        ),
        (
            "nf_resnet_nano --image-size -1",
            "--image-size is -1. Allowed: pixels, or 0 for the network's own size.",
        ),
        (
            f"nf_resnet_nano {SOURCE} --batch-size 7",
            f"--batch-size is 7. Allowed: at most 6, the number of images of {SOURCE}. Fix: --batch-size 6.",
        ),
        (
            "run synthetic:classes=4,size=16,train=8,val=8",
            "synthetic:classes=4,size=16,train=8,val=8 has the classes 'frame', which the model does not have. "
            "Allowed: the model's classes, 'disk', 'ring', 'square'. Fix: rename the class folders, or remove them.",
        ),
    ],
)
def test_invalid_arguments(run, line, message, capsys):
    line = line if "--batch-size" in line else f"{line} --batch-size 4"
    assert main(["diagnose", *shlex.split(line)]) == 2
    assert capsys.readouterr().err == f"normfree: {message}\n"
