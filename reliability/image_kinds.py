"""Kinds of malformed and unusual image files, made from a seed, and the reason that an audit must give for each.

A kind with the reason "" is an image that can be used.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

EMPTY, DAMAGED, OTHER, LARGE = "the file is empty", "damaged: ", "not an image", "too large: "
Random = random.Random


@dataclass(frozen=True)
class Kind:
    """How files of one kind are made.

    Attributes:
        reason: how the reason of the audit begins, or several ways; "" for images that can be used.
        make: from a random generator to the content; or writes to a path and returns None, if it takes two arguments.
        name: of the file, with {} for a number.
    """

    reason: str | tuple[str, ...]
    make: Callable[..., bytes | None]
    name: str = "{}.jpg"


def write(kind: str, folder: Path, rng: Random) -> Path:
    """Write one file of a kind to a folder; return its path."""
    made = KINDS[kind]
    path = folder / made.name.format(f"{list(KINDS).index(kind)}_{rng.randrange(1000)}")
    content = made.make(rng) if made.make.__code__.co_argcount == 1 else made.make(rng, path)
    if content is not None:
        path.write_bytes(content)
    return path


# --- parts ----------------------------------------------------------------------------------------------------


def pixels(rng: Random, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image of random pixels."""
    width, height = size or (rng.randrange(20, 60), rng.randrange(20, 60))
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def saved(kind: str, mode: str = "RGB", **options: Any) -> Callable[[Random], bytes]:
    """Return a function that encodes an image."""

    def make(rng: Random) -> bytes:
        out = io.BytesIO()
        pixels(rng, mode).save(out, kind, **options)
        return out.getvalue()

    return make


def changed(kind: str, change: Callable[[bytes, Random], bytes], **options: Any) -> Callable[[Random], bytes]:
    """Return a function that encodes an image and changes the bytes."""
    return lambda rng: change(saved(kind, **options)(rng), rng)


def cut(low: float, high: float) -> Callable[[bytes, Random], bytes]:
    """Return a function that keeps a fraction between `low` and `high` of the bytes."""
    return lambda data, rng: data[: int(len(data) * rng.uniform(low, high))]


def constant(data: bytes) -> Callable[[Random], bytes]:
    """Return a function that returns `data`, and some random bytes that make each file different."""
    return lambda rng: data + b"\n" + str(rng.randrange(10**6)).encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *, kind: tuple[int, int] = (8, 2)) -> bytes:
    """Return a PNG with any header and any compressed data; `kind` is bit depth and color type."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, *kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_checksum(data: bytes, rng: Random) -> bytes:
    """Return a PNG with a wrong checksum of its pixels."""
    at = data.index(b"IDAT") + 4 + int.from_bytes(data[data.index(b"IDAT") - 4 : data.index(b"IDAT")])
    return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]


def without_table(data: bytes, rng: Random) -> bytes:
    """Return a JPEG without its Huffman tables."""
    while (at := data.find(b"\xff\xc4")) >= 0:
        length = int.from_bytes(data[at + 2 : at + 4])
        data = data[:at] + data[at + 2 + length :]
    return data


def twelve_bits(data: bytes, rng: Random) -> bytes:
    """Return a JPEG whose header states 12 bits for each sample."""
    at = data.index(b"\xff\xc0") + 4
    return data[:at] + b"\x0c" + data[at + 1 :]


def huge(data: bytes, rng: Random) -> bytes:
    """Return a JPEG whose header states 65,000 x 65,000 pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65_000, 65_000 - rng.randrange(99)) + data[at + 4 :]


def huge_screen(data: bytes, rng: Random) -> bytes:
    """Return a GIF whose header states 65,000 x 65,000 pixels."""
    return data[:6] + struct.pack("<HH", 65_000, 65_000 - rng.randrange(99)) + data[10:]


def archive(rng: Random) -> bytes:
    """Return a ZIP with an image."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("a.jpg", saved("JPEG")(rng))
    return out.getvalue()


def tape(rng: Random) -> bytes:
    """Return a tar with an image."""
    out, data = io.BytesIO(), saved("JPEG")(rng)
    with tarfile.open(fileobj=out, mode="w") as made:
        about = tarfile.TarInfo("a.jpg")
        about.size = len(data)
        made.addfile(about, io.BytesIO(data))
    return out.getvalue()


def rotated(orientation: int) -> Callable[[Random], bytes]:
    """Return a function that encodes a JPEG with an EXIF orientation."""

    def make(rng: Random) -> bytes:
        out, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = orientation
        pixels(rng).save(out, "JPEG", exif=exif)
        return out.getvalue()

    return make


def broken_exif(rng: Random) -> bytes:
    """Return a JPEG whose EXIF is noise."""
    out = io.BytesIO()
    pixels(rng).save(out, "JPEG", exif=b"Exif\0\0II*\0" + rng.randbytes(200))
    return out.getvalue()


def sixteen_bits(kind: str) -> Callable[[Random], bytes]:
    """Return a function that encodes a gray image of 16 bits."""

    def make(rng: Random) -> bytes:
        out = io.BytesIO()
        values = np.random.default_rng(rng.randrange(2**32)).integers(0, 65_536, (20, 30), dtype=np.uint16)
        Image.fromarray(values).save(out, kind)
        return out.getvalue()

    return make


def floats(rng: Random) -> bytes:
    """Return a TIFF of floating-point pixels."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(rng.randrange(2**32)).random((20, 30), dtype=np.float32)).save(
        out, "TIFF"
    )
    return out.getvalue()


