from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normfree.data.transforms.decode import (
    DRAFT_ABOVE,
    ImageError,
    formats,
    load_image,
    read_file,
    sixteen_bit_peak,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    return Image.fromarray(np.stack([u * 5, v * 7, u + v], axis=2).astype(np.uint8))


def reason(source: str | bytes, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(source, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(kind: str) -> None:
    assert np.array_equal(np.asarray(load_image(encode(photo(), kind))), np.asarray(photo()))


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(photo()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_truncated_file_is_an_error(kind: str, share: float) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, kind)
    assert load_image(data).size == (64, 64)
    reason(data[: int(len(data) * share)])


def test_files_that_are_no_images(tmp_path: Path) -> None:
    kinds = ", ".join(formats())
    (tmp_path / "dir.jpg").mkdir()
    (tmp_path / "text.jpg").write_text("hello, I am a text")
    (tmp_path / "empty.jpg").touch()
    assert reason(str(tmp_path / "dir.jpg")) == "a folder, not a file"
    assert reason(str(tmp_path / "text.jpg")) == f"not an image, or not one of {kinds}"
    assert reason(str(tmp_path / "empty.jpg")) == "the file is empty"
    assert reason(str(tmp_path / "none.jpg")) == "no such file"
    assert reason(b"") == "the file is empty"


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_formats_that_start_an_interpreter_are_refused(kind: str) -> None:
    assert reason(encode(photo(), kind)).startswith("not an image, or not one of")


def test_an_error_says_the_file_and_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "none.jpg")
    text = f"{tmp_path / 'none.jpg'}: no such file"
    assert str(caught.value) == text
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.name, again.reason) == (text, str(tmp_path / "none.jpg"), "no such file")


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_by_its_header() -> None:
    # The pixels of these files do not exist, so any attempt to decode would say "damaged".
    fix = "the limit is 256,000,000. Fix: scale it down, or raise max_pixels"
    for side in (16_001, 60_000):
        assert reason(huge_png(side)) == f"too large: {side} x {side} pixels, {fix}"
    limit = Image.MAX_IMAGE_PIXELS
    assert reason(huge_png(14_000)).startswith("damaged")  # 196 megapixels; Pillow alone would refuse or warn
    assert limit == Image.MAX_IMAGE_PIXELS
    assert reason(encode(photo(), "PNG"), max_pixels=1199).startswith(
        "too large: 40 x 30 pixels, the limit is 1,199"
    )
    assert load_image(encode(photo(), "PNG"), max_pixels=1200).size == (40, 30)


def test_an_image_of_many_parts_is_refused() -> None:
    """Pillow reads each chunk of a PNG and each segment of a JPEG by calls in Python."""
    text = struct.pack(">I", 3) + b"tEXtk\0v" + struct.pack(">I", zlib.crc32(b"tEXtk\0v"))
    png, jpeg = encode(photo(), "PNG"), encode(photo(), "JPEG")
    for start, part, end in ((png[:33], text, png[33:]), (jpeg[:2], b"\xff\xfe\0\2", jpeg[2:])):
        assert load_image(start + 1_000 * part + end).size == (40, 30)
        assert reason(start + 30_000 * part + end) == "damaged: it consists of too many parts"
    pieces = [encode(photo((900, 900)), "PNG")]
    body = pieces[0][33:-12]
    while body:  # as encoders write them, in chunks of a kilobyte
        length = struct.unpack(">I", body[:4])[0]
        data, body = body[8 : 8 + length], body[12 + length :]
        for at in range(0, length, 1024):
            piece = b"IDAT" + data[at : at + 1024]
            pieces.append(struct.pack(">I", len(piece) - 4) + piece + struct.pack(">I", zlib.crc32(piece)))
    assert load_image(pieces[0][:33] + b"".join(pieces[1:]) + png[-12:]).size == (900, 900)


def test_transparency_is_laid_over_the_background() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (255, 0, 0, 128))
    data = encode(image, "PNG")
    assert np.asarray(load_image(data))[0, :2].tolist() == [list(WHITE), list(RED)]
    assert np.asarray(load_image(data))[0, 2].tolist() == pytest.approx([255, 127, 127], abs=1)
    assert np.asarray(load_image(data, background=(0, 0, 9)))[0, :2].tolist() == [[0, 0, 9], list(RED)]


def test_a_palette_with_a_transparent_color() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(load_image(encode(image, "PNG"))).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(load_image(encode(image, "PNG", transparency=0))).tolist() == [
        [list(WHITE), [200, 100, 50]]
    ]


def test_gray_one_bit_and_cmyk() -> None:
    assert np.asarray(load_image(encode(Image.new("L", (1, 1), 77), "PNG"))).tolist() == [[[77, 77, 77]]]
    assert np.asarray(load_image(encode(Image.new("1", (1, 1), 1), "PNG"))).tolist() == [[list(WHITE)]]
    for kind in ("JPEG", "TIFF"):
        cmyk = np.asarray(load_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), kind)))
        assert np.abs(cmyk.astype(int) - RED).max() <= 3, kind


