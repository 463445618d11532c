"""Resizing and cropping for evaluation, without randomness."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normfree.data.transforms.normalize import INTERPOLATIONS, check_choice, check_size
from normfree.data.transforms.resample import resize_bicubic
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_PADDING = 32  # pixels around the crop at evaluation; reference code, dataset.py, "resize_crop_32"
EVAL_CROPS = ("resize_crop_32", "crop_resize", "squash", "center")
REFERENCE_CROPS = ("resize_crop_32", "crop_resize")
# Largest resized area, in units of the crop's; ordinary images, up to an aspect of about 50, stay below.
LARGEST_RESIZE = 64


class EvalTransform:
    """A map from an RGB image to a uint8 tensor, 3 S S, without randomness; made by `eval_transform`."""

    def __init__(
        self, *, image_size: int, crop: str, crop_pct: float, interpolation: str, antialias: bool
    ) -> None:
        self.image_size = image_size
        self.antialias = antialias
        self.crop = crop
        self.crop_pct = crop_pct
        self.interpolation = interpolation

    def __call__(self, image: Image) -> Tensor:
        """Resize and crop one image; Pillow's filters are antialiased."""
        from PIL.Image import Resampling

        if not self.antialias:
            return self._reference(np.asarray(image))
        s, filter_ = self.image_size, Resampling[self.interpolation.upper()]
        if self.crop == "crop_resize":
            left, top, side = self._center_square(*image.size)
            image = image.resize((s, s), filter_, box=(left, top, left + side, top + side))
        else:
            side = s + CROP_PADDING if self.crop == "resize_crop_32" else int(s / self.crop_pct)
            width, height = side, side
            if self.crop == "center":
                # The shorter side becomes `side`; the other one keeps the aspect, truncated to whole pixels.
                shorter = min(image.size)
                width, height = (side if n == shorter else int(side * n / shorter) for n in image.size)
            # round() rounds halves to even, as torchvision's center crop does.
            left, top = round((width - s) / 2), round((height - s) / 2)
            if width * height <= LARGEST_RESIZE * s * s:
                image = image.resize((width, height), filter_).crop((left, top, left + s, top + s))
            else:
                # An image one pixel high would become gigabytes. Resizing only the crop rounds a pixel or two.
                across, down = image.width / width, image.height / height
                box = (left * across, top * down, (left + s) * across, (top + s) * down)
                image = image.resize((s, s), filter_, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _center_square(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (left, top, side) of the square that "crop_resize" keeps."""
        side = max(1, int(self.image_size / (self.image_size + CROP_PADDING) * min(width, height)))
        return (width - side + 1) // 2, (height - side + 1) // 2, side

    def _reference(self, pixels: np.ndarray) -> Tensor:
        """Resize and crop without antialiasing, as the reference code does."""
        s, (height, width) = self.image_size, pixels.shape[:2]
        if self.crop == "crop_resize":
            left, top, side = self._center_square(width, height)
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
    """Return a map from an RGB image to a uint8 tensor, 3 S S, without randomness.

    It needs only Pillow, so prediction works without torchvision.

    Args:
        image_size: Side S of the result in pixels.
        crop: Part of the image that is kept. "resize_crop_32" resizes to a square of side S + 32, ignoring the aspect,
            and takes the center (reference code; [B] found it marginally better). "crop_resize" takes the center
            square whose side is S / (S + 32) of the shorter side and resizes it (reference code for NF-RegNet and
            ResNet). "squash" resizes to a square of side floor(S / `crop_pct`), ignoring the aspect, and takes the
            center; with `crop_pct` 1 nothing is cut, which suits small images, where a margin of 32 pixels would be
            half of the image. "center" resizes the shorter side to floor(S / `crop_pct`), keeping the aspect, and
            takes the center. The last two are timm's.
        crop_pct: For "squash" and "center", above 0 and up to 1.
        interpolation: "bicubic", "bilinear" or "nearest".
        antialias: False gives the pixels of the reference code to 0.05 of 255, for its two crops: bicubic without
            antialiasing, as float32 values that overshoot 0 and 255.

    Raises:
        ValueError: An option is unknown or out of range, or `antialias=False` with another crop or filter.
    """
    check_size(image_size)
    check_choice("crop", crop, EVAL_CROPS)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if not 0 < crop_pct <= 1:
        raise ValueError(
            problem(f"crop_pct={crop_pct}", allowed="above 0, up to 1 (no margin)", fix="crop_pct=0.875")
        )
    if not antialias and (crop not in REFERENCE_CROPS or interpolation != "bicubic"):
        raise ValueError(
            problem(
                f"antialias=False with crop={crop!r}, interpolation={interpolation!r}",
                allowed=f"bicubic with {' or '.join(REFERENCE_CROPS)}",
                fix="antialias=True",
            )
        )
    return EvalTransform(
        image_size=image_size, crop=crop, crop_pct=crop_pct, interpolation=interpolation, antialias=antialias
    )
