from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.transforms.train import resize, train_transform

SHAPES = [(375, 500), (300, 41), (33, 480), (17, 19), (224, 224), (1, 1), (600, 5)]


def photo(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    noise = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(noise) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("name", "limit"), [("bilinear", 1), ("bicubic", 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_resize_is_pillows_across_and_then_down(name: str, limit: int, shape: tuple[int, int]) -> None:
    # Each pass rounds, so two may differ by 2; bicubic passes also overshoot and clip, so their order matters.
    pixels, mode = photo(*shape), Image.Resampling[name.upper()]
    wanted = Image.fromarray(pixels).resize((64, shape[0]), mode).resize((64, 64), mode)
    error = np.abs(
        resize(pixels, 64, 64, interpolation=name).permute(1, 2, 0).numpy().astype(int) - np.asarray(wanted)
    )
    assert error.max() <= limit
    assert (error > 0).mean() < 0.05
    assert (error > 1).mean() < 0.001


def test_resize_is_antialiased() -> None:
    board = np.indices((128, 128)).sum(0) % 2 * 255  # at half the size each pixel sees as much black as white
    pixels = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    for name in ("bilinear", "bicubic"):
        found = resize(pixels, 32, 32, interpolation=name)[:, 2:-2, 2:-2].int()
        assert (found - 127).abs().max() <= 3


def test_a_part_of_a_read_only_array_gives_what_a_copy_gives() -> None:
    pixels = photo(90, 110)
    pixels.setflags(write=False)
    part = pixels[10:70, 20:90]
    assert torch.equal(
        resize(part, 24, 24, interpolation="bicubic"), resize(part.copy(), 24, 24, interpolation="bicubic")
    )


def torchvisions(
    policy: list[object], interpolation: v2.InterpolationMode
) -> Callable[[Image.Image], Tensor]:
    steps = [v2.RandomResizedCrop(48, interpolation=interpolation), v2.RandomHorizontalFlip(), *policy]
    return v2.Compose([*steps, v2.PILToTensor()])


def test_crops_and_flips_are_those_that_torchvision_draws() -> None:
    image = Image.fromarray(photo(120, 160))
    ours, theirs = (
        train_transform(image_size=48, interpolation="bilinear"),
        torchvisions([], v2.InterpolationMode.BILINEAR),
    )
    for seed in range(40):
        made = []
        for transform in (ours, theirs):
            torch.manual_seed(seed)
            made.append(transform(image).int())
        assert (made[0] - made[1]).abs().max() <= 1
        assert torch.equal(torch.rand(1), _after(theirs, image, seed))  # as many numbers drawn, too


def _after(transform: Callable[[Image.Image], Tensor], image: Image.Image, seed: int) -> Tensor:
    torch.manual_seed(seed)
    transform(image)
    return torch.rand(1)


@pytest.mark.parametrize("randaugment", ["off", "trivial", "4x5", "tv:2x9"])
def test_arrays_and_images_give_the_same(randaugment: str) -> None:
    transform = train_transform(image_size=32, randaugment=randaugment)
    pixels = photo(50, 70)
    for seed in range(10):
        made = []
        for image in (pixels, Image.fromarray(pixels)):
            torch.manual_seed(seed)
            made.append(transform(image))
        assert torch.equal(*made)
        assert (made[0].shape, made[0].dtype, made[0].is_contiguous()) == ((3, 32, 32), torch.uint8, True)


class Plain:
    """The same images without `pixels`."""

    def __init__(self, source: ArraySource) -> None:
        self.classes, self.label, self.image, self.name = (
            source.classes,
            source.label,
            source.image,
            source.name,
        )
        self.count = len(source)

    def __len__(self) -> int:
        return self.count


def test_batches_do_not_depend_on_how_a_source_hands_over_its_images_nor_on_threads_or_workers() -> None:
    images = np.stack([np.roll(photo(40, 30), i, axis=0) for i in range(8)])
    source = ArraySource(images, [i % 2 for i in range(8)], classes="ab", names="abcdefgh")

    def batches(data: object, workers: int = 0) -> list[Tensor]:
        stream = train_batches(
            data,
            train_transform(image_size=16),
            batch_size=4,
            seed=1,
            num_steps=4,
            workers=workers,  # type: ignore[arg-type]
        )
        return [batch.images for batch in stream]

    wanted, threads = batches(source), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        others = [batches(source), batches(Plain(source)), batches(source, 2), batches(Plain(source), 2)]
    finally:
        torch.set_num_threads(threads)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
