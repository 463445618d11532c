"""normfree.data.transforms.evaluate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from normfree.data.transforms.normalize import INTERPOLATIONS, check_size, check_word
from normfree.data.transforms.resample import resize_bicubic

if TYPE_CHECKING:
    from PIL.Image import Image


CROP_PADDING = 32  # pixels around the crop at evaluation; reference code, dataset.py, "resize_crop_32"


EVAL_CROPS = ("resize_crop_32", "crop_resize", "squash", "center")


LARGEST_RESIZE = 64  # times the crop; ordinary pictures, up to an aspect of about 50, stay below


REFERENCE_CROPS = ("resize_crop_32", "crop_resize")


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
    check_size(image_size)
    check_word("crop", crop, EVAL_CROPS)
    check_word("interpolation", interpolation, INTERPOLATIONS)
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
