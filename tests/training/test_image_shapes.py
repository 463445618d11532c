"""Rectangular and gray images from training to the exported file, and orientation and letterbox in a run."""

import io
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from normfree import evaluate, export, from_pretrained, open_source, predict
from normfree.data.transforms.normalize import normalize
from normfree.onnx_net import open_onnx
from normfree.preprocessing import Preprocessing
from normfree.training import loop
from normfree.training.config import Config, channels_of, size_of
from normfree.training.config_io import load_config, with_overrides
from normfree.training.resolve import resolve

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=40,train=24,val=6 --model nf_resnet_nano --input.batch_size 8 --input.workers 0 "
    "--length 3st --optim.warmup 1st --augment.mixup 0.2 --augment.cutmix 1.0 --device cpu"
)


def run(out: Path, *flags: str) -> Path:
    loop.train(with_overrides(Config(), [*FLAGS, *flags]), out, console=Console(file=io.StringIO()))
    return out


@pytest.fixture(scope="module")
def spectrograms(tmp_path_factory) -> Path:
    """A run on gray images of 24 x 40 pixels, with micro-batches chosen by the memory probe."""
    return run(
        tmp_path_factory.mktemp("runs") / "run",
        "--input.image_size",
        "1x24x40",
        "--input.micro_batch",
        "auto",
    )


def test_the_model_of_a_run_has_its_channels_and_size(spectrograms):
    model = from_pretrained(spectrograms)
    assert model.net.in_channels == 1
    assert model.preprocessing.shape == (1, 24, 40)
    assert model.preprocessing.crop == "squash"
    config = load_config(spectrograms / "config.toml")
    assert (config.input.image_size, config.input.eval_size) == ("1x24x40", "24x40")
    about = json.loads((spectrograms / "model/config.json").read_text())
    assert about["pretrained_cfg"]["input_size"] == [1, 24, 40]
    assert Preprocessing.from_config(about["pretrained_cfg"]).shape == (1, 24, 40)


def test_the_model_scores_predicts_and_exports_alike(spectrograms, tmp_path):
    model = from_pretrained(spectrograms)
    score = evaluate(model.net, open_source(FLAGS[1]).val, preprocessing=model.preprocessing, device="cpu")
    results = json.loads((spectrograms / "results.json").read_text())
    assert score.loss == pytest.approx(results["average"]["loss"], rel=1e-5)
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "gray.png")
    (prediction,) = predict(model, [tmp_path / "gray.png"], top=3, device="cpu")
    inputs = normalize(
        torch.from_numpy(pixels)[None, None], mean=model.preprocessing.mean, std=model.preprocessing.std
    )
    expected = model.probabilities(model.net(inputs)).detach()[0]
    found = dict(zip(prediction.classes, prediction.probabilities, strict=True))
    assert [found[c] for c in model.classes] == pytest.approx(expected.tolist(), abs=1e-6)
    pytest.importorskip("onnx")
    export(model, tmp_path / "m.onnx")
    net, metadata = open_onnx(tmp_path / "m.onnx")
    assert metadata["preprocessing"]["image_size"] == [24, 40]
    torch.testing.assert_close(net(inputs), model.net(inputs).detach(), atol=1e-5, rtol=1e-4)
    (again,) = predict(from_pretrained(tmp_path / "m.onnx"), [tmp_path / "gray.png"], top=3, device="cpu")
    assert again.classes == prediction.classes


def test_fine_tuning_keeps_channels_and_size(spectrograms):
    flags = ["--weights", str(spectrograms), "--model", "auto"]
    config = resolve(with_overrides(Config(), flags)).config
    assert (config.input.image_size, config.input.eval_size) == ("1x24x40", "24x40")
    config = resolve(with_overrides(Config(), [*flags, "--input.image_size", "1x32x32"])).config
    assert (size_of(config.input.image_size), channels_of(config.input.image_size)) == (32, 1)
    assert config.input.eval_size == 32


@pytest.mark.parametrize("mix", ["batch", "fresh"])
def test_gray_images_are_mixed_and_augmented(tmp_path, mix):
    out = run(tmp_path / "run", "--input.image_size", "1x16x16", "--augment.mix_with", mix,
              "--augment.randaugment", "2x3", "--augment.orientation", "quarter_turns")  # fmt: skip
    assert from_pretrained(out).net.in_channels == 1


def test_letterbox_is_in_training_and_in_the_model(tmp_path):
    out = run(tmp_path / "run", "--input.image_size", "24x48", "--input.eval_crop", "letterbox",
              "--augment.orientation", "vertical_flip")  # fmt: skip
    pre = from_pretrained(out).preprocessing
    assert (pre.crop, pre.image_size) == ("letterbox", (24, 48))


def test_quarter_turns_need_squares(tmp_path):
    with pytest.raises(ValueError, match=r"quarter_turns' with images of 16 x 24 pixels\. Allowed: square"):
        run(tmp_path / "run", "--input.image_size", "16x24", "--augment.orientation", "quarter_turns")
