"""Decode one image file or byte string to RGB; every failure is an `ImageError` that names the image."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

# Formats that are safe to parse. EPS, PS and PDF are excluded because they start an interpreter, rare containers
# because their decoders are seldom fuzzed. JPEG includes the multi-image files of phones; their first image is read.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"
)  # fmt: skip
# Phones of today take up to 200 megapixels (16,320 x 12,240).
MAX_PIXELS = 256_000_000
# JPEGs with more pixels than this are decoded at half size or less, which libjpeg does at once: training and evaluation
# use a small part of their pixels, and 200 megapixels would take 800 MB of memory in each worker.
DRAFT_ABOVE = 64_000_000
MAX_BYTES = 1_000_000_000  # of an encoded image; 333 million uncompressed pixels
FULL_RANGE = 65_535  # largest value of 16 bits
_BLOCK = 16_384  # bytes of an encoded image that are decoded between two questions whether it is given up
# An image may be read in _PARTS pieces and one more for every _PART_BYTES. Pillow reads each chunk of a PNG by three
# calls in Python: two million empty ones in 28 MB would take 15 seconds. Encoders write chunks of kilobytes.
_PARTS, _PART_BYTES = 20_000, 200


# Pillow refuses large images by a global limit. It is lifted while a header is read, by one thread at a time, because
# `load_image` has a limit of its own.
_OPENING = threading.Lock()


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that are read: AVIF if Pillow was built with it, HEIF if pillow-heif is installed."""
    from PIL import features

    found = (*_FORMATS, "AVIF") if features.check("avif") else _FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return found
    register_heif_opener()
    return (*found, "HEIF")


