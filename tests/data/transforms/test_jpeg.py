from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from normfree.data.sources.folders import FolderSource
from normfree.data.transforms import jpeg
from normfree.data.transforms.decode import ImageError, load_image
from normfree.data.transforms.jpeg import load_array


def photo(width: int = 83, height: int = 61, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return smooth.convert(mode)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for each call whether simplejpeg decoded the image."""
    taken: list[bool] = []
    decode = jpeg._quick

    def spy(data: bytes, max_pixels: int) -> np.ndarray | None:
        found = decode(data, max_pixels)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(jpeg, "_quick", spy)
    return taken


@pytest.mark.parametrize("size", [(83, 61), (64, 64), (1, 1), (17, 300), (500, 375)])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{"quality": 92}, {"quality": 30}, {"progressive": True}, {"optimize": True}]
)
def test_pixels_are_pillows_to_the_bit(
    size: tuple[int, int], subsampling: int, options: dict[str, Any], quick: list[bool]
) -> None:
    data = encode(photo(*size), subsampling=subsampling, **options)
    assert np.array_equal(load_array(data), np.asarray(load_image(data)))
    assert quick == [True]


def test_gray_is_quick_and_other_colors_are_pillows(quick: list[bool]) -> None:
    gray, ink = encode(photo(mode="L")), encode(photo(mode="CMYK"))
    plain = encode(photo(), keep_rgb=True)
    for data in (gray, ink, plain):
        assert np.array_equal(load_array(data), np.asarray(load_image(data)))
    assert quick == [True, False, False]


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(payload) + 2).to_bytes(2, "big") + payload


def test_notes_are_looked_for_before_the_first_scan_and_nowhere_else(quick: list[bool]) -> None:
    data = encode(photo(), comment=b"before")
    scan = data.index(b"\xff\xda")
    assert jpeg._head(data) == data[:scan]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = (
        data[:2] + segment(0xE2, b"\xff\xda in a color profile") + segment(0xE1, exif.tobytes()) + data[2:]
    )
    assert np.array_equal(load_array(turned), np.asarray(load_image(turned)))
    behind = data + b"Exif\0\0"  # what follows the image turns nothing
    assert np.array_equal(load_array(behind), np.asarray(load_image(behind)))
    assert quick == [False, True]


@pytest.mark.parametrize("cut", [2, 3, 5, 30])
def test_a_head_that_cannot_be_read_is_everything(cut: int) -> None:
    data = encode(photo())
    assert jpeg._head(data[:cut]) == data[:cut]
    odd = data[:2] + b"\xff\xff" + data[2:]  # a fill byte
    assert jpeg._head(odd) == odd


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_upright(orientation: int, quick: list[bool]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), exif=exif)
    assert np.array_equal(load_array(data), np.asarray(load_image(data)))
    assert load_array(data).shape == ((61, 83, 3) if orientation < 5 else (83, 61, 3))
    assert quick[0] == (orientation == 1)


def test_orientation_in_xmp_counts_too(quick: list[bool]) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    data = encode(photo(), xmp=xmp)
    assert np.array_equal(load_array(data), np.asarray(load_image(data)))
    assert quick == [False]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_go_to_pillow(kind: str, quick: list[bool]) -> None:
    data = encode(photo(), kind)
    assert np.array_equal(load_array(data), np.asarray(load_image(data)))
    assert quick == []


def outcome(read: Any, data: bytes) -> Any:
    try:
        return np.asarray(read(data, max_pixels=100_000)).tobytes()
    except ImageError as error:
        return str(error)


def test_damage_has_the_same_outcome_as_with_pillow() -> None:
    # Truncations and overwritten bytes: the same pixels, or the same error name for name.
    rng = np.random.default_rng(0)
    errors = 0
    for options in ({}, {"progressive": True}):
        data = encode(photo(), quality=80, **options)
        cases = [data[:n] for n in range(0, len(data), 23)]
        for _ in range(200):
            damaged = bytearray(data)
            damaged[int(rng.integers(2, len(data)))] = int(rng.integers(0, 256))
            cases.append(bytes(damaged))
        for case in [*cases, data + b"trailing"]:
            wanted = outcome(load_image, case)
            assert outcome(load_array, case) == wanted
            errors += isinstance(wanted, str)
    assert errors > 100


def test_the_header_is_held_against_the_limit_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(photo())
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ImageError) as caught:
        load_array(data, name="x", max_pixels=5000)
    text = "x: too large: 83 x 61 pixels, the limit is 5,000. Fix: scale it down, or raise max_pixels"
    assert str(caught.value) == text


def test_files_without_the_package_and_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photo()))
    source = FolderSource(tmp_path, [("a.jpg", 0), ("b.jpg", 0)], classes="ab")
    wanted = np.asarray(source.image(0))
    assert np.array_equal(source.pixels(0), wanted)
    monkeypatch.setattr(jpeg, "_codec", lambda: None)
    assert np.array_equal(source.pixels(0), wanted)
    with pytest.raises(ImageError, match=r"b\.jpg: no such file$"):
        source.pixels(1)
