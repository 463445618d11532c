"""Heat maps drawn over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# Nine equidistant colors of matplotlib's inferno, whose brightness rises evenly from black to yellow.
_INFERNO = (
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
    (249, 201, 50), (252, 255, 164),
)  # fmt: skip
# Share of the color where the heat is largest; where it is 0, the image stays as it is.
_OPACITY = 0.7


Box = tuple[float, float, float, float]


def fitted(image: Image, box: Box, *, smallest: int, largest: int) -> tuple[Image, Box]:
    """Return a copy of an image whose longest side has `smallest` to `largest` pixels, and a box scaled with it."""
    longest = max(image.size)
    scale = min(max(longest, smallest), largest) / longest
    width, height = (max(1, round(side * scale)) for side in image.size)
    across, down = width / image.width, height / image.height
    left, top, right, bottom = box
    return image.resize((width, height)), (left * across, top * down, right * across, bottom * down)


def overlay(image: Image, heat: Tensor, box: Box) -> Image:
    """Return an RGB image with a heat map drawn over it.

    Args:
        image: an RGB image.
        heat: the heat map, h w, 0 or more; its maximum gets the brightest color.
        box: (left, top, right, bottom) of the part of the image that the map covers, in pixels, as `EvalTransform.box`
            returns it. It may be larger than the image.
    """
    from PIL import Image as pillow

    values = heat.detach().cpu().float().numpy()
    largest = float(values.max(initial=0.0))
    small = pillow.fromarray(values / largest if largest > 0 else values)
    left, top, right, bottom = (round(side) for side in box)
    whole = pillow.new("F", image.size, 0.0)
    size = max(1, right - left), max(1, bottom - top)
    whole.paste(small.resize(size, pillow.Resampling.BILINEAR), (left, top))
    strength = np.asarray(whole)[..., None]
    levels = np.linspace(0.0, 1.0, len(_INFERNO))
    colors = np.stack([np.interp(strength[..., 0], levels, c) for c in zip(*_INFERNO, strict=True)], axis=-1)
    mixed = np.asarray(image, np.float32) * (1 - _OPACITY * strength) + _OPACITY * strength * colors
    return pillow.fromarray(np.rint(mixed).astype(np.uint8))
