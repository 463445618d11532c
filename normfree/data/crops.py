"""The training transform without Pillow's resize: crop an array, scale it with torch's antialiased kernels for uint8.

The arithmetic is Pillow's: the same filters in whole numbers, across first, then down, each pass rounded to 8 bits. On
one core it is several times faster (benchmarks/results/loading.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from normfree.data.vision import torchvision_module

if TYPE_CHECKING:
    from PIL.Image import Image


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
