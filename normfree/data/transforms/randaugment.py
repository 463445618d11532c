"""RandAugment as DeepMind ran it for the NFNets: sixteen operations on uint8 pixels, quirks included.

The arithmetic is that of the released code (autoaugment.py on TensorFlow 2), which differs from torchvision's:
level M stands for M / 10 of each operation's range and may exceed it, translation and cutout count in pixels whatever
the picture's size (made for 192 px and more: they cover a small one), every drawn operation is applied, and two
operations do not do what their names say (see `solarize` and `contrast`). Images are uint8 H W C arrays
with three channels; every function returns a new one. Nothing here is random but `rand_augment`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Image = np.ndarray

#: What geometry uncovers and cutout paints (released code: replace=[128] * 3).
FILL = 128
#: Weights of red, green, blue in a grey value (tf.image.rgb_to_grayscale).
GREY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)


# --- tones -------------------------------------------------------------------------------------------


def autocontrast(image: Image) -> Image:
    """Each channel stretched to 0 ... 255; a channel of one value stays."""
    out = image.copy()
    for c in range(image.shape[2]):
        low, high = np.float32(image[..., c].min()), np.float32(image[..., c].max())
        if high > low:
            scale = np.float32(255.0) / (high - low)
            out[..., c] = _to_bytes(image[..., c].astype(np.float32) * scale - low * scale)
    return out


def equalize(image: Image) -> Image:
    """Each channel's histogram made even, by the rule of Pillow's `ImageOps.equalize`."""
    out = image.copy()
    for c in range(image.shape[2]):
        histogram = np.bincount(image[..., c].ravel(), minlength=256)
        filled = histogram[histogram > 0]
        step = int(filled.sum() - filled[-1]) // 255
        if step:
            table = (np.cumsum(histogram) + step // 2) // step
            table = np.clip(np.concatenate([[0], table[:-1]]), 0, 255).astype(np.uint8)
            out[..., c] = table[image[..., c]]
    return out


def invert(image: Image) -> Image:
    """255 - x."""
    return 255 - image


def posterize(image: Image, bits: int) -> Image:
    """Keeps the `bits` highest bits."""
    shift = 8 - bits
    return (image >> shift) << shift


def solarize(image: Image, threshold: int) -> Image:
    """Inverts pixels at or above the threshold, modulo 256: the released code compares bytes, so 256 (level 10)
    inverts everything and 384 (level 15) acts as 128."""
    return np.where(image < threshold % 256, image, 255 - image)


def solarize_add(image: Image, addition: int) -> Image:
    """Adds to pixels below 128."""
    return np.where(image < 128, np.clip(image.astype(np.int64) + addition, 0, 255).astype(np.uint8), image)


def color(image: Image, factor: float) -> Image:
    """Away from the grey picture by `factor`: 1 changes nothing."""
    return _blend(np.repeat(_grey(image)[..., None], 3, axis=2), image, factor)


def contrast(image: Image, factor: float) -> Image:
    """Away from one grey by `factor`. That grey is the number of pixels / 256 (144 at 192 px), where its mean was
    meant: the released code averages the histogram's counts."""
    pixels = image.shape[0] * image.shape[1]
    flat = np.full_like(image, np.uint8(min(255.0, pixels / 256.0)))
    return _blend(flat, image, factor)


def brightness(image: Image, factor: float) -> Image:
    """Away from black by `factor`."""
    return _blend(np.zeros_like(image), image, factor)


def sharpness(image: Image, factor: float) -> Image:
    """Away from the smoothed picture (3x3: 5 in the middle, 1 around, over 13) by `factor`; the border stays."""
    x = image.astype(np.float32)
    rows, columns = image.shape[0] - 2, image.shape[1] - 2
    smooth = image.copy()
    if rows > 0 and columns > 0:
        total = np.zeros((rows, columns, image.shape[2]), dtype=np.float32)
        for i in range(3):
            for j in range(3):
                weight = np.float32((5.0 if i == j == 1 else 1.0) / 13.0)
                total += weight * x[i : i + rows, j : j + columns]
        smooth[1:-1, 1:-1] = _to_bytes(total)
    return _blend(smooth, image, factor)


# --- geometry ----------------------------------------------------------------------------------------


def rotate(image: Image, degrees: float) -> Image:
    """About the centre, counter-clockwise, nearest pixel."""
    # in float32, as TensorFlow does it: at 45 degrees one pixel in a hundred lies on a tie
    angle, height, width = (
        np.float32(math.radians(degrees)),
        np.float32(image.shape[0]),
        np.float32(image.shape[1]),
    )
    cos, sin, one, two = np.cos(angle), np.sin(angle), np.float32(1), np.float32(2)
    x_offset = ((width - one) - (cos * (width - one) - sin * (height - one))) / two
    y_offset = ((height - one) - (sin * (width - one) + cos * (height - one))) / two
    return _transform(image, (cos, -sin, x_offset, sin, cos, y_offset))


def shear_x(image: Image, level: float) -> Image:
    """Row y reads from x + level * y."""
    return _transform(image, (1.0, level, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: Image, level: float) -> Image:
    """Column x reads from y + level * x."""
    return _transform(image, (1.0, 0.0, 0.0, level, 1.0, 0.0))


def translate_x(image: Image, pixels: float) -> Image:
    """Reads from x + pixels: whole pixels, not a share of the width."""
    return _transform(image, (1.0, 0.0, pixels, 0.0, 1.0, 0.0))


def translate_y(image: Image, pixels: float) -> Image:
    """Reads from y + pixels."""
    return _transform(image, (1.0, 0.0, 0.0, 0.0, 1.0, pixels))


def cutout(image: Image, half: int, centre: tuple[int, int]) -> Image:
    """Paints the square of side 2 * half about (row, column) grey, as far as it lies inside."""
    out = image.copy()
    row, column = centre
    out[max(0, row - half) : row + half, max(0, column - half) : column + half] = FILL
    return out


# --- the draw ----------------------------------------------------------------------------------------

_SIGNED: dict[str, tuple[Callable[[Image, float], Image], float]] = {
    "Rotate": (rotate, 30.0),
    "ShearX": (shear_x, 0.3),
    "ShearY": (shear_y, 0.3),
    "TranslateX": (translate_x, 100.0),
    "TranslateY": (translate_y, 100.0),
}
_FACTORS: dict[str, Callable[[Image, float], Image]] = {
    "Color": color,
    "Contrast": contrast,
    "Brightness": brightness,
    "Sharpness": sharpness,
}
_WHOLE: dict[str, tuple[Callable[[Image, int], Image], int]] = {
    "Posterize": (posterize, 4),
    "Solarize": (solarize, 256),
    "SolarizeAdd": (solarize_add, 110),
}
_PLAIN: dict[str, Callable[[Image], Image]] = {
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
}
#: The sixteen, in the released order.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip


def apply(name: str, image: Image, *, magnitude: float, rng: np.random.Generator) -> Image:
    """One operation at `magnitude` (of 10). Draws a sign for geometry and a place for cutout, nothing otherwise."""
    level = magnitude / 10
    if name in _PLAIN:
        return _PLAIN[name](image)
    if name in _FACTORS:
        return _FACTORS[name](image, 1.8 * level + 0.1)
    if name in _WHOLE:
        whole, largest = _WHOLE[name]
        return whole(image, int(level * largest))
    if name in _SIGNED:
        moved, reach = _SIGNED[name]
        return moved(image, reach * level * (1.0 if rng.random() < 0.5 else -1.0))
    assert name == "Cutout", name
    centre = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
    return cutout(image, int(40 * level), centre)


def rand_augment(image: Image, *, layers: int, magnitude: float, rng: np.random.Generator) -> Image:
    """`layers` operations in a row, each drawn from all sixteen with equal chance, at one magnitude of 10.

    [B] table 1: four layers at magnitude 5 (F0), 10 (F1, F2) or 15 (from F3). `image`: uint8 H W 3.
    """
    for index in rng.integers(len(OPERATIONS), size=layers):
        image = apply(OPERATIONS[index], image, magnitude=magnitude, rng=rng)
    return image


# --- arithmetic --------------------------------------------------------------------------------------


def _to_bytes(values: np.ndarray) -> Image:
    return np.clip(values, 0.0, 255.0).astype(np.uint8)  # cut off, not rounded, as TensorFlow casts


def _grey(image: Image) -> np.ndarray:
    scaled = image.astype(np.float32) * np.float32(1 / 255)
    grey = (
        scaled[..., 0] * GREY_WEIGHTS[0] + scaled[..., 1] * GREY_WEIGHTS[1] + scaled[..., 2] * GREY_WEIGHTS[2]
    )
    return (grey * np.float32(255.5)).astype(np.uint8)


def _blend(degenerate: Image, image: Image, factor: float) -> Image:
    if factor == 1.0:
        return image.copy()
    first = degenerate.astype(np.float32)
    return _to_bytes(first + np.float32(factor) * (image.astype(np.float32) - first))


def _transform(image: Image, matrix: tuple[float, ...]) -> Image:
    """Output (x, y) reads the nearest input pixel to (a x + b y + c, d x + e y + f); grey where there is none."""
    a, b, c, d, e, f = (np.float32(value) for value in matrix)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    columns, rows = (_nearest(a * x + b * y + c), _nearest(d * x + e * y + f))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    out = np.full_like(image, FILL)
    out[inside] = image[rows[inside], columns[inside]]
    return out


def _nearest(values: np.ndarray) -> np.ndarray:
    return np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int64)  # halves away from zero
