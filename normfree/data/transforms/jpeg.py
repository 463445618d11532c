"""Encoded pictures to arrays: JPEG through simplejpeg where it is installed, else, and for the rest, `load_image`.

Both ways give the same pixels (libjpeg-turbo, accurate DCT, smooth upsampling). simplejpeg is faster, as it writes
three bytes a pixel straight into an array. Whatever it does not take without a complaint goes to `load_image`, which
decides what is an error and words it.
"""

from __future__ import annotations

import io
import os
from functools import cache
from typing import Any

import numpy as np

from normfree.data.transforms.decode import FORMATS, MAX_PIXELS, load_image, read_file

_START = b"\xff\xd8\xff"
_MAY_TURN = (b"Exif\0\0", b"http://ns.adobe.com/xap/")  # where a camera writes which side is up
_SCAN, _COUNTED = 0xDA, {*range(0xC0, 0xD0), *range(0xDA, 0xFF)}  # markers; those between stand alone
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_PLAIN = ("YCbCr", "Gray")  # not CMYK, YCCK or RGB, which need Pillow's knowledge of Adobe's markers


def load_array(
    source: str | os.PathLike[str] | bytes,
    *,
    name: str = "image bytes",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """What `load_image` gives, as uint8 H W 3, with the same limits and errors; the array may be read-only.

    simplejpeg (extra `fast`) decodes JPEGs whose header names no more than `max_pixels`, that are upright, and grey or
    YCbCr. Truncated and damaged ones, which it refuses, and all others take `load_image`'s way.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    name = name if isinstance(source, bytes) else os.fspath(source)
    found = _quick(data, max_pixels) if data.startswith(_START) else None
    if found is not None:
        return found
    return np.asarray(load_image(data, name=name, background=background, max_pixels=max_pixels))


def _quick(data: bytes, max_pixels: int) -> np.ndarray | None:
    codec = _codec()
    if codec is None:
        return None
    try:
        height, width, colours, _ = codec.decode_jpeg_header(data)
        if height * width > max_pixels or colours not in _PLAIN or not _upright(data):
            return None
        pixels: np.ndarray = codec.decode_jpeg(
            data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True
        )
    except Exception:  # damaged; `load_image` says how, or reads it after all
        return None
    return pixels


def _upright(data: bytes) -> bool:
    head = _head(data)
    if not any(mark in head for mark in _MAY_TURN):
        return True
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # the header alone
        return image.getexif().get(_ORIENTATION, 1) == 1


def _head(data: bytes) -> bytes:
    """The segments before the first scan, where all notes about a picture are; everything if they cannot be told apart.

    Searching the scans too would take a twentieth of the time of decoding. ITU T.81, B.1.1: a segment is ff, a marker,
    and two bytes that count themselves and what follows.
    """
    at = len(_START) - 1
    while len(data) >= at + 4 and data[at] == 0xFF and data[at + 1] in _COUNTED:
        if data[at + 1] == _SCAN:
            return data[:at]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data


@cache
def _codec() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
