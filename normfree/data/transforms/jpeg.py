"""Decode images to arrays: JPEG by simplejpeg if it is installed, everything else by `load_image`.

Both give the same pixels (libjpeg-turbo, accurate DCT, smooth upsampling). simplejpeg is faster because it writes three
bytes per pixel straight into an array. If it raises any error, `load_image` decodes the image or raises.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np

from normfree.data.transforms.decode import (
    DRAFT_ABOVE,
    FULL_RANGE,
    MAX_PIXELS,
    load_image,
    open_header,
    read_file,
)

_START = b"\xff\xd8\xff"
_MAY_TURN = (b"Exif\0\0", b"http://ns.adobe.com/xap/")  # segments where cameras store the orientation
_SCAN = 0xDA  # marker of a scan
_COUNTED = {*range(0xC0, 0xD0), *range(0xDA, 0xFF)}  # markers of segments that state their length
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_PLAIN = ("YCbCr", "Gray")  # not CMYK, YCCK or RGB, for which Pillow reads Adobe's markers


def load_array(
    source: str | os.PathLike[str] | bytes,
    *,
    name: str = "image bytes",
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    pixel_range: int = FULL_RANGE,
) -> np.ndarray:
    """Decode like `load_image`, with the same limits and errors, to uint8 H W 3; the array may be read-only.

    simplejpeg (extra `fast`) decodes JPEGs that have at most `max_pixels`, are upright, and gray or YCbCr. All others,
    also the truncated and damaged ones that it refuses, are decoded by `load_image`.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    name = name if isinstance(source, bytes) else os.fspath(source)
    found = _quick(data, min(max_pixels, DRAFT_ABOVE)) if data.startswith(_START) else None
    if found is not None:
        return found
    image = load_image(data, name=name, background=background, max_pixels=max_pixels, pixel_range=pixel_range)
    return np.asarray(image)


def _quick(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Decode with simplejpeg; return None if it is not installed or does not support the image."""
    codec = _codec()
    if codec is None:
        return None
    try:
        height, width, color_space, _ = codec.decode_jpeg_header(data)
        if height * width > max_pixels or color_space not in _PLAIN or not _upright(data):
            return None
        pixels: np.ndarray = codec.decode_jpeg(
            data, colorspace="RGB", fastdct=False, fastupsample=False, strict=True
        )
    except Exception:  # damaged; `load_image` reads it or raises
        return None
    return pixels


def _upright(data: bytes) -> bool:
    """Return True if the metadata do not ask for a rotation or reflection."""
    head = _head(data)
    if not any(mark in head for mark in _MAY_TURN):
        return True
    with open_header(data) as image:
        return image.getexif().get(_ORIENTATION, 1) == 1


def _head(data: bytes) -> bytes:
    """Return the segments before the first scan, which hold all metadata, or `data` if they cannot be parsed.

    Searching the scans as well would take a twentieth of the decoding time. ITU T.81, B.1.1: a segment is ff, a marker,
    and a length of two bytes that includes these two bytes.
    """
    at = len(_START) - 1
    while len(data) >= at + 4 and data[at] == 0xFF and data[at + 1] in _COUNTED:
        if data[at + 1] == _SCAN:
            return data[:at]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data


@cache
def _codec() -> Any:
    """Return the module simplejpeg, or None if it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg
