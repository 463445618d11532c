"""Rectangles, letterbox, orientation and gray: invariances of the transforms."""

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.transforms.evaluate import BAR, EVAL_CROPS, eval_transform
from normfree.data.transforms.normalize import channel_statistics, normalize
from normfree.data.transforms.train import train_transform, with_bars
from normfree.preprocessing import Preprocessing


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(
        0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("crop", EVAL_CROPS)
def test_a_square_is_a_rectangle_of_two_equal_sides(crop):
    for size in ((90, 70), (70, 90), (80, 80)):
        side, pair = (eval_transform(image_size=s, crop=crop)(noise(*size)) for s in (48, (48, 48)))
        assert torch.equal(side, pair)


@pytest.mark.parametrize("crop", EVAL_CROPS)
def test_a_rectangle_transforms_as_its_transpose(crop):
    image = noise(120, 70)
    one = eval_transform(image_size=(40, 64), crop=crop)(image)
    other = eval_transform(image_size=(64, 40), crop=crop)(image.transpose(Image.Transpose.TRANSPOSE))
    assert one.shape == (3, 40, 64)
    # Pillow resizes across and then down, and rounds in between; resize_crop_32 may start a pixel earlier.
    assert (one.float() - other.transpose(1, 2).float()).abs().mean() < 1.5


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (48, 48)])
def test_letterbox_keeps_the_whole_image_in_its_aspect(size):
    height, width = size
    image = noise(100, 50)
    seen = eval_transform(image_size=size, crop="letterbox")(image)
    scale = min(width / 100, height / 50)
    inner = image.resize((round(100 * scale), round(50 * scale)), Image.Resampling.BICUBIC)
    top, left = (height - inner.height) // 2, (width - inner.width) // 2
    expected = np.full((height, width, 3), BAR, dtype=np.uint8)
    expected[top : top + inner.height, left : left + inner.width] = np.asarray(inner)
    assert np.array_equal(seen.permute(1, 2, 0).numpy(), expected)


def test_training_with_letterbox_and_the_whole_area_is_evaluation_with_letterbox():
    image = noise(90, 60)
    options = {"crop_min": 1.0, "crop_ratio": (1.0, 1.0), "flip": 0.0}
    made = train_transform(image_size=(32, 64), letterbox=True, **options)(image)
    seen = eval_transform(image_size=(32, 64), crop="letterbox")(image)
    assert (made.float() - seen.float()).abs().mean() < 2  # bars before resizing, or after
    assert with_bars(np.asarray(image), (32, 64)).shape == (60, 120, 3)
    assert np.array_equal(with_bars(np.asarray(image), (60, 90)), np.asarray(image))


def versions(image: np.ndarray) -> dict[bytes, str]:
    """Return the eight images of a square by the name of their symmetry."""
    turned = {f"turn {k}": np.rot90(image, k) for k in range(4)}
    mirrored = {f"mirror, turn {k}": np.rot90(image[:, ::-1], k) for k in range(4)}
    return {np.ascontiguousarray(v).tobytes(): name for name, v in (turned | mirrored).items()}


@pytest.mark.parametrize(
    ("orientation", "count"), [("upright", 2), ("vertical_flip", 4), ("quarter_turns", 8)]
)
def test_orientations_are_a_group_and_equally_frequent(orientation, count):
    image = noise(16, 16)
    transform = train_transform(image_size=16, crop_min=1.0, crop_ratio=(1, 1), orientation=orientation)
    known = versions(np.asarray(image))
    torch.manual_seed(0)
    drawn = [known[transform(image).permute(1, 2, 0).numpy().tobytes()] for _ in range(800)]
    frequencies = {name: drawn.count(name) / 800 for name in set(drawn)}
    assert len(frequencies) == count
    assert all(abs(f - 1 / count) < 0.06 for f in frequencies.values())


def test_without_an_orientation_nothing_more_is_drawn():
    image, states = noise(40, 30), []
    for orientation in ("upright", "vertical_flip"):
        torch.manual_seed(0)
        train_transform(image_size=16, orientation=orientation)(image)
        states.append(torch.get_rng_state())
    torch.manual_seed(0)
    train_transform(image_size=16)(image)
    assert torch.equal(states[0], torch.get_rng_state())
    assert not torch.equal(states[0], states[1])


def test_rectangular_crops_keep_the_aspect_of_the_result():
    torch.manual_seed(0)
    transform = train_transform(image_size=(32, 96), crop_min=0.2)
    boxes = [transform._crop.make_params([torch.empty(3, 300, 300)]) for _ in range(200)]
    aspects = [box["width"] / box["height"] for box in boxes]
    assert min(aspects) > 3 * 3 / 4 * 0.97
    assert max(aspects) < 3 * 4 / 3 * 1.03


def test_gray_is_the_luma_of_pillow_and_of_gray_images_themselves():
    mean, std = channel_statistics(1)
    assert (mean, std) == ((0.449,), (0.226,))
    image = noise(20, 20)
    rgb = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    gray = torch.from_numpy(np.array(image.convert("L")))[None, None]
    difference = normalize(rgb, mean=mean, std=std) - normalize(gray, mean=mean, std=std)
    assert difference.abs().max() * 255 * std[0] < 0.51  # Pillow rounds
    same = normalize(gray.expand(1, 3, 20, 20), mean=mean, std=std)
    torch.testing.assert_close(same, normalize(gray, mean=mean, std=std))


def test_the_config_of_a_rectangle_is_read_back():
    pre = Preprocessing((128, 313), crop="letterbox", mean=(0.449,), std=(0.226,))
    assert Preprocessing.from_config(pre.to_config()) == pre
    assert pre.to_config()["crop_mode"] == "border"  # timm's name
