"""Resizing and cropping for evaluation, without randomness."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normfree.data.transforms.normalize import INTERPOLATIONS, check_choice, check_size, height_and_width
from normfree.data.transforms.resample import resize_bicubic
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

CROP_PADDING = 32  # pixels around the crop at evaluation; reference code, dataset.py, "resize_crop_32"
EVAL_CROPS = ("resize_crop_32", "crop_resize", "squash", "center", "letterbox")
BAR = (128, 128, 128)  # gray of the bars of "letterbox"; the gray that RandAugment uncovers
REFERENCE_CROPS = ("resize_crop_32", "crop_resize")
# Largest resized area, in units of the crop's; ordinary images, up to an aspect of about 50, stay below.
LARGEST_RESIZE = 64


class EvalTransform:
    """A map from an RGB image to a uint8 tensor, 3 H W, without randomness; made by `eval_transform`."""

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        crop: str,
        crop_pct: float,
        interpolation: str,
        antialias: bool,
    ) -> None:
        self.height, self.width = height_and_width(image_size)
        self.antialias = antialias
        self.crop = crop
        self.crop_pct = crop_pct
        self.interpolation = interpolation

    def __call__(self, image: Image) -> Tensor:
        """Resize and crop one image; Pillow's filters are antialiased."""
        from PIL.Image import Resampling

        if not self.antialias:
            return self._reference(np.asarray(image))
        w, h, filter_ = self.width, self.height, Resampling[self.interpolation.upper()]
        if self.crop == "crop_resize":
            image = image.resize((w, h), filter_, box=self._center_box(*image.size))
        elif self.crop == "letterbox":
            image = self._letterbox(image, filter_)
        else:
            width, height = self._resized(*image.size)
            # round() rounds halves to even, as torchvision's center crop does.
            left, top = round((width - w) / 2), round((height - h) / 2)
            if width * height <= LARGEST_RESIZE * w * h:
                image = image.resize((width, height), filter_).crop((left, top, left + w, top + h))
            else:
                # An image one pixel high would become gigabytes. Resizing only the crop rounds a pixel or two.
                image = image.resize((w, h), filter_, box=self.box(*image.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return (left, top, right, bottom) of what the result shows of an image, in pixels of the image.

        The bars of "letterbox" are outside of the image, so left and top may be negative.
        """
        w, h = self.width, self.height
        if self.crop == "crop_resize":
            return self._center_box(width, height)
        if self.crop == "letterbox":
            wide, tall = self._inside(width, height)
            left, top = -((w - wide) // 2), -((h - tall) // 2)
        else:
            wide, tall = self._resized(width, height)
            left, top = round((wide - w) / 2), round((tall - h) / 2)
        across, down = width / wide, height / tall
        return left * across, top * down, (left + w) * across, (top + h) * down

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) to which the crops that cut afterwards resize an image."""
        if self.crop == "resize_crop_32":
            return self.width + CROP_PADDING, self.height + CROP_PADDING
        across, down = int(self.width / self.crop_pct), int(self.height / self.crop_pct)
        if self.crop == "squash":
            return across, down
        # "center": one side fits, the other one keeps the aspect, truncated to whole pixels.
        if across * height >= down * width:
            return across, int(across * height / width)
        return int(down * width / height), down

    def _letterbox(self, image: Image, filter_: Resampling) -> Image:
        """Return the whole image in its aspect, in the middle of a gray one."""
        from PIL import Image as pillow

        size = self._inside(*image.size)
        canvas = pillow.new("RGB", (self.width, self.height), BAR)
        canvas.paste(image.resize(size, filter_), ((self.width - size[0]) // 2, (self.height - size[1]) // 2))
        return canvas

    def _inside(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) to which "letterbox" resizes an image."""
        scale = min(self.width / width, self.height / height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def _center_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return (left, top, right, bottom) of the part that "crop_resize" keeps."""
        w, h = self.width, self.height
        if w == h:
            wide = tall = max(1, int(w / (w + CROP_PADDING) * min(width, height)))
        else:
            scale = min(width / (w + CROP_PADDING), height / (h + CROP_PADDING))
            wide, tall = max(1, int(w * scale)), max(1, int(h * scale))
        left, top = (width - wide + 1) // 2, (height - tall + 1) // 2
        return left, top, left + wide, top + tall

    def _reference(self, pixels: np.ndarray) -> Tensor:
        """Resize and crop without antialiasing, as the reference code does."""
        w, h, (height, width) = self.width, self.height, pixels.shape[:2]
        if self.crop == "crop_resize":
            left, top, right, bottom = self._center_box(width, height)
            seen = resize_bicubic(pixels[top:bottom, left:right], h, w)
        else:
            offset = CROP_PADDING // 2
            seen = resize_bicubic(pixels, h + CROP_PADDING, w + CROP_PADDING)
            seen = seen[offset : offset + h, offset : offset + w]
        return torch.from_numpy(np.ascontiguousarray(seen.transpose(2, 0, 1)))


def eval_transform(
    *,
    image_size: int | tuple[int, int],
    crop: str = "resize_crop_32",
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> EvalTransform:
    """Return a map from an RGB image to a uint8 tensor, 3 H W, without randomness.

    It needs only Pillow, so prediction works without torchvision.

    Args:
        image_size: Side S of the result in pixels, or its height and width; S below stands for each of them.
        crop: Part of the image that is kept. "resize_crop_32" resizes to a square of side S + 32, ignoring the aspect,
            and takes the center (reference code; [B] found it marginally better). "crop_resize" takes the center
            square whose side is S / (S + 32) of the shorter side and resizes it (reference code for NF-RegNet and
            ResNet). "squash" resizes to a square of side floor(S / `crop_pct`), ignoring the aspect, and takes the
            center; with `crop_pct` 1 nothing is cut, which suits small images, where a margin of 32 pixels would be
            half of the image. "center" resizes the shorter side to floor(S / `crop_pct`), keeping the aspect, and
            takes the center. Both are timm's. "letterbox" keeps all of the image and its aspect, and adds gray bars.
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