@cache
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that are read as images, in lower case."""
    more = {"AVIF": (".avif",), "HEIF": (".heic", ".heif", ".hif")}
    return frozenset(_SUFFIXES).union(*(more.get(name, ()) for name in formats()))


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
    pixel_range: int = FULL_RANGE,
    given_up: Callable[[], bool] | None = None,
) -> Image:
    """Decode the first image of a file or byte string to mode RGB.

    The format is detected from the content, not from the name, and the size in the header is checked before anything
    is decoded. The EXIF orientation is applied; palettes, gray and CMYK are converted; 16-bit gray is scaled to 8
    bits, not clipped. A JPEG of more than `DRAFT_ABOVE` pixels is decoded at half its size or less.

    Args:
        source: Path or encoded bytes.
        name: Name of a byte string in errors.
        background: Color 0 to 255 under transparent pixels.
        max_pixels: Largest width times height.
        pixel_range: Value of white in 16-bit gray images, for example 4095 for a camera of 12 bits.
        given_up: Called between blocks of the image; True stops the decoding. WebP, AVIF, HEIC and TIFF are decoded
            as one block.

    Raises:
        CancelledError: `given_up` returned True.
        ImageError: The file is missing, truncated, damaged, too large, in another format, or has pixels of unknown
            range such as floating-point ones.
    """
    name = name if isinstance(source, bytes) else os.fspath(source)
    data = source if isinstance(source, bytes) else read_file(name)
    if not data:
        raise ImageError(name, "the file is empty")
    from PIL import UnidentifiedImageError

    try:
        with open_header(data, given_up) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(name, _too_large(image, max_pixels))
            if image.format == "PNG":
                _check_png(data)
            if image.width * image.height > DRAFT_ABOVE:  # only JPEG does anything here
                image.draft(image.mode, (image.width // 2, image.height // 2))
            image.load()
            _refuse_unknown_range(image, name)
            return _to_rgb(_upright(image), background, pixel_range)
    except (ImageError, CancelledError):
        raise
    except UnidentifiedImageError:
        raise ImageError(
            name, f"not an image, or not one of {', '.join(formats())}{_package(data)}"
        ) from None
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
            # The size, since memory for the whole limit would be reserved first, which takes longer than reading a
            # small file. Some file systems give a size of 0.
            return file.read(about.st_size or MAX_BYTES)
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except OSError as error:
        raise ImageError(path, f"cannot be read: {error.strerror or error}") from error


class _LimitedBytes(io.BytesIO):
    """Bytes that can be read in a limited number of parts, until they are given up."""

    def __init__(self, data: bytes, given_up: Callable[[], bool] | None) -> None:
        super().__init__(data)
        self._given_up, self._left = given_up, _PARTS + len(data) // _PART_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if self._given_up is not None and self._given_up():
            raise CancelledError
        self._left -= 1
        if self._left < 0:
            raise ValueError("it consists of too many parts")
        return super().read(size)


def open_header(data: bytes, given_up: Callable[[], bool] | None = None) -> ImageFile:
    """Return the image of encoded bytes, of which only the header has been read, without Pillow's limit on its size.

    Reading its pixels raises `CancelledError` once `given_up` returns True.
    """
    from PIL import Image

    allowed = formats()
    file = _LimitedBytes(data, given_up)
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=allowed)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if given_up is not None:
        image.decodermaxblock = _BLOCK
    return image


def sixteen_bit_peak(data: bytes) -> int | None:
    """Return the largest value of a 16-bit gray image; None for other images and for damaged ones."""
    try:
        with open_header(data) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I") else None
    except Exception:  # `load_image` gives the reason
        return None


def _check_png(data: bytes) -> None:
    """Raise `ValueError` for a wrong checksum of a part that an image needs, which Pillow does not compare.

    Source: PNG specification, section 5.3: an upper-case first letter marks these parts.
    """
    at = 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 8 + length
        if kind[:1].isupper() and end + 4 <= len(data):
            if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise ValueError(f"wrong checksum in {kind.decode('ascii', 'replace')}")
            if kind == b"IEND":
                return
        at = end + 4


def _too_large(image: Image, max_pixels: int) -> str:
    """Return the reason for an image of too many pixels."""
    size = f"{image.width} x {image.height} pixels"
    return f"too large: {size}, the limit is {max_pixels:,}. Fix: scale it down, or raise max_pixels"


def _package(data: bytes) -> str:
    """Return advice for HEIC images, which need a package. ISO 14496-12: a file starts with a box "ftyp"."""
    heic = data[4:8] == b"ftyp" and data[8:12] in (
        b"heic",
        b"heix",
        b"mif1",
        b"msf1",
        b"hevc",
        b"heim",
        b"heis",
    )
    return (
        '; it looks like HEIC, which needs: pip install "normfree[heic]"'
        if heic and "HEIF" not in formats()
        else ""
    )


def _upright(image: Image) -> Image:
    """Apply the EXIF orientation."""
    from PIL import ImageOps

    with contextlib.suppress(Exception):  # damaged EXIF is common, and then the orientation is unknown
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _refuse_unknown_range(image: Image, name: str) -> None:
    """Raise `ImageError` for pixel types that do not imply a range of values."""
    fix = "Fix: save it with 8 or 16 bits"
    if image.mode == "F":
        raise ImageError(name, f"floating-point pixels, whose range is unknown. {fix}")
    # Mode "I" from PNG and PPM holds 16-bit values, the most that these formats have; a TIFF's may have 32 bits.
    if image.mode == "I" and image.format == "TIFF":
        raise ImageError(name, f"32-bit integer pixels, whose range is unknown. {fix}")


def to_rgb(image: Image, *, pixel_range: int = FULL_RANGE) -> Image:
    """Return an image of PIL in mode RGB, as `load_image` returns those of files.

    Raises:
        ImageError: Its pixels have no known range.
    """
    _refuse_unknown_range(image, "the image")
    return _to_rgb(image, (255, 255, 255), pixel_range)


def _to_rgb(image: Image, background: tuple[int, int, int], pixel_range: int) -> Image:
    """Scale 16 bits to 8, compose transparent pixels over `background`, and convert to RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        values: Any = np.asarray(image).astype(np.int64)
        # The nearest of 256 levels. For the full range this is a division by 257.
        levels = (values * 255 + pixel_range // 2) // pixel_range
        image = Image.fromarray(np.minimum(levels, 255).astype(np.uint8))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` would copy all pixels
