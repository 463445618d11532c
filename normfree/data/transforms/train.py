"""Augmentation of single images for training.

RandomResizedCrop, the flip and torchvision's policies draw from PyTorch's default CPU generator, which the loader seeds
per sample.
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
from normfree.data.transforms.evaluate import BAR
from normfree.data.transforms.normalize import INTERPOLATIONS, check_choice, check_size, height_and_width
from normfree.data.transforms.randaugment import rand_augment
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATIONS = ("upright", "vertical_flip", "quarter_turns")
GRAY = (128, 128, 128)  # what RandAugment uncovers at the edge; reference code, autoaugment.py


def train_transform(
    *,
    image_size: int | tuple[int, int],
    crop_min: float = 0.08,
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    orientation: str = "upright",
    letterbox: bool = False,
    randaugment: str = "off",
    interpolation: str = "bicubic",
    fill: tuple[int, int, int] = GRAY,
) -> Callable[[Image], Tensor]:
    """Return a random map from an RGB image to a uint8 tensor, 3 H W: random crop and resize, flip, RandAugment.

    Resizing is antialiased, by PyTorch's resize of uint8 images (`resize`). The defaults are those of the reference
    code (dataset.py).

    Args:
        image_size: Side of the result in pixels, or its height and width.
        crop_min: Smallest share of the image's area that a crop takes; the largest is 1.
        crop_ratio: Smallest and largest aspect ratio of the crop, relative to that of the result.
        flip: Probability of mirroring the image left to right.
        orientation: "upright"; "vertical_flip" also mirrors half of the images top to bottom; "quarter_turns" also
            turns them by 0, 90, 180 or 270 degrees, for images without an up and down, such as those of microscopes.
        letterbox: First add gray bars, so that the image has the aspect of the result; the crop may then be all of it.
        randaugment: "off"; "trivial" for one operation of random strength (TrivialAugment, arXiv 2103.10158); "LxM"
            for L operations in a row at magnitude M of 10, as DeepMind ran it (`rand_augment`); or "tv:LxM" for
            torchvision's RandAugment (arXiv 1909.13719) at magnitude M of 30; "simclr:S" for the colors of SimCLR at
            strength S (`simclr_colors`).
        interpolation: "bicubic", "bilinear" or "nearest".
        fill: Color 0 to 255 that torchvision's operations paint at uncovered edges.

    Raises:
        ValueError: An option is unknown or out of range.
    """
    height, width = height_and_width(image_size)
    _check_options((height, width), crop_min=crop_min, crop_ratio=crop_ratio, flip=flip)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    check_choice("orientation", orientation, ORIENTATIONS)
    if orientation == "quarter_turns" and height != width:
        given = f"orientation='quarter_turns' with images of {height} x {width} pixels"
        raise ValueError(problem(given, allowed="square images", fix="orientation='vertical_flip'"))
    if height != width:
        crop_ratio = (crop_ratio[0] * width / height, crop_ratio[1] * width / height)
    policy = _policy(randaugment, fill)
    if interpolation != "nearest":
        return TrainTransform(
            (height, width),
            crop_min=crop_min,
            crop_ratio=crop_ratio,
            flip=flip,
            orientation=orientation,
            letterbox=letterbox,
            interpolation=interpolation,
            policy=policy,
        )
    if letterbox or orientation != "upright":
        given = f"interpolation='nearest' with letterbox={letterbox}, orientation={orientation!r}"
        raise ValueError(
            problem(given, allowed="letterbox=False, orientation='upright'", fix="interpolation='bicubic'")
        )
    v2 = torchvision_module("transforms.v2")
    steps = [
        v2.RandomResizedCrop(
            (height, width),
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


def _check_options(
    image_size: tuple[int, int], *, crop_min: float, crop_ratio: tuple[float, float], flip: float
) -> None:
    """Raise `ValueError` for a number out of range."""
    check_size(image_size)
    if not 0 < crop_min <= 1:
        raise ValueError(
            problem(f"crop_min={crop_min}", allowed="above 0, up to 1 (the whole area)", fix="crop_min=0.08")
        )
    if not 0 < crop_ratio[0] <= crop_ratio[1]:
        raise ValueError(
            problem(
                f"crop_ratio={crop_ratio}",
                allowed="two positive numbers, the smaller first",
                fix="crop_ratio=(0.75, 1.333)",
            )
        )
    if not 0 <= flip <= 1:
        raise ValueError(problem(f"flip={flip}", allowed="a probability, 0 to 1", fix="flip=0.5"))


def _policy(text: str, fill: tuple[int, int, int]) -> list[Any]:
    """Return the operations on PIL images that a `randaugment` option names."""
    if text == "off":
        return []
    if text == "trivial":
        return [torchvision_module("transforms.v2").TrivialAugmentWide(fill=list(fill))]
    if text.startswith("simclr:"):
        return simclr_colors(text)
    match = re.fullmatch(r"(tv:)?([1-9]\d?)x(\d\d?)", text)
    if match is None or int(match[3]) > 30:
        raise ValueError(
            problem(
                f"randaugment={text!r}",
                allowed="'off', 'trivial', '<layers>x<magnitude>' (DeepMind's operations, 10 is their full range), "
                "'tv:<layers>x<magnitude>' (torchvision's, 30 is); magnitudes up to 30; 'simclr:<strength>'",
                fix="randaugment='4x5'",
            )
        )
    layers, magnitude = int(match[2]), int(match[3])
    if match[1] is None:
        return [ReferenceRandAugment(layers, magnitude)]
    v2 = torchvision_module("transforms.v2")
    return [v2.RandAugment(num_ops=layers, magnitude=magnitude, fill=list(fill))]


def simclr_colors(text: str) -> list[Any]:
    """Return the color operations of SimCLR on PIL images: jitter with probability 0.8, and gray with 0.2.

    Args:
        text: "simclr:S"; brightness, contrast and saturation change by up to 0.8 S, the hue by up to 0.2 S.

    Raises:
        ValueError: S is not a number above 0, up to 2.5, where the hue takes all values.

    Source: Chen et al. 2020 (arXiv 2002.05709), appendix A. Its blur, for images of 224 px, is left out, as in its
    experiments on CIFAR-10 (appendix B.9), where S is 0.5.
    """
    try:
        strength = float(text.removeprefix("simclr:"))
    except ValueError:
        strength = -1.0
    if not 0 < strength <= 2.5:
        raise ValueError(
            problem(f"randaugment={text!r}", allowed="'simclr:S', 0 < S <= 2.5", fix="randaugment='simclr:1'")
        )
    v2 = torchvision_module("transforms.v2")
    change = 0.8 * strength
    jitter = v2.ColorJitter(change, change, change, 0.2 * strength)
    return [v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(p=0.2)]


class AfterMixing:
    """The policy of a `randaugment` option for images that are mixed first; see `FreshPairs.after`."""

    def __init__(self, text: str, fill: tuple[int, int, int] = GRAY) -> None:
        self.policy = _policy(text, fill)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the augmented image, uint8 H W 3; `rng` seeds PyTorch's default generator, which makes the draws."""
        from PIL import Image as pillow

        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        image = pillow.fromarray(pixels)
        for step in self.policy:
            image = step(image)
        return np.asarray(image)


