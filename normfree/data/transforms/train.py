"""Pictures to pixels, one by one.

The geometric and colour operations are torchvision's (transforms v2); their randomness is torch's default CPU
generator, which the loader seeds per sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from normfree.data.torchvision_import import torchvision_module
from normfree.data.transforms.normalize import INTERPOLATIONS, check_size, check_word
from normfree.data.transforms.randaugment import rand_augment

if TYPE_CHECKING:
    from PIL.Image import Image

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = (128, 128, 128)  # what RandAugment uncovers at the edge; reference code, autoaugment.py


def train_transform(
    *,
    image_size: int,
    crop_min: float = 0.08,
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    randaugment: str = "off",
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = GREY,
) -> Callable[[Image], Tensor]:
    """RGB picture -> uint8 tensor, 3 S S: random crop and resize, flip, RandAugment.

    The crop takes between `crop_min` and 1 of the picture's area, at an aspect ratio within `crop_ratio`;
    `flip` is the probability of a mirror image. These defaults are the reference code's (dataset.py).
    `randaugment` is "off", "trivial" (one operation of random strength: TrivialAugment, arXiv 2103.10158),
    "LxM": L operations in a row at magnitude M, as DeepMind ran it, where 10 is the full range (`rand_augment`), or
    "tv:LxM": torchvision's (arXiv 1909.13719), where 30 is, with `fill` (0-255) at uncovered edges. Resizing is
    antialiased, by torch's kernels for uint8 (`resize`). Raises `ValueError` for values that mean nothing.
    """
    check_size(image_size)
    if not 0 < crop_min <= 1:
        raise ValueError(
            f"crop_min={crop_min}. Allowed: above 0, up to 1 (the whole area). Fix: crop_min=0.08"
        )
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ValueError(
            f"crop_ratio={crop_ratio}. Allowed: two positive numbers, the smaller first. Fix: crop_ratio=(0.75, 1.333)"
        )
    if not 0 <= flip <= 1:
        raise ValueError(f"flip={flip}. Allowed: a probability, 0 to 1. Fix: flip=0.5")
    check_word("interpolation", interpolation, INTERPOLATIONS)
    policy = _policy(randaugment, fill)
    if interpolation != "nearest":
        return TrainTransform(
            image_size,
            crop_min=crop_min,
            crop_ratio=crop_ratio,
            flip=flip,
            interpolation=interpolation,
            policy=policy,
        )
    v2 = torchvision_module("transforms.v2")
    steps = [
        v2.RandomResizedCrop(
            image_size,
            scale=(crop_min, 1.0),
            ratio=tuple(crop_ratio),
            interpolation=v2.InterpolationMode.NEAREST,
        ),
        v2.RandomHorizontalFlip(flip),
        *policy,
        v2.PILToTensor(),
    ]
    transform: Callable[[Image], Tensor] = v2.Compose(steps)
    return transform


def _policy(text: str, fill: tuple[int, int, int]) -> list[Any]:
    if text == "off":
        return []
    if text == "trivial":
        return [torchvision_module("transforms.v2").TrivialAugmentWide(fill=list(fill))]
    match = re.fullmatch(r"(tv:)?([1-9]\d?)x(\d\d?)", text)
    if match is None or int(match[3]) > 30:
        raise ValueError(
            f"randaugment={text!r}. Allowed: 'off', 'trivial', '<layers>x<magnitude>' (DeepMind's operations, 10 is "
            "their full range), 'tv:<layers>x<magnitude>' (torchvision's, 30 is); magnitudes up to 30. "
            "Fix: randaugment='4x5'"
        )
    layers, magnitude = int(match[2]), int(match[3])
    if match[1] is None:
        return [ReferenceRandAugment(layers, magnitude)]
    v2 = torchvision_module("transforms.v2")
    return [v2.RandAugment(num_ops=layers, magnitude=magnitude, fill=list(fill))]


class AfterMixing:
    """The policy of a `randaugment` word for pictures that are mixed first; see `FreshPairs.after`."""

    def __init__(self, text: str, fill: tuple[int, int, int] = GREY) -> None:
        self.policy = _policy(text, fill)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 H W 3 -> the same, augmented; draws come from `rng` by way of torch's default generator."""
        from PIL import Image as pillow

        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        image = pillow.fromarray(pixels)
        for step in self.policy:
            image = step(image)
        return np.asarray(image)


class ReferenceRandAugment:
    """RGB picture -> RGB picture, by `rand_augment`; its draws come from torch's default generator."""

    def __init__(self, layers: int, magnitude: float) -> None:
        self.layers, self.magnitude = layers, magnitude

    def __call__(self, image: Image) -> Image:
        from PIL import Image as pillow

        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return pillow.fromarray(
            rand_augment(np.asarray(image), layers=self.layers, magnitude=self.magnitude, rng=rng)
        )


class TrainTransform:
    """RGB picture (uint8 H W 3, or a PIL image) -> uint8 tensor, 3 S S; made by `train_transform`.

    Random crop and resize, flip, and `policy`, a list of operations on PIL images. The crop's place and the flip are
    drawn as torchvision's RandomResizedCrop and RandomHorizontalFlip draw them.
    """

    takes_arrays = True  # so the loader hands over arrays where a source has them

    def __init__(
        self,
        image_size: int,
        *,
        crop_min: float,
        crop_ratio: tuple[float, float],
        flip: float,
        interpolation: str,
        policy: Sequence[Any],
    ) -> None:
        v2 = torchvision_module("transforms.v2")
        self.image_size, self.interpolation = image_size, interpolation
        self._crop = v2.RandomResizedCrop(image_size, scale=(crop_min, 1.0), ratio=tuple(crop_ratio))
        self._flip = flip
        self._policy = v2.Compose([v2.ToPILImage(), *policy, v2.PILToTensor()]) if policy else None

    def __call__(self, image: Image | np.ndarray) -> Tensor:
        """Draw from torch's default generator and transform one picture."""
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        place = self._crop.make_params([torch.empty(1, dtype=torch.uint8).expand(3, height, width)])
        top, left, tall, wide = (place[word] for word in ("top", "left", "height", "width"))
        if isinstance(image, np.ndarray):
            pixels = image[top : top + tall, left : left + wide]
        else:
            pixels = np.asarray(image.crop((left, top, left + wide, top + tall)))
        scaled = resize(pixels, self.image_size, self.image_size, interpolation=self.interpolation)
        if torch.rand(1) < self._flip:
            scaled = scaled.flip(-1)
        made: Tensor = scaled if self._policy is None else self._policy(scaled)
        return made.contiguous()


def resize(pixels: np.ndarray, height: int, width: int, *, interpolation: str) -> Tensor:
    """uint8 H W 3 -> uint8 tensor 3 `height` `width`, antialiased; "bicubic" or "bilinear".

    Equal to Pillow's resize across and then down: within 1 grey level for each pass.
    """
    if not pixels.flags.writeable:  # torch warns of memory that it must not write, though it only reads
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(image, size=(height, width), mode=interpolation, antialias=True)[0]
