"""Laws of images: decoding, orientation, and the geometry of resizing, cropping and padding."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from normfree.data.transforms.decode import ImageError, load_image, open_header
from normfree.data.transforms.evaluate import BAR, eval_transform
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import train_transform
from normfree.ops.padding import pad_input, same_padding

side = st.integers(1, 12)
bytes_ = st.integers(0, 255)
rgb = arrays.arrays(np.uint8, st.tuples(side, side, st.just(3)), elements=bytes_)
EXIF_ORIENTATION = 0x0112


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@given(rgb, st.sampled_from(["PNG", "BMP", "TIFF", "PPM", "WEBP"]))
def test_a_lossless_image_has_the_pixels_that_were_saved(pixels, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(load_image(encoded(Image.fromarray(pixels), kind, **options)), pixels)


@given(rgb, st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"]))
def test_the_header_has_the_size_of_the_image(pixels, kind):
    data = encoded(Image.fromarray(pixels), kind)
    with open_header(data) as image:
        assert image.size == (pixels.shape[1], pixels.shape[0]) == load_image(data).size


@given(side, side, st.integers(1, 150))
def test_an_image_is_refused_if_and_only_if_it_has_too_many_pixels(width, height, limit):
    data = encoded(Image.new("RGB", (width, height)))
    try:
        load_image(data, max_pixels=limit)
        assert width * height <= limit
    except ImageError as error:
        assert "too large" in str(error)
        assert width * height > limit


@given(rgb, st.integers(1, 8))
def test_the_orientation_of_a_camera_is_applied_once(pixels, orientation):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    # Exif 2.3, table 6: the side of the image at which row 0 and column 0 of the file are shown.
    upright = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.swapaxes(0, 1), 6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1), 8: pixels[:, ::-1].swapaxes(0, 1),
    }[orientation]  # fmt: skip
    shown = load_image(encoded(image, exif=exif))
    assert np.array_equal(shown, upright)
    assert np.array_equal(load_image(encoded(shown)), upright)


@given(arrays.arrays(np.uint16, st.tuples(side, side)), st.integers(1, 65_535))
def test_sixteen_bits_keep_their_order_and_their_ends(pixels, pixel_range):
    levels = np.asarray(load_image(encoded(Image.fromarray(pixels)), pixel_range=pixel_range))
    assert np.array_equal(levels[..., 0], levels[..., 2])
    shown, values = levels[..., 0].astype(int).ravel(), pixels.astype(int).ravel()
    order = np.argsort(values)
    assert (np.diff(shown[order]) >= 0).all()
    assert (np.abs(shown - np.minimum(values / pixel_range, 1) * 255) <= 0.5).all()


@given(st.tuples(bytes_, bytes_, bytes_), bytes_, st.tuples(bytes_, bytes_, bytes_))
def test_a_transparent_color_is_between_itself_and_the_background(color, alpha, background):
    data = encoded(Image.new("RGBA", (1, 1), (*color, alpha)))
    shown = load_image(data, background=background).getpixel((0, 0))
    for got, own, under in zip(shown, color, background, strict=True):
        assert abs(got - (alpha * own + (255 - alpha) * under) / 255) <= 1


@pytest.mark.filterwarnings("ignore")  # of Pillow
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"]), st.data())
def test_a_damaged_image_is_an_image_or_an_image_error_that_names_it(kind, data):
    content = bytearray(encoded(Image.new("RGB", (9, 7), "red"), kind))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(bytes_)
    cut = data.draw(st.integers(0, len(content)))
    try:
        assert load_image(bytes(content[:cut]), name="cat", max_pixels=10**6).mode == "RGB"
    except ImageError as error:
        assert str(error).startswith("cat: ")


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=60))
@example(b"")
@example(b"\x89PNG\r\n\x1a\n")
@example(b"P6 9999999999 9999999999 255\n")
@example(b"II*\0\x08\0\0\0\xff\xff")
def test_any_bytes_are_an_image_or_an_image_error(data):
    with contextlib.suppress(ImageError):
        assert load_image(data, max_pixels=10**6).mode == "RGB"


target = st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))
crops = st.sampled_from(["resize_crop_32", "crop_resize", "squash", "center", "letterbox"])


@given(target, crops, st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 1.0))
def test_every_crop_has_the_size_that_was_asked_for(size, crop, width, height, pct):
    height_, width_ = (size, size) if isinstance(size, int) else size
    transform = eval_transform(image_size=size, crop=crop, crop_pct=pct)
    result = transform(Image.new("RGB", (width, height), (10, 200, 30)))
    assert result.dtype == torch.uint8
    assert result.shape == (3, height_, width_)
    if crop != "letterbox":  # a plain color stays one
        assert (result == torch.tensor([10, 200, 30]).view(3, 1, 1)).all()


@given(target, crops, st.integers(1, 300), st.integers(1, 300))
def test_what_a_crop_shows_is_the_middle_of_the_image(size, crop, width, height):
    left, top, right, bottom = eval_transform(image_size=size, crop=crop).box(width, height)
    assert right > left
    assert bottom > top
    across, down = (right - left) / width, (bottom - top) / height
    if crop == "letterbox":
        assert across > 1 - 1e-9
        assert down > 1 - 1e-9
    else:
        assert left >= -1e-9
        assert top >= -1e-9
        assert right <= width * (1 + 1e-9)
        assert bottom <= height * (1 + 1e-9)
    # Rounding moves the middle by at most one pixel of the result, or of the image.
    height_, width_ = (size, size) if isinstance(size, int) else size
    assert abs(left + right - width) <= max(1.0, (right - left) / width_) + 1e-6
    assert abs(top + bottom - height) <= max(1.0, (bottom - top) / height_) + 1e-6


@given(target, st.integers(1, 300), st.integers(1, 300))
def test_a_letterbox_has_the_whole_image_in_its_aspect_between_equal_bars(size, width, height):
    height_, width_ = (size, size) if isinstance(size, int) else size
    result = eval_transform(image_size=size, crop="letterbox")(Image.new("RGB", (width, height), (255, 0, 0)))
    inside = (result != torch.tensor(BAR).view(3, 1, 1)).all(0)
    rows, columns = inside.any(1).nonzero().flatten().tolist(), inside.any(0).nonzero().flatten().tolist()
    wide, tall = len(columns), len(rows)
    assert wide == width_ or tall == height_
    scale = min(width_ / width, height_ / height)
    assert abs(wide - max(1, width * scale)) <= 0.5
    assert abs(tall - max(1, height * scale)) <= 0.5
    assert 0 <= (width_ - 1 - columns[-1]) - columns[0] <= 1
    assert 0 <= (height_ - 1 - rows[-1]) - rows[0] <= 1


@given(st.text(max_size=10), st.sampled_from(["", "tv:", "simclr:", "1x"]))
@example("x9", "tv:")
@example("inf", "simclr:")
@example("99999999999999999999x1", "")
def test_any_augmentation_is_made_or_a_value_error(text, prefix):
    with contextlib.suppress(ValueError):
        train_transform(image_size=8, randaugment=prefix + text)


@given(rgb, st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_normalized_pixels_give_the_pixels_again(pixels, mean, std):
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = normalize(images, mean=[mean] * 3, std=[std] * 3, dtype=torch.float64)
    assert torch.equal(((found * std + mean) * 255).round().to(torch.uint8), images)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 4))
def test_same_padding_gives_a_result_for_each_stride(size, kernel_size, stride):
    low, high = same_padding(size, kernel_size, stride)
    assert 0 <= high - low <= 1
    outputs = (size + low + high - kernel_size) // stride + 1
    assert outputs == math.ceil(size / stride)
    assert (
        low + high == 0 or size + low + high == (outputs - 1) * stride + kernel_size
    )  # no more than is needed


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3, 5, 7]), st.integers(1, 3),
       st.sampled_from(["same", "symmetric"]))  # fmt: skip
def test_both_paddings_give_as_many_outputs(height, width, kernel_size, stride, padding):
    x, sides = pad_input(torch.ones(1, 1, height, width), kernel_size, stride, padding=padding)
    y = torch.nn.functional.max_pool2d(
        torch.nn.functional.pad(x, (sides[1], sides[1], sides[0], sides[0])), kernel_size, stride
    )
    assert y.shape[2:] == (math.ceil(height / stride), math.ceil(width / stride))
    assert (y == 1).all()
