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

from normfree.data.crops import TrainTransform
from normfree.data.randaugment import rand_augment
from normfree.data.resample import resize_bicubic
from normfree.data.vision import torchvision_module

if TYPE_CHECKING:
    from PIL.Image import Image

# Per channel, in units of the pixel range [0, 1]; reference code, dataset.py (MEAN_RGB and STDDEV_RGB, which
# are these times 255).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_PADDING = 32  # pixels around the crop at evaluation; reference code, dataset.py, "resize_crop_32"
GREY = (128, 128, 128)  # what RandAugment uncovers at the edge; reference code, autoaugment.py
EVAL_CROPS = ("resize_crop_32", "crop_resize", "squash", "center")
LARGEST_RESIZE = 64  # times the crop; ordinary pictures, up to an aspect of about 50, stay below
REFERENCE_CROPS = ("resize_crop_32", "crop_resize")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


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
    _check_size(image_size)
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
    _check_word("interpolation", interpolation, INTERPOLATIONS)
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


class EvalTransform:
    """RGB picture -> uint8 tensor, 3 S S, without randomness; made by `eval_transform`."""

    def __init__(
        self, *, image_size: int, crop: str, crop_pct: float, interpolation: str, antialias: bool
    ) -> None:
        self.image_size = image_size
        self.antialias = antialias
        self.crop = crop
        self.crop_pct = crop_pct
        self.interpolation = interpolation

    def __call__(self, image: Image) -> Tensor:
        """Resize and crop one picture; Pillow's filters are antialiased."""
        from PIL.Image import Resampling

        if not self.antialias:
            return self._reference(np.asarray(image))
        s, filter_ = self.image_size, Resampling[self.interpolation.upper()]
        if self.crop == "crop_resize":
            left, top, side = self._centre_square(*image.size)
            image = image.resize((s, s), filter_, box=(left, top, left + side, top + side))
        else:
            side = s + CROP_PADDING if self.crop == "resize_crop_32" else int(s / self.crop_pct)
            width, height = side, side
            if (
                self.crop == "center"
            ):  # the shorter side becomes `side`, the other follows, cut to whole pixels
                shorter = min(image.size)
                width, height = (side if n == shorter else int(side * n / shorter) for n in image.size)
            # round() goes to even at a half, as torchvision's centre crop does
            left, top = round((width - s) / 2), round((height - s) / 2)
            if width * height <= LARGEST_RESIZE * s * s:
                image = image.resize((width, height), filter_).crop((left, top, left + s, top + s))
            else:  # a picture one pixel high would become gigabytes; computing the crop alone rounds a pixel or two
                across, down = image.width / width, image.height / height
                box = (left * across, top * down, (left + s) * across, (top + s) * down)
                image = image.resize((s, s), filter_, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _centre_square(self, width: int, height: int) -> tuple[int, int, int]:
        """(left, top, side) of what "crop_resize" keeps."""
        side = max(1, int(self.image_size / (self.image_size + CROP_PADDING) * min(width, height)))
        return (width - side + 1) // 2, (height - side + 1) // 2, side

    def _reference(self, pixels: np.ndarray) -> Tensor:
        s, (height, width) = self.image_size, pixels.shape[:2]
        if self.crop == "crop_resize":
            left, top, side = self._centre_square(width, height)
            seen = resize_bicubic(pixels[top : top + side, left : left + side], s, s)
        else:
            offset = CROP_PADDING // 2
            seen = resize_bicubic(pixels, s + CROP_PADDING, s + CROP_PADDING)
            seen = seen[offset : offset + s, offset : offset + s]
        return torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1)))


def eval_transform(
    *,
    image_size: int,
    crop: str = "resize_crop_32",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Callable[[Image], Tensor]:
    """RGB picture -> uint8 tensor, 3 S S, the same each time.

    `crop` says which part is seen: "resize_crop_32" resizes straight to (S + 32) squared, aspect not kept,
    and takes the centre (reference code; [B] found it marginally better); "crop_resize" takes the centre
    square of side S / (S + 32) of the shorter side, aspect kept (reference code for NF-RegNet and ResNet);
    "squash" resizes all of it to floor(S / `crop_pct`) squared and takes the centre; with 1 nothing is cut, for
    small pictures, of which a margin of 32 pixels would take half; "center" resizes the shorter side to floor(S /
    `crop_pct`), aspect kept, and takes the centre. These two are timm's. Needs Pillow only, so prediction works
    without torchvision.

    `antialias=False` gives the pixels of the reference code to 0.05 of 255: bicubic without antialiasing, as float32
    grey levels that overshoot 0 and 255, for its two crops. Raises `ValueError` for unknown words, a `crop_pct` outside
    (0, 1], and other crops or filters without antialiasing.
    """
    _check_size(image_size)
    _check_word("crop", crop, EVAL_CROPS)
    _check_word("interpolation", interpolation, INTERPOLATIONS)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}. Allowed: above 0, up to 1 (no margin). Fix: crop_pct=0.875")
    if not antialias and (crop not in REFERENCE_CROPS or interpolation != "bicubic"):
        raise ValueError(
            f"antialias=False with crop={crop!r}, interpolation={interpolation!r}. Allowed: bicubic with "
            f"{' or '.join(REFERENCE_CROPS)}. Fix: antialias=True"
        )
    return EvalTransform(
        image_size=image_size, crop=crop, crop_pct=crop_pct, interpolation=interpolation, antialias=antialias
    )


def normalize(
    images: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Grey levels B C H W (uint8, or float32 from 0 to 255) -> `dtype`, on the same device.

    (images / 255 - mean) / std, with one number of each per channel.
    Computed in float32 (float64 when that is asked for) and then rounded to `dtype`.
    """
    if not len(mean) == len(std) == images.shape[-3]:
        raise ValueError(
            f"{len(mean)} means and {len(std)} deviations for {images.shape[-3]} channels. "
            "Allowed: one of each per channel. Fix: give as many numbers as the images have channels"
        )
    work = torch.float64 if dtype == torch.float64 else torch.float32
    means = torch.tensor(mean, dtype=work, device=images.device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, dtype=work, device=images.device).view(-1, 1, 1) * 255)
    return ((images.to(work) - means) * scale).to(dtype)


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


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size={image_size}. Allowed: 1 pixel or more. Fix: image_size=64")


def _check_word(option: str, word: str, allowed: tuple[str, ...]) -> None:
    from difflib import get_close_matches

    if word not in allowed:
        nearest = (get_close_matches(word, allowed, n=1, cutoff=0.0) or allowed)[0]
        raise ValueError(f"{option}={word!r}. Allowed: {', '.join(allowed)}. Fix: {option}={nearest!r}")
