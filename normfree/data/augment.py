"""Pictures to pixels, one by one, and batches to mixed batches.

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
from torch.nn.functional import one_hot

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
    `randaugment` is "off", "trivial" (one operation of random strength: TrivialAugment, arXiv 2103.10158) or
    "LxM": L operations in a row at magnitude M of 30 (arXiv 1909.13719), with `fill` (0-255) where they
    uncover the edge. Resizing is antialiased. Raises `ValueError` for values that mean nothing.
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
    mode = _interpolation(interpolation)
    policy = _policy(randaugment, fill)
    v2 = torchvision_module("transforms.v2")
    steps = [
        v2.RandomResizedCrop(
            image_size, scale=(crop_min, 1.0), ratio=tuple(crop_ratio), interpolation=mode, antialias=True
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
            side = max(1, int(s / (s + CROP_PADDING) * min(image.size)))
            left, top = ((length - side + 1) // 2 for length in image.size)
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

    def _reference(self, pixels: np.ndarray) -> Tensor:
        s, (height, width) = self.image_size, pixels.shape[:2]
        if self.crop == "crop_resize":
            side = max(1, int(s / (s + CROP_PADDING) * min(height, width)))
            top, left = (height - side + 1) // 2, (width - side + 1) // 2
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


# torchvision's v2.MixUp and v2.CutMix draw one lambda for a whole batch, from the global generator. The
# reference draws one per example, and a resumed run must draw the same numbers again: hence these few lines
# of our own.
def mix(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    generator: torch.Generator,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mixed images (floating point, B C H W) and soft targets (float32, B K) from class numbers (int64, B).

    Each example is mixed with another one of the batch. mixup: lambda ~ Beta(mixup, mixup) per example, the
    image is lambda * own + (1 - lambda) * other. cutmix: u ~ Beta(cutmix, cutmix) per example (1 is the
    reference's uniform); a box of sides int(sqrt(1 - u) * H), int(sqrt(1 - u) * W) about a uniform centre,
    clipped at the border, keeps the own image, the other one fills the rest, and the label weight is the
    exact share of pixels. With both, the first half of the batch is mixup and the second half cutmix, as in
    the reference code. Targets are smoothed last: y * (1 - s) + s / K. With everything at 0 the images come
    back as they are.

    Mixing normalised images equals normalising mixed ones, as the weights add up to 1. All draws happen on
    the CPU, from one number of `generator`, so every device gets the same ones.
    """
    _check_mix(images, mixup=mixup, cutmix=cutmix, label_smoothing=label_smoothing)
    targets = one_hot(labels, num_classes).float()
    batch, _, height, width = images.shape
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    if mixup > 0 or cutmix > 0:
        first_cut = batch if cutmix == 0 else 0 if mixup == 0 else (batch + 1) // 2
        # A shift by 1 .. B-1 pairs nobody with himself, and the order of the batch is random already.
        other = np.roll(np.arange(batch), int(rng.integers(1, batch)) if batch > 1 else 0)
        weights = np.ones((batch, 1, height, width), dtype=np.float32)
        if first_cut > 0:
            weights[:first_cut] = rng.beta(mixup, mixup, size=(first_cut, 1, 1, 1))
        if first_cut < batch:
            weights[first_cut:] = _boxes(batch - first_cut, height, width, cutmix, rng)
        share = torch.from_numpy(weights.mean(axis=(1, 2, 3), dtype=np.float64)).to(targets).unsqueeze(1)
        mask = torch.from_numpy(weights).to(images)
        partner = torch.from_numpy(other).to(images.device)
        images = torch.lerp(images[partner], images, mask)
        targets = share * targets + (1 - share) * targets[partner]
    if label_smoothing > 0:
        targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    return images, targets


def _boxes(count: int, height: int, width: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    # count 1 H W, 1 inside the box and 0 outside. Half a side is rounded down on both flanks of the centre,
    # as in the reference (dataset.py, cutmix_padding).
    side = np.sqrt(1 - rng.beta(alpha, alpha, size=count))

    def inside(length: int) -> np.ndarray:
        half = (side * length).astype(np.int64) // 2
        centre = rng.integers(0, length, size=count)
        places = np.arange(length)
        return (places >= (centre - half)[:, None]) & (places < (centre + half)[:, None])

    rows, columns = inside(height), inside(width)
    return (rows[:, None, :, None] & columns[:, None, None, :]).astype(np.float32)


def _policy(text: str, fill: tuple[int, int, int]) -> list[Any]:
    if text == "off":
        return []
    if text == "trivial":
        return [torchvision_module("transforms.v2").TrivialAugmentWide(fill=list(fill))]
    match = re.fullmatch(r"([1-9]\d?)x(\d\d?)", text)
    if match is None or int(match[2]) > 30:
        raise ValueError(
            f"randaugment={text!r}. Allowed: 'off', 'trivial', or '<layers>x<magnitude>' with a magnitude of 0 to 30. "
            "Fix: randaugment='2x9'"
        )
    v2 = torchvision_module("transforms.v2")
    return [v2.RandAugment(num_ops=int(match[1]), magnitude=int(match[2]), fill=list(fill))]


def _interpolation(word: str) -> Any:
    _check_word("interpolation", word, INTERPOLATIONS)
    return torchvision_module("transforms.v2").InterpolationMode(word)


def _check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size={image_size}. Allowed: 1 pixel or more. Fix: image_size=64")


def _check_word(option: str, word: str, allowed: tuple[str, ...]) -> None:
    from difflib import get_close_matches

    if word not in allowed:
        nearest = (get_close_matches(word, allowed, n=1, cutoff=0.0) or allowed)[0]
        raise ValueError(f"{option}={word!r}. Allowed: {', '.join(allowed)}. Fix: {option}={nearest!r}")


def _check_mix(images: Tensor, **options: float) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"mix of {images.dtype} images. Allowed: floating point. Fix: images = normalize(images)"
        )
    for option, value in options.items():
        if option != "label_smoothing" and value < 0:
            raise ValueError(f"{option}={value}. Allowed: 0 (off) or more. Fix: {option}=0")
        if option == "label_smoothing" and not 0 <= value < 1:
            raise ValueError(f"{option}={value}. Allowed: 0 (off) up to, not including, 1. Fix: {option}=0.1")
