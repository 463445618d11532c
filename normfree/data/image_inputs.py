"""The images that a user names: files, folders, patterns, URLs, videos, cameras, and images in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normfree.data.remote_image import download, is_url, require_online, suffix_of
from normfree.data.transforms.decode import MAX_BYTES, ImageError, load_image, to_rgb
from normfree.data.video_frames import CAMERA, VIDEO_SUFFIXES, Frame, require_video, video_frames
from normfree.data.walk import expanded, find_images
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

ALLOWED = (
    "paths, patterns, http and https URLs, camera:0, encoded bytes, files open in binary mode, PIL images, and arrays "
    "uint8 H x W x 3 or H x W (gray)"
)


@dataclass(frozen=True)
class ImageInput:
    """One image to use.

    Attributes:
        name: its path or URL, the video with a time, or "image N".
        read: function that returns the image in RGB, given the value of white in 16-bit gray images. It raises
            `ImageError`.
        live: True for a frame of a camera, whose result should not wait for other frames.
    """

    name: str
    read: Callable[[int], Image]
    live: bool = False


def image_inputs(images: Any, *, every: int = 1) -> Iterator[ImageInput]:
    """Return an iterator over images, which are read one at a time.

    Args:
        images: one or several of: a path of an image or a video, a folder, a pattern, a URL, "camera:N", bytes, a file
            open in binary mode, a PIL image, or an array. Folders become their images, videos and cameras their frames.
        every: use every `every`-th frame of videos and cameras.

    Raises:
        ValueError: a path does not exist, an item is no image, a URL may not be downloaded, or `every` is below 1.
            Raised by the call itself.
        ModuleNotFoundError: there is a video, and PyAV is not installed.
    """
    if every < 1:
        raise ValueError(problem(f"every is {every}", allowed="1 or more"))
    named = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview)
    # An array, a PIL image and an open file are iterable too, over something else than images.
    single = named or any(hasattr(images, name) for name in ("shape", "convert", "read"))
    if not single and not isinstance(images, Iterable):
        raise _no_image(images)
    found = [_inputs(item, index, every) for index, item in enumerate([images] if single else images)]
    return chain.from_iterable(found)


def _inputs(item: Any, index: int, every: int) -> Iterable[ImageInput]:
    """Return the inputs that one item stands for."""
    if isinstance(item, str | os.PathLike):
        return _named(os.fspath(item), every)
    name = f"image {index}"
    if hasattr(item, "read") and not hasattr(item, "convert"):
        item = item.read(MAX_BYTES)
    if isinstance(item, bytes | bytearray | memoryview):
        return [ImageInput(name, partial(_decoded, bytes(item), name))]
    if hasattr(item, "convert"):
        return [ImageInput(name, partial(_converted, item))]
    if isinstance(item, np.ndarray) and item.size and _is_image(item):
        return [ImageInput(name, partial(_from_array, item))]
    raise _no_image(item)


def _named(text: str, every: int) -> Iterable[ImageInput]:
    """Return the inputs behind a path, a pattern, a URL or the name of a camera."""
    if is_url(text):
        require_online(text)
        if suffix_of(text) in VIDEO_SUFFIXES:
            raise ValueError(problem(f"{text} is a video", allowed="URLs of images", fix="download it first"))
        return [ImageInput(text, lambda white: load_image(download(text), name=text, pixel_range=white))]
    if text.startswith(CAMERA):
        require_video(text)
        return _frames(text, every, live=True)
    found: list[Iterable[ImageInput]] = []
    for path in expanded(text):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir():
            require_video(os.fspath(path))
            found.append(_frames(os.fspath(path), every))
        else:
            found.append(
                [ImageInput(os.fspath(file), partial(_loaded, file)) for file in find_images([path])]
            )
    return chain.from_iterable(found)


def _frames(source: str, every: int, *, live: bool = False) -> Iterator[ImageInput]:
    """Yield the frames of a video or a camera."""
    for frame in video_frames(source, every=every):
        yield ImageInput(frame.name, partial(_of_frame, frame), live)


def _is_image(array: np.ndarray) -> bool:
    """Return True for an array of bytes H W, H W 1, H W 3 or H W 4, or of 16 bits H W."""
    color = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    return (array.dtype == np.uint8 and (color or array.ndim == 2)) or (
        array.dtype == np.uint16 and array.ndim == 2
    )


def _no_image(item: Any) -> ValueError:
    """Return the error for an item that is no image."""
    shape, dtype = getattr(item, "shape", None), getattr(item, "dtype", None)
    if shape is None:
        return ValueError(problem(f"{str(item)[:80]!r} ({type(item).__name__}) is no image", allowed=ALLOWED))
    fix = ""
    if str(dtype).startswith(("float", "torch.float")):
        fix = "scale to 0 to 255 and convert: (255 * array).astype(np.uint8)"
    elif len(shape) == 4:
        fix = "pass a list of images: list(array)"
    elif str(dtype).startswith("torch."):
        fix = "pass a NumPy array: tensor.permute(1, 2, 0).numpy()"
    elif len(shape) == 3 and shape[0] in (1, 3):
        fix = "put the channels last: array.transpose(1, 2, 0)"
    given = f"an array {dtype} of shape {tuple(shape)} is no image"
    return ValueError(problem(given, allowed=ALLOWED, fix=fix))


# --- reading ---------------------------------------------------------------------------------------------------


def _loaded(path: Path, white: int) -> Image:
    return load_image(path, pixel_range=white)


def _decoded(data: bytes, name: str, white: int) -> Image:
    return load_image(data, name=name, pixel_range=white)


def _converted(image: Image, white: int) -> Image:
    # The other modes of PIL, such as transparency and 16 bits, become RGB as those of files do.
    return image if image.mode == "RGB" else to_rgb(image, pixel_range=white)


def _from_array(array: np.ndarray, white: int) -> Image:
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return _converted(Image.fromarray(array), white)


def _of_frame(frame: Frame, white: int) -> Image:
    if frame.image is None:
        raise ImageError(frame.name, frame.error)
    return frame.image
