"""Tests of RandAugment: every operation equals the reference pixel by pixel, and draws have the right distribution."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.transforms import randaugment as ops
from normfree.data.transforms.train import AfterMixing, train_transform

REFERENCE = dict(np.load(Path(__file__).parents[2] / "reference" / "augment.npz"))
IMAGE = REFERENCE["image"]
CASES = [key for key in REFERENCE if key.startswith("op|") and not key.endswith("args")]
FUNCTIONS = {
    "AutoContrast": ops.autocontrast, "Equalize": ops.equalize, "Invert": ops.invert, "Rotate": ops.rotate,
    "Posterize": ops.posterize, "Solarize": ops.solarize, "Color": ops.color, "Contrast": ops.contrast,
    "Brightness": ops.brightness, "Sharpness": ops.sharpness, "ShearX": ops.shear_x, "ShearY": ops.shear_y,
    "TranslateX": ops.translate_x, "TranslateY": ops.translate_y, "SolarizeAdd": ops.solarize_add,
}  # fmt: skip
WHOLE = ("Posterize", "Solarize", "SolarizeAdd")


class Fixed:
    """A generator that returns the given numbers."""

    def __init__(self, uniform):
        self.uniform = uniform

    def random(self):
        return self.uniform


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_of_every_operation(case):
    name, level, *negated = case.split("|")[1:]
    numbers = [int(v) if name in WHOLE else float(v) for v in REFERENCE[f"{case}|args"]]
    before = IMAGE.copy()
    assert np.array_equal(FUNCTIONS[name](IMAGE, *numbers), REFERENCE[case])
    assert np.array_equal(IMAGE, before)
    # The magnitude gives that number: 5, 10 and 15 are M5, M10 and M15.
    drawn = ops.apply(name, IMAGE, magnitude=float(level[1:]), rng=Fixed(0.9 if negated else 0.1))
    assert np.array_equal(drawn, REFERENCE[case])


def test_no_operation_was_left_out():
    assert {case.split("|")[1] for case in CASES} | {"Cutout"} == set(ops.OPERATIONS)
    assert len(ops.OPERATIONS) == 16


def test_cutout_is_a_gray_square_cut_at_the_border():
    out = ops.cutout(IMAGE, 5, (3, 20))
    painted = (out == ops.FILL).all(axis=2) & (IMAGE != ops.FILL).any(axis=2)
    rows, columns = np.nonzero(painted)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 7, 15, 24)
    assert np.array_equal(out[8:], IMAGE[8:])


def test_operations_are_drawn_evenly_and_always_applied(monkeypatch):
    seen = Counter()
    monkeypatch.setattr(ops, "apply", lambda name, image, **_: seen.update([name]) or image)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ops.rand_augment(IMAGE, layers=4, magnitude=5, rng=rng)
    assert sum(seen.values()) == 4000
    expected = 4000 / 16
    chi_squared = sum((n - expected) ** 2 / expected for n in seen.values())
    assert len(seen) == 16
    assert chi_squared < 37.7  # 15 degrees of freedom, one in a thousand


def test_the_name_is_this_and_the_generator_decides():
    image = Image.fromarray(IMAGE)
    transform = train_transform(
        image_size=48, crop_min=1.0, crop_ratio=(1.0, 1.0), flip=0.0, randaugment="2x10"
    )
    torch.manual_seed(3)
    first = transform(image)
    torch.manual_seed(3)
    assert torch.equal(transform(image), first)
    assert not torch.equal(transform(image), first)
    after = AfterMixing("2x10")
    one, two = (after(IMAGE, np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one, two)
    assert one.shape == IMAGE.shape
