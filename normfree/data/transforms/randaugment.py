"""RandAugment as DeepMind ran it for the NFNets: sixteen operations on uint8 pixels, quirks included.

The arithmetic is that of the released code (autoaugment.py on TensorFlow 2), which differs from torchvision's: level M
means M / 10 of each operation's range and may exceed it; translation and cutout are in pixels for any image size (they
were made for 192 px and more, and cover a small image); every drawn operation is applied; and two operations do not do
what their names suggest (see `solarize` and `contrast`). Images are uint8 H W C arrays with three channels, and every
function returns a new array. Only `apply` and `rand_augment` are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Image = np.ndarray

# Value of pixels that geometry uncovers and cutout paints (released code: replace=[128] * 3).
FILL = 128
# Weights of red, green, blue in a gray value (tf.image.rgb_to_grayscale).
GRAY_WEIGHTS = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)


# --- color -------------------------------------------------------------------------------------------


def autocontrast(image: Image) -> Image:
    """Stretch each channel to 0 to 255; a channel of one value is unchanged."""
    out = image.copy()
    for c in range(image.shape[2]):
        low, high = np.float32(image[..., c].min()), np.float32(image[..., c].max())
        if high > low:
            scale = np.float32(255.0) / (high - low)
            out[..., c] = _to_bytes(image[..., c].astype(np.float32) * scale - low * scale)
    return out


def equalize(image: Image) -> Image:
    """Equalize the histogram of each channel, by the rule of Pillow's `ImageOps.equalize`."""
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
    """Return 255 - x."""
    return 255 - image


def posterize(image: Image, bits: int) -> Image:
    """Keep the `bits` highest bits."""
    shift = 8 - bits
    return (image >> shift) << shift


def solarize(image: Image, threshold: int) -> Image:
    """Invert pixels at or above `threshold` modulo 256.

    The released code compares bytes, so 256 (level 10) inverts everything and 384 (level 15) acts as 128.
    """
    return np.where(image < threshold % 256, image, 255 - image)


def solarize_add(image: Image, addition: int) -> Image:
    """Add `addition` to pixels below 128."""
    return np.where(image < 128, np.clip(image.astype(np.int64) + addition, 0, 255).astype(np.uint8), image)


def color(image: Image, factor: float) -> Image:
    """Blend the gray image with `image` by `factor`; 1 returns `image`, larger values extrapolate."""
    return _blend(np.repeat(_gray(image)[..., None], 3, axis=2), image, factor)


def contrast(image: Image, factor: float) -> Image:
    """Blend one gray value with `image` by `factor`.

    The gray value is the number of pixels / 256 (144 at 192 px), where the mean of the image was intended: the released
    code averages the counts of the histogram.
    """
    pixels = image.shape[0] * image.shape[1]
    flat = np.full_like(image, np.uint8(min(255.0, pixels / 256.0)))
    return _blend(flat, image, factor)


def brightness(image: Image, factor: float) -> Image:
    """Blend black with `image` by `factor`."""
    return _blend(np.zeros_like(image), image, factor)


def sharpness(image: Image, factor: float) -> Image:
    """Blend the smoothed image with `image` by `factor`.

    Smoothing is a 3x3 filter, 5 / 13 in the middle and 1 / 13 around; the border is not smoothed.
    """
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
    """Rotate around the center, counterclockwise, taking the nearest pixel."""
    # In float32, as in TensorFlow: at 45 degrees one pixel in a hundred lies exactly between two.
    angle = np.float32(math.radians(degrees))
    height, width = np.float32(image.shape[0]), np.float32(image.shape[1])
    cos, sin, one, two = np.cos(angle), np.sin(angle), np.float32(1), np.float32(2)
    x_offset = ((width - one) - (cos * (width - one) - sin * (height - one))) / two
    y_offset = ((height - one) - (sin * (width - one) + cos * (height - one))) / two
    return _transform(image, (cos, -sin, x_offset, sin, cos, y_offset))