def animated(kind: str) -> Callable[[Random], bytes]:
    """Return a function that encodes several images in one file."""

    def make(rng: Random) -> bytes:
        out, size = io.BytesIO(), (24, 24)
        frames = [pixels(rng, size=size) for _ in range(3)]
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        return out.getvalue()

    return make


def of_size(width: int, height: int, kind: str = "PNG") -> Callable[[Random], bytes]:
    """Return a function that encodes an image of one color and of this size."""

    def make(rng: Random) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (width, height), (rng.randrange(256), 0, 0)).save(out, kind)
        return out.getvalue()

    return make


def bomb(rng: Random) -> bytes:
    """Return a small PNG that states 400 megapixels."""
    return png(20_000, 20_000 + rng.randrange(100), zlib.compress(bytes(10_000)))


def lying(rng: Random) -> bytes:
    """Return a PNG with fewer pixels than its header states."""
    return png(200, 200, zlib.compress(rng.randbytes(1000)))


# --- files that are no regular ones -----------------------------------------------------------------------------


def pipe(rng: Random, path: Path) -> None:
    """Make a pipe, which no process writes to."""
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Random, Path], None]:
    """Return a function that makes a symbolic link; {} is the name of the link."""
    return lambda rng, path: path.symlink_to(target.format(path.name))


def folder(rng: Random, path: Path) -> None:
    """Make a folder."""
    path.mkdir()


def sparse(rng: Random, path: Path) -> None:
    """Make a file of 40 GB that takes no space."""
    path.write_bytes(b"\xff\xd8\xff")
    os.truncate(path, 40_000_000_000 + rng.randrange(1000))


def good(rng: Random) -> bytes:
    """Return an ordinary JPEG."""
    return saved("JPEG")(rng)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch ran) (w) file\nshowpage\n"
