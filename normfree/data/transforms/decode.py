"""Decode one image file or byte string to RGB; every failure is an `ImageError` that names the image."""

from __future__ import annotations

import io
import os
import stat
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that are safe to parse. EPS, PS and PDF are excluded because they start an interpreter, rare containers
# because their decoders are seldom fuzzed. JPEG includes the multi-image files of phones; their first image is read.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = frozenset(
    f".{name}"
    for name in [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
    ]
)
MAX_PIXELS = 64_000_000  # about 256 MB decoded: more than any common camera, less than a decompression bomb
MAX_BYTES = 1_000_000_000  # of an encoded image; 333 million uncompressed pixels
_SIXTEEN_TO_EIGHT = 257  # 65535 / 255


class ImageError(ValueError):
    """An image that cannot be used: `name` is its path or id, `reason` says what is wrong with it."""

    def __init__(self, name: str, reason: str) -> None:
        # Both arguments are passed on, so that the error survives pickling between processes.
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def load_image(
    source: str | os.PathLike[str] | bytes,
    *,
    name: str = "image bytes",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> Image:
    """Decode the first image of a file or byte string to mode RGB.

    The format is detected from the content, not from the name, and the size in the header is checked before anything
    is decoded. The EXIF orientation is applied; palettes, gray and CMYK are converted; 16-bit gray is scaled to 8
    bits, not clipped.

    Args:
        source: Path or encoded bytes.
        name: Name of a byte string in errors.
        background: Color 0 to 255 under transparent pixels.
        max_pixels: Largest width times height.

    Raises:
        ImageError: The file is missing, truncated, damaged, too large, in another format, or has pixels of unknown
            range such as floating-point ones.
    """
    name = name if isinstance(source, bytes) else os.fspath(source)
    data = source if isinstance(source, bytes) else read_file(name)
    if not data:
        raise ImageError(name, "the file is empty")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(name, _too_large(f"{image.width} x {image.height} pixels", max_pixels))
            image.load()
            _refuse_unknown_range(image, name)
            return _to_rgb(_upright(image), background)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(name, f"not an image, or not one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # Pillow has a limit of its own
        raise ImageError(name, _too_large("more than Pillow's own limit", max_pixels)) from None
    # Damaged files raise OSError, SyntaxError, ValueError, struct.error, EOFError and more.
    except Exception as error:
        raise ImageError(name, f"damaged: {error or type(error).__name__}") from error


def read_file(source: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file; raise `ImageError` for anything else."""
    path = os.fspath(source)
    try:
        about = os.stat(path)
        mode = about.st_mode
        if stat.S_ISDIR(mode):
            raise ImageError(path, "a folder, not a file")
        if not stat.S_ISREG(mode):  # opening a pipe would block forever
            raise ImageError(path, "not a regular file")
        if about.st_size > MAX_BYTES:  # a sparse file takes no space on the disk, but all the memory
            raise ImageError(path, f"{about.st_size:,} bytes, the limit is {MAX_BYTES:,}")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror or error}") from error


def _too_large(size: str, max_pixels: int) -> str:
    """Return the reason for an image of too many pixels."""
    return f"too large: {size}, the limit is {max_pixels:,}. Fix: scale it down before training"


def _upright(image: Image) -> Image:
    """Apply the EXIF orientation."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF with intact pixels is common, and then the orientation is unknown
        return image


def _refuse_unknown_range(image: Image, name: str) -> None:
    """Raise `ImageError` for pixel types that do not imply a range of values."""
    fix = "Fix: save it with 8 or 16 bits"
    if image.mode == "F":
        raise ImageError(name, f"floating-point pixels, whose range is unknown. {fix}")
    # Mode "I" from PNG and PPM holds 16-bit values, the most that these formats have; a TIFF's may have 32 bits.
    if image.mode == "I" and image.format == "TIFF":
        raise ImageError(name, f"32-bit integer pixels, whose range is unknown. {fix}")


def _to_rgb(image: Image, background: tuple[int, int, int]) -> Image:
    """Scale 16 bits to 8, compose transparent pixels over `background`, and convert to RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        values: Any = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((values + _SIXTEEN_TO_EIGHT // 2) // _SIXTEEN_TO_EIGHT).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")
