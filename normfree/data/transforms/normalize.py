"""normfree.data.transforms.normalize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


# Per channel, in units of the pixel range [0, 1]; reference code, dataset.py (MEAN_RGB and STDDEV_RGB, which
# are these times 255).
IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


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


def check_size(image_size: int) -> None:
    if image_size < 1:
        raise ValueError(f"image_size={image_size}. Allowed: 1 pixel or more. Fix: image_size=64")


def check_word(option: str, word: str, allowed: tuple[str, ...]) -> None:
    from difflib import get_close_matches

    if word not in allowed:
        nearest = (get_close_matches(word, allowed, n=1, cutoff=0.0) or allowed)[0]
        raise ValueError(f"{option}={word!r}. Allowed: {', '.join(allowed)}. Fix: {option}={nearest!r}")
