"""Frames of video files and cameras, decoded by PyAV (FFmpeg)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from normfree.data.transforms.decode import ImageError
from normfree.suggest import needs, problem

if TYPE_CHECKING:
    from PIL.Image import Image

VIDEO_SUFFIXES = frozenset(
    (".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
)
CAMERA = "camera:"
# FFmpeg's input format for cameras, by `sys.platform`.
_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}


@dataclass(frozen=True)
class Frame:
    """One frame of a video, or the error that ended it.

    Attributes:
        name: the video with the time in seconds since its first frame, as a media fragment: "a.mp4#t=1.500".
        image: the upright RGB frame; None if the video cannot be read further.
        error: why, or "".
    """

    name: str
    image: Image | None
    error: str = ""


def require_video(source: str) -> ModuleType:
    """Return PyAV.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with needs(f"reading {source}", install="normfree[video]"):
        import av
    module: ModuleType = av
    return module


def video_frames(source: str, *, every: int = 1) -> Iterator[Frame]:
    """Yield every `every`-th frame of a video file or of a camera, beginning with the first.

    A file that is damaged gives the frames before the damage, and then one with an error.

    Args:
        source: a file, or "camera:N" for the camera with the index N.
        every: 1 for all frames.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
    """
    av = require_video(source)
    first: float | None = None
    try:
        with _opened(av, source) as container:
            if not container.streams.video:
                yield Frame(source, None, "the file has no video")
                return
            container.streams.video[0].thread_type = "AUTO"
            for index, frame in enumerate(container.decode(video=0)):
                first = frame.time if first is None else first
                if index % every == 0:
                    known = frame.time is not None and first is not None
                    position = f"t={frame.time - first:.3f}" if known else f"frame={index}"
                    yield Frame(f"{source}#{position}", _upright(frame))
            if first is None:
                yield Frame(source, None, "the video has no frames")
    except ImageError as error:
        yield Frame(source, None, error.reason)
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        yield Frame(source, None, f"the video cannot be read{' further' * (first is not None)}: {reason}")


def _opened(av: ModuleType, source: str) -> Any:
    """Return the open container of a file or a camera."""
    if not source.startswith(CAMERA):
        return av.open(source, mode="r")
    format = _CAMERA_FORMATS.get(sys.platform, "v4l2")
    try:
        found = av.enumerate_input_devices(format)
    except (av.FFmpegError, ValueError):
        found = []
    cameras = [device for device in found if not device.media_types or "video" in device.media_types]
    number = source.removeprefix(CAMERA)
    if not number.isdecimal() or int(number) >= len(cameras):
        known = ", ".join(f"{CAMERA}{i} ({device.description})" for i, device in enumerate(cameras))
        given = "there is no such camera" if cameras else "no camera was found"
        raise ImageError(source, problem(given, allowed=known))
    prefix = "video=" if format == "dshow" else ""
    return av.open(prefix + cameras[int(number)].name, mode="r", format=format)


def _upright(frame: Any) -> Image:
    """Return a frame in RGB, turned as the container says: phones store videos on their side."""
    from PIL import Image

    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