def test_sixteen_bit_gray_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 25700, 32896, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 1, 100, 128, 255]  # value / 257, to the nearest
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load_image(encode(Image.fromarray(values), kind)))[0, :, 1].tolist() == expected, (
            kind
        )
    pgm = b"P5 7 1 65535\n" + values.astype(">u2").tobytes()
    assert np.asarray(load_image(pgm))[0, :, 1].tolist() == expected


def test_pixels_of_unknown_range_are_refused() -> None:
    save = "Fix: save it with 8 or 16 bits"
    real = encode(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "TIFF")
    whole = encode(Image.fromarray(np.full((4, 4), 70000, dtype=np.int32)), "TIFF")
    assert reason(real) == f"floating-point pixels, whose range is unknown. {save}"
    assert reason(whole) == f"32-bit integer pixels, whose range is unknown. {save}"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied_once(kind: str) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste(RED, (0, 0, 16, 16))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF 2.32: the camera was turned, the left edge is the top edge
    upright = np.asarray(load_image(encode(image, kind, exif=exif))).astype(int)
    assert upright.shape == (32, 16, 3)
    assert np.abs(upright[4, 8] - RED).max() < 20
    assert np.abs(upright[27, 8] - (0, 0, 255)).max() < 20


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's remark
def test_damaged_exif_next_to_sound_pixels_is_forgiven() -> None:
    data = encode(photo(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12\x00")
    assert load_image(data).size == (40, 30)


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert np.asarray(load_image(data))[4, 4].tolist() == list(RED)


def test_random_damage_ends_in_a_image_or_an_image_error() -> None:
    rng = np.random.default_rng(0)
    sound = [encode(photo(), kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP")]
    outcomes = [0, 0]
    for trial in range(300):
        data = bytearray(sound[trial % len(sound)])
        for position in rng.integers(0, len(data), size=rng.integers(1, 12)):
            data[position] = rng.integers(0, 256)
        try:
            outcomes[0] += load_image(bytes(data)).mode == "RGB"
        except ImageError:
            outcomes[1] += 1
    assert sum(outcomes) == 300
    assert min(outcomes) > 20


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="no file system with sizes of 0 is at hand"
)
def test_a_file_whose_size_is_given_as_0_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    assert read_file(tmp_path / "a") == bytes(1000)
    assert os.stat("/proc/self/status").st_size == 0
    assert read_file("/proc/self/status").startswith(b"Name:")


def test_a_sparse_file_of_40_gigabytes_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff")
    os.truncate(path, 40_000_000_000)  # takes no space on the disk
    with pytest.raises(ImageError, match=r"40,000,000,000 bytes, the limit is 1,000,000,000$"):
        load_image(path)


def test_white_of_sixteen_bit_images_can_be_stated() -> None:
    values = np.array([[0, 8, 9, 2048, 4095, 5000]], dtype=np.uint16)
    data = encode(Image.fromarray(values), "PNG")
    expected = [0, 0, 1, 128, 255, 255]  # value * 255 / 4095, to the nearest, and at most white
    assert np.asarray(load_image(data, pixel_range=4095))[0, :, 0].tolist() == expected
    assert sixteen_bit_peak(data) == 5000
    assert sixteen_bit_peak(encode(photo(), "PNG")) is None
    assert sixteen_bit_peak(b"nonsense") is None


def test_avif_is_read() -> None:
    if "AVIF" not in formats():
        pytest.skip("Pillow was built without AVIF")
    decoded = np.asarray(load_image(encode(photo(), "AVIF", quality=95))).astype(int)
    assert np.abs(decoded - np.asarray(photo())).mean() < 4


def test_heic_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.data.transforms.decode.formats", lambda: ("JPEG", "PNG"))
    header = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
    assert reason(header).endswith('it looks like HEIC, which needs: pip install "normfree[heic]"')


def test_a_large_jpeg_is_decoded_at_half_size_by_both_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    from normfree.data.transforms import decode, jpeg

    assert DRAFT_ABOVE == 64_000_000
    data = encode(photo((64, 48)), "JPEG", quality=95)
    assert load_image(data).size == (64, 48)
    for module in (decode, jpeg):
        monkeypatch.setattr(module, "DRAFT_ABOVE", 1000)
    small = load_image(data)
    assert small.size == (32, 24)
    assert np.array_equal(jpeg.load_array(data), np.asarray(small))
    png = encode(photo((64, 48)), "PNG")
    assert load_image(png).size == (64, 48)


@pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_with_a_wrong_checksum_is_damaged(chunk):
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, "PNG")
    data = bytearray(out.getvalue())
    at = data.index(chunk)
    data[at + 4 + int.from_bytes(data[at - 4 : at])] ^= 1  # the first byte of the checksum
    with pytest.raises(ImageError):
        load_image(bytes(data))