class ReferenceRandAugment:
    """`rand_augment` as a map from RGB image to RGB image, seeded from PyTorch's default generator."""

    def __init__(self, layers: int, magnitude: float) -> None:
        self.layers, self.magnitude = layers, magnitude

    def __call__(self, image: Image) -> Image:
        from PIL import Image as pillow

        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        return pillow.fromarray(
            rand_augment(np.asarray(image), layers=self.layers, magnitude=self.magnitude, rng=rng)
        )


class TrainTransform:
    """A random map from an RGB image (uint8 H W 3, or PIL) to a uint8 tensor, 3 H W; made by `train_transform`.

    It crops and resizes, flips, and applies `policy`, a list of operations on PIL images. Position and size of the crop
    and the flip are drawn as by torchvision's RandomResizedCrop and RandomHorizontalFlip.
    """

    takes_arrays = True  # the loader passes arrays if the source has them

    def __init__(
        self,
        image_size: tuple[int, int],
        *,
        crop_min: float,
        crop_ratio: tuple[float, float],
        flip: float,
        orientation: str = "upright",
        letterbox: bool = False,
        interpolation: str,
        policy: Sequence[Any],
    ) -> None:
        v2 = torchvision_module("transforms.v2")
        self.image_size, self.interpolation = image_size, interpolation
        self._orientation, self._letterbox = orientation, letterbox
        self._crop = v2.RandomResizedCrop(image_size, scale=(crop_min, 1.0), ratio=tuple(crop_ratio))
        self._flip = flip
        self._policy = v2.Compose([v2.ToPILImage(), *policy, v2.PILToTensor()]) if policy else None

    def __call__(self, image: Image | np.ndarray) -> Tensor:
        """Transform one image, drawing from PyTorch's default generator."""
        if self._letterbox:
            image = with_bars(np.asarray(image), self.image_size)
        height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        box = self._crop.make_params([torch.empty(1, dtype=torch.uint8).expand(3, height, width)])
        top, left, tall, wide = (box[name] for name in ("top", "left", "height", "width"))
        if isinstance(image, np.ndarray):
            pixels = image[top : top + tall, left : left + wide]
        else:
            pixels = np.asarray(image.crop((left, top, left + wide, top + tall)))
        scaled = resize(pixels, *self.image_size, interpolation=self.interpolation)
        if torch.rand(1) < self._flip:
            scaled = scaled.flip(-1)
        if self._orientation != "upright":
            if torch.rand(1) < 0.5:
                scaled = scaled.flip(-2)
            if self._orientation == "quarter_turns":
                scaled = scaled.rot90(int(torch.randint(4, ())), (-2, -1))
        made: Tensor = scaled if self._policy is None else self._policy(scaled)
        return made.contiguous()


def with_bars(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image H W 3 in the middle of a gray one with the aspect of `size`, (height, width)."""
    height, width = pixels.shape[:2]
    tall = max(height, round(width * size[0] / size[1]))
    wide = max(width, round(height * size[1] / size[0]))
    framed = np.empty((tall, wide, 3), dtype=np.uint8)
    framed[:] = BAR
    top, left = (tall - height) // 2, (wide - width) // 2
    framed[top : top + height, left : left + width] = pixels
    return framed


def resize(pixels: np.ndarray, height: int, width: int, *, interpolation: str) -> Tensor:
    """Resize uint8 H W 3 to a uint8 tensor 3 `height` `width`, antialiased, with "bicubic" or "bilinear".

    The result equals Pillow's resize across and then down, within 1 of 255 for each pass.
    """
    if not pixels.flags.writeable:  # PyTorch warns about read-only memory, though it only reads
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(image, size=(height, width), mode=interpolation, antialias=True)[0]
