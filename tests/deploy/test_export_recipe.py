"""The recipe of docs/export.md prepares images as `predict` does."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from normfree import from_pretrained, predict
from normfree.data.transforms.normalize import normalize
from normfree.deploy.preprocessed import example_pixels
from normfree.preprocessing import Preprocessing

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


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


def test_its_probabilities_are_those_of_predict_at_128_px(recipe: dict[str, Any]) -> None:
    folder: Path = recipe["folder"]
    for i, pixels in enumerate(example_pixels()):
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    model = from_pretrained(folder / "model.onnx")
    assert model.preprocessing.crop == "resize_crop_32"
    for prediction in predict(model, sorted(folder.glob("[0-9].png")), top=3, device="cpu"):
        inputs = recipe["prepare"](Image.open(prediction.path), recipe["about"]["preprocessing"])
        (logits,) = recipe["session"].run(["logits"], {"images": inputs})
        exponents = np.exp(logits[0] - logits[0].max())
        found = dict(zip(recipe["about"]["classes"], exponents / exponents.sum(), strict=True))
        wanted = dict(zip(prediction.classes, prediction.probabilities, strict=True))
        assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(("crop", "crop_pct"), [("squash", 1.0), ("squash", 0.9), ("resize_crop_32", 1.0),
                                                ("crop_resize", 1.0), ("center", 0.875), ("center", 1.0)])  # fmt: skip
@pytest.mark.parametrize("size", [48, 128])
def test_its_inputs_are_those_of_every_crop(
    recipe: dict[str, Any], crop: str, crop_pct: float, size: int
) -> None:
    pre = Preprocessing(size, crop=crop, crop_pct=crop_pct)
    fields = {"image_size": size, "crop": crop, "crop_pct": crop_pct, "interpolation": "bicubic",
              "mean": list(pre.mean), "std": list(pre.std)}  # fmt: skip
    for pixels in example_pixels():
        image = Image.fromarray(pixels.numpy())
        wanted = normalize(pre.transform()(image)[None], mean=pre.mean, std=pre.std)
        np.testing.assert_allclose(recipe["prepare"](image, fields), wanted.numpy(), atol=2e-6)