KINDS: dict[str, Kind] = {
    "empty": Kind(EMPTY, lambda rng: b""),
    "one byte": Kind(OTHER, lambda rng: rng.randbytes(1)),
    "noise": Kind(OTHER, lambda rng: b"\0" + rng.randbytes(rng.randrange(100, 5000))),
    "JPEG, magic only": Kind(OTHER, constant(b"\xff\xd8\xff")),
    "PNG, magic only": Kind(OTHER, constant(b"\x89PNG\r\n\x1a\n"), "{}.png"),
    "JPEG, cut near its start": Kind((OTHER, DAMAGED), changed("JPEG", cut(0.02, 0.4))),
    "JPEG, cut in the middle": Kind(DAMAGED, changed("JPEG", cut(0.5, 0.8), quality=95)),
    "JPEG, cut near its end": Kind(DAMAGED, changed("JPEG", cut(0.9, 0.97), quality=95)),
    "JPEG without its end": Kind(DAMAGED, changed("JPEG", lambda data, rng: data[:-12], quality=95)),
    "JPEG without tables": Kind("", changed("JPEG", without_table)),
    "JPEG of 12 bits": Kind(OTHER, changed("JPEG", twelve_bits)),
    "PNG, cut in the middle": Kind(DAMAGED, changed("PNG", cut(0.3, 0.8)), "{}.png"),
    "PNG, wrong checksum": Kind(DAMAGED, changed("PNG", bad_checksum), "{}.png"),
    "PNG, too few pixels": Kind(DAMAGED, lying, "{}.png"),
    "PNG, no compressed data": Kind(DAMAGED, lambda rng: png(9, 9, rng.randbytes(99)), "{}.png"),
    "PNG, unknown depth": Kind(OTHER, lambda rng: png(9, 9, b"", kind=(7, rng.randrange(8, 99))), "{}.png"),
    "GIF, cut in the middle": Kind(DAMAGED, changed("GIF", cut(0.6, 0.9)), "{}.gif"),
    "WebP, cut in the middle": Kind(DAMAGED, changed("WEBP", cut(0.3, 0.8)), "{}.webp"),
    "BMP, cut in the middle": Kind(DAMAGED, changed("BMP", cut(0.3, 0.8)), "{}.bmp"),
    "TIFF, cut in the middle": Kind((OTHER, DAMAGED), changed("TIFF", cut(0.1, 0.8)), "{}.tif"),
    "PPM, cut in the middle": Kind(DAMAGED, changed("PPM", cut(0.3, 0.8)), "{}.ppm"),
    "PNG of 400 megapixels": Kind(LARGE, bomb, "{}.png"),
    "JPEG of 4,225 megapixels": Kind(LARGE, changed("JPEG", huge)),
    "GIF of 4,225 megapixels": Kind(LARGE, changed("GIF", huge_screen), "{}.gif"),
    "text": Kind(OTHER, constant(b"this is not an image")),
    "error page": Kind(OTHER, constant(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")),
    "JSON": Kind(OTHER, lambda rng: json.dumps({"error": rng.random()}).encode()),
    "pointer of Git LFS": Kind(OTHER, constant(LFS)),
    "PDF": Kind(OTHER, constant(b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj"), "{}.jpeg"),
    "EPS": Kind(OTHER, constant(EPS)),
    "SVG": Kind(OTHER, constant(b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')),
    "ZIP": Kind(OTHER, archive),
    "tar": Kind(OTHER, tape),
    "pickle": Kind(OTHER, lambda rng: pickle.dumps([rng.random()])),
    "HEIC, header only": Kind(OTHER, constant(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")),
    "folder": Kind("a folder", folder),
    "floating-point TIFF": Kind("floating-point pixels", floats, "{}.tiff"),
    "sparse file of 40 GB": Kind("40,000,000,", sparse),
    "pipe": Kind("not a regular file", pipe),
    "link to a device": Kind("not a regular file", link_to("/dev/zero")),
    "link to itself": Kind("cannot be read", link_to("{}")),
    "broken link": Kind("no such file", link_to("nowhere")),
    # images that can be used
    "JPEG": Kind("", good),
    "progressive JPEG": Kind("", saved("JPEG", progressive=True)),
    "gray JPEG": Kind("", saved("JPEG", "L")),
    "CMYK JPEG": Kind("", saved("JPEG", "CMYK")),
    "PNG named .jpg": Kind("", saved("PNG")),
    "WebP named .png": Kind("", saved("WEBP"), "{}.png"),
    "BMP": Kind("", saved("BMP"), "{}.BMP"),
    "GIF": Kind("", saved("GIF", "P"), "{}.gif"),
    "TIFF": Kind("", saved("TIFF"), "{}.tif"),
    "palette": Kind("", saved("PNG", "P"), "{}.png"),
    "transparent palette": Kind("", saved("PNG", "P", transparency=0), "{}.png"),
    "RGBA": Kind("", saved("PNG", "RGBA"), "{}.png"),
    "gray with alpha": Kind("", saved("PNG", "LA"), "{}.png"),
    "one bit": Kind("", saved("PNG", "1"), "{}.png"),
    "PNG of 16 bits": Kind("", sixteen_bits("PNG"), "{}.png"),
    "TIFF of 16 bits": Kind("", sixteen_bits("TIFF"), "{}.tif"),
    "animated GIF": Kind("", animated("GIF"), "{}.gif"),
    "animated PNG": Kind("", animated("PNG"), "{}.png"),
    "TIFF of several pages": Kind("", animated("TIFF"), "{}.tif"),
    **{f"EXIF orientation {n}": Kind("", rotated(n)) for n in (3, 6, 8)},
    "broken EXIF": Kind("", broken_exif),
    "trailing bytes": Kind("", lambda rng: good(rng) + rng.randbytes(100)),
    "large ICC profile": Kind("", saved("JPEG", icc_profile=bytes(100_000))),
    "1 x 1": Kind("", of_size(1, 1), "{}.png"),
    "1 x 4000": Kind("", of_size(1, 4000), "{}.png"),
    "20,000 x 1": Kind("", of_size(20_000, 1), "{}.png"),
    "36 megapixels": Kind("", of_size(6000, 6000), "{}.png"),
    "upper-case suffix": Kind("", good, "{}.JPG"),
    "name of 240 bytes": Kind("", good, "x" * 225 + "{}.jpg"),
    "name with a line break": Kind("", good, "a\nb {}.jpg"),
    "name with an escape code": Kind("", good, "\x1b[31m{}.jpg"),
    "name that is not UTF-8": Kind("", good, "\udcff\udcfe{}.jpg"),
    "name with a leading dash": Kind("", good, "--{}.jpg"),
    "name with quotes": Kind("", good, "'\"$(touch ran){}.jpg"),
    "name from right to left": Kind("", good, "\u202egpj.{}.jpg"),
}  # fmt: skip