def shear_x(image: Image, level: float) -> Image:
    """Read pixel (x, y) from (x + level * y, y)."""
    return _transform(image, (1.0, level, 0.0, 0.0, 1.0, 0.0))


def shear_y(image: Image, level: float) -> Image:
    """Read pixel (x, y) from (x, y + level * x)."""
    return _transform(image, (1.0, 0.0, 0.0, level, 1.0, 0.0))


def translate_x(image: Image, pixels: float) -> Image:
    """Read pixel (x, y) from (x + pixels, y): a number of pixels, not a share of the width."""
    return _transform(image, (1.0, 0.0, pixels, 0.0, 1.0, 0.0))


def translate_y(image: Image, pixels: float) -> Image:
    """Read pixel (x, y) from (x, y + pixels)."""
    return _transform(image, (1.0, 0.0, 0.0, 0.0, 1.0, pixels))


def cutout(image: Image, half: int, center: tuple[int, int]) -> Image:
    """Paint the square of side 2 * `half` around `center`, (row, column), gray; it is clipped at the border."""
    out = image.copy()
    row, column = center
    out[max(0, row - half) : row + half, max(0, column - half) : column + half] = FILL
    return out


# --- policy ------------------------------------------------------------------------------------------

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
# The sixteen operations, in the order of the released code.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
)  # fmt: skip


def apply(name: str, image: Image, *, magnitude: float, rng: np.random.Generator) -> Image:
    """Apply one operation at `magnitude` of 10. `rng` draws the sign of geometry and the position of cutout."""
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
    center = (int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1])))
    return cutout(image, int(40 * level), center)


def rand_augment(image: Image, *, layers: int, magnitude: float, rng: np.random.Generator) -> Image:
    """Apply `layers` operations in a row, each drawn uniformly from the sixteen, at `magnitude` of 10.

    `image` is uint8 H W 3. [B] table 1 uses four layers at magnitude 5 (F0), 10 (F1, F2) or 15 (from F3).
    """
    for index in rng.integers(len(OPERATIONS), size=layers):
        image = apply(OPERATIONS[index], image, magnitude=magnitude, rng=rng)
    return image


# --- arithmetic --------------------------------------------------------------------------------------


def _to_bytes(values: np.ndarray) -> Image:
    """Clip to 0 to 255 and truncate, as TensorFlow casts."""
    return np.clip(values, 0.0, 255.0).astype(np.uint8)


def _gray(image: Image) -> np.ndarray:
    """Return the gray values, uint8 H W."""
    scaled = image.astype(np.float32) * np.float32(1 / 255)
    gray = (
        scaled[..., 0] * GRAY_WEIGHTS[0] + scaled[..., 1] * GRAY_WEIGHTS[1] + scaled[..., 2] * GRAY_WEIGHTS[2]
    )
    return (gray * np.float32(255.5)).astype(np.uint8)


def _blend(degenerate: Image, image: Image, factor: float) -> Image:
    """Return degenerate + factor * (image - degenerate), clipped."""
    if factor == 1.0:
        return image.copy()
    first = degenerate.astype(np.float32)
    return _to_bytes(first + np.float32(factor) * (image.astype(np.float32) - first))


def _transform(image: Image, matrix: tuple[float, ...]) -> Image:
    """Read pixel (x, y) from the input pixel nearest to (a x + b y + c, d x + e y + f), or gray outside the input."""
    a, b, c, d, e, f = (np.float32(value) for value in matrix)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    columns, rows = (_nearest(a * x + b * y + c), _nearest(d * x + e * y + f))
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    out = np.full_like(image, FILL)
    out[inside] = image[rows[inside], columns[inside]]
    return out


def _nearest(values: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, halves away from zero."""
    return np.trunc(values + np.copysign(np.float32(0.5), values)).astype(np.int64)
