"""Tests of the pixel arithmetic against outputs of the reference code (tests/reference/augment.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.transforms.evaluate import eval_transform
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.resample import resize_bicubic

REFERENCE = dict(np.load(Path(__file__).parents[2] / "reference" / "augment.npz"))


@pytest.mark.parametrize("size", [48, 64])
@pytest.mark.parametrize("crop", ["resize_crop_32", "crop_resize"])
def test_evaluation_without_antialiasing_is_the_references(crop, size):
    image = Image.fromarray(REFERENCE["eval|image"])
    wanted = torch.from_numpy(REFERENCE[f"eval|{crop}|{size}"]).permute(2, 0, 1)
    exact = eval_transform(image_size=size, crop=crop, antialias=False)(image)
    assert exact.dtype == torch.float32
    # gray levels; TensorFlow takes the filter's weights from a table of 1024 entries
    assert float((exact - wanted).abs().max()) < 0.05
    ours = eval_transform(image_size=size, crop=crop)(image)
    assert float((ours - wanted).abs().max()) > 2  # so the name matters


def test_resizing_to_the_same_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(resize_bicubic(pixels, 9, 7), pixels)
    ramp = np.broadcast_to(np.arange(40.0)[:, None, None], (40, 4, 1))
    double = resize_bicubic(ramp, 80, 4)[8:-8, 0, 0]  # cubic interpolation keeps a straight line straight
    np.testing.assert_allclose(np.diff(double), 0.5, atol=1e-4)


def test_without_antialiasing_only_the_references_two_crops_exist():
    said = (
        r"^antialias=False with crop='squash', interpolation='bicubic'\. Allowed: bicubic with resize_crop_32 or "
        r"crop_resize\. Fix: antialias=True\.$"
    )
    with pytest.raises(ValueError, match=said):
        eval_transform(image_size=8, crop="squash", antialias=False)


def test_normalize_takes_gray_levels_of_either_type():
    wanted = torch.from_numpy(REFERENCE["norm|out"]).permute(2, 0, 1)
    images = torch.from_numpy(REFERENCE["norm|in"]).permute(2, 0, 1)[None]
    torch.testing.assert_close(normalize(images)[0], wanted, rtol=0, atol=1e-6)
    whole = images.round().to(torch.uint8)
    assert torch.equal(normalize(whole), normalize(whole.float()))
