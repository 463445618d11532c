"""Normalization of pixel values by mean and standard deviation, and the checks that all transforms share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normfree.suggest import closest, problem

# Per channel, in units of the pixel range [0, 1]; reference code, dataset.py (MEAN_RGB and STDDEV_RGB, which are these
# times 255).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Weights of red, green and blue in gray, ITU-R BT.601-7.
GRAY_WEIGHTS = (0.299, 0.587, 0.114)
INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


def channel_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of ImageNet for 3 channels; for another number their averages, as in timm."""
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (round(sum(IMAGENET_MEAN) / 3, 4),) * channels, (round(sum(IMAGENET_STD) / 3, 4),) * channels


def normalize(
    images: Tensor,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (images / 255 - mean) / std on the same device.

    With one mean and three channels, the images are first converted to gray, by the weights of ITU-R BT.601 that Pillow
    uses too.

    Args:
        images: Pixel values 0 to 255, uint8 or float32, B C H W.
        mean: One number per channel of the result, in units of [0, 1].
        std: One number per channel, in units of [0, 1].
        dtype: Result type. The computation is in float32, or in float64 if `dtype` is float64.

    Raises:
        ValueError: `mean` or `std` does not have one number per channel.

    >>> normalize(torch.full((1, 3, 1, 1), 255.0), mean=[0.5] * 3, std=[0.5] * 3).flatten().tolist()
    [1.0, 1.0, 1.0]
    """
    if len(mean) == len(std) == 1 and images.shape[-3] == 3:
        weights = torch.tensor(GRAY_WEIGHTS, device=images.device).view(-1, 1, 1)
        images = (images.float() * weights).sum(dim=-3, keepdim=True)
    if not len(mean) == len(std) == images.shape[-3]:
        raise ValueError(
            problem(
                f"{len(mean)} means and {len(std)} deviations for {images.shape[-3]} channels",
                allowed="one of each per channel",
                fix="give as many numbers as the images have channels",
            )
        )
    work = torch.float64 if dtype == torch.float64 else torch.float32
    means = torch.tensor(mean, dtype=work, device=images.device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, dtype=work, device=images.device).view(-1, 1, 1) * 255)
    return ((images.to(work) - means) * scale).to(dtype)


def height_and_width(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of an image size, which is the side of a square or these two numbers."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def check_size(image_size: int | tuple[int, int]) -> None:
    """Raise `ValueError` unless all numbers of `image_size` are positive."""
    if min(height_and_width(image_size)) < 1:
        raise ValueError(problem(f"image_size={image_size}", allowed="1 pixel or more", fix="image_size=64"))


def check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        nearest = closest(value, allowed) or allowed[0]
        raise ValueError(
            problem(f"{option}={value!r}", allowed=", ".join(allowed), fix=f"{option}={nearest!r}")
        )
