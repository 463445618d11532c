"""The recipe of docs/export.md, and a file with its preprocessing inside, give what `predict` gives."""

import json
import re
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from normfree import create_model, export, from_pretrained, predict
from normfree.data.transforms.normalize import normalize
from normfree.deploy.preprocessed import example_pixels
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES
from normfree.training.resolve import preprocessing, resolve

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SIZES = ("32", "96", "97", "128", "48x80", "1x64", "1x40x72")
CROPS = ("auto", "squash", "resize_crop_32", "crop_resize", "letterbox")


def chosen(size: str, crop: str) -> Preprocessing:
    """Return the preprocessing that training chooses."""
    keys = f"--data synthetic --model nf_resnet_nano --input.image_size {size} --input.eval_crop {crop}"
    config = with_overrides(RECIPES["scratch"](), keys.split())
    return preprocessing(resolve(config, starts=False).config)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the names that the first two blocks of the page define, after running them at 128 px in a new folder."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)[:2]
    assert "image_size=128" in blocks[0]
    assert "def prepare" in blocks[1]
    names: dict[str, Any] = {"folder": tmp_path_factory.mktemp("recipe")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(names["folder"])
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def save_images(folder: Path) -> list[Path]:
    """Write RGB, turned, transparent, gray and 16-bit images; return the files."""
    first, *others = (Image.fromarray(pixels.numpy()) for pixels in example_pixels())
    turned = Image.Exif()
    turned[0x0112] = 6
    first.save(folder / "0.jpg", exif=turned)
    for i, image in enumerate(others, start=1):
        image.save(folder / f"{i}.png")
    clear = others[0].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    others[1].convert("L").save(folder / "gray.png")
    levels = np.asarray(others[2].convert("L")).astype(np.uint16) * 16
    Image.fromarray(levels).save(folder / "twelve-bits.png")
    return sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))


def test_its_probabilities_are_those_of_predict_at_128_px(recipe: dict[str, Any], tmp_path: Path) -> None:
    files = save_images(tmp_path)
    model = from_pretrained(recipe["folder"] / "model.onnx")
    assert model.preprocessing.crop == "resize_crop_32"
    for prediction in predict(model, files, top=3, device="cpu"):
        wanted = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        assert recipe["predict"](prediction.path) == pytest.approx(wanted, abs=1e-5)


def test_training_chooses_what_the_page_says() -> None:
    assert [chosen(size, "auto").crop for size in ("96", "97")] == ["squash", "resize_crop_32"]
    assert RECIPES["imagenet-nf-regnet-b0"]().input.eval_crop == "crop_resize"
    found = chosen("1x40x72", "letterbox")
    assert (found.crop, found.shape, found.antialias) == ("letterbox", (1, 40, 72), True)


@pytest.mark.parametrize(("size", "crop"), product(SIZES, CROPS))
def test_its_inputs_are_those_of_everything_that_training_chooses(
    recipe: dict[str, Any], size: str, crop: str
) -> None:
    check(recipe, chosen(size, crop))


@pytest.mark.parametrize("size", [48, (40, 72)])
@pytest.mark.parametrize(("crop", "crop_pct"), [("squash", 0.9), ("center", 0.875), ("center", 1.0)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_its_inputs_are_those_of_other_weights(
    recipe: dict[str, Any], size: int | tuple[int, int], crop: str, crop_pct: float, interpolation: str
) -> None:
    check(recipe, Preprocessing(size, crop=crop, crop_pct=crop_pct, interpolation=interpolation))


def check(recipe: dict[str, Any], pre: Preprocessing) -> None:
    """Compare the inputs for images of several sizes, with the fields as JSON has them."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(pre).items()}
    for pixels in example_pixels():
        image = Image.fromarray(pixels.numpy())
        wanted = normalize(pre.transform()(image)[None], mean=pre.mean, std=pre.std)
        found = recipe["prepare"](image, fields)
        assert found.shape == (1, *pre.shape)
        np.testing.assert_allclose(found, wanted.numpy(), atol=4e-6)


@pytest.mark.slow
def test_a_gray_network_with_bars_and_twelve_bits(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: predict, the recipe with a file, and a file with its preprocessing inside."""
    files = save_images(tmp_path)
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3, in_channels=1, depths=(1, 1, 1), skip_gain=0.7).eval()
    nn.init.normal_(net.head.weight, std=0.5)
    pre = Preprocessing((40, 72), crop="letterbox", mean=(0.45,), std=(0.225,), pixel_range=4095)
    model = TrainedModel(net, pre, ("a", "b", "c"), sigmoid=True)
    inputs = torch.randn(4, 1, 40, 72)
    export(model, tmp_path / "model.onnx", images=inputs)
    export(model, tmp_path / "whole.onnx", with_preprocessing=True)
    sessions = [
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "whole.onnx")
    ]
    abouts = [json.loads(s.get_modelmeta().custom_metadata_map["normfree"]) for s in sessions]
    table = re.findall(r"^\| (`.*?) \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert set(abouts[0]) == set(abouts[1]) <= set(re.findall(r"`(\w+)`", " ".join(table)))
    assert abouts[0]["sigmoid"] is True
    for prediction in predict(model, files, top=3, device="cpu"):
        wanted = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        for session, about, error in zip(sessions, abouts, (1e-5, 5e-3), strict=True):
            monkeypatch.setitem(recipe, "session", session)
            monkeypatch.setitem(recipe, "about", about)
            assert recipe["predict"](prediction.path) == pytest.approx(wanted, abs=error)
