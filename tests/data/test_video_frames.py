"""Frames of videos: their number, order, times and orientation; cameras by a virtual device."""

import sys
from pathlib import Path

import numpy as np
import pytest

from normfree.data.image_inputs import image_inputs
from normfree.data.video_frames import video_frames


def write_video(path: Path, *, frames: int = 7, rate: int = 4, turn: int = 0) -> Path:
    """Write frames whose brightness counts up from 20 in steps of 30; the left half is black."""
    av = pytest.importorskip("av")
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        if turn:
            stream.set_display_rotation(turn)
        for i in range(frames):
            pixels = np.full((32, 64, 3), 20 + 30 * i, np.uint8)
            pixels[:, :32] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_nth_frame_with_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    for every, wanted in ((1, range(7)), (3, (0, 3, 6)), (10, (0,))):
        found = list(video_frames(str(path), every=every))
        assert [frame.name for frame in found] == [f"{path}#t={i / 4:.3f}" for i in wanted]
        bright = [np.asarray(frame.image)[:, 40:].mean() for frame in found]
        assert bright == pytest.approx([20 + 30 * i for i in wanted], abs=6)
        assert all(frame.image.size == (64, 32) for frame in found)
    inputs = list(image_inputs([str(path), tmp_path / "*.mp4"], every=5))
    assert len(inputs) == 4
    assert not any(item.live for item in inputs)


def test_frames_are_turned_upright(tmp_path: Path) -> None:
    """90 degrees counterclockwise bring the left half, which is black, to the bottom."""
    frame = next(iter(video_frames(str(write_video(tmp_path / "turned.mp4", turn=90)))))
    assert frame.image.size == (32, 64)
    pixels = np.asarray(frame.image).astype(int)
    assert pixels[:32].mean() > pixels[32:].mean() + 10


def test_a_damaged_file_gives_an_error_as_its_last_entry(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "clip.avi").read_bytes()
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    for name in ("noise.mp4", "empty.mp4"):
        (frame,) = video_frames(str(tmp_path / name))
        assert frame.image is None
        assert frame.error.startswith("the video cannot be read: ")
        (item,) = image_inputs(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name}: the video cannot be read: "):
            item.read(65535)
    assert sum(frame.image is not None for frame in video_frames(str(tmp_path / "cut.avi"))) < 7


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setattr("normfree.data.video_frames._CAMERA_FORMATS", {sys.platform: "lavfi"})
    device = av.DeviceInfo("testsrc=size=48x32:rate=10", "a pattern", True, ["video"])
    monkeypatch.setattr(av, "enumerate_input_devices", lambda format: [device])
    frames = image_inputs("camera:0", every=2)
    first, second = next(frames), next(frames)
    assert (first.name, second.name, first.live) == ("camera:0#t=0.000", "camera:0#t=0.200", True)
    assert first.read(65535).size == (48, 32)
    (missing,) = image_inputs("camera:3")
    with pytest.raises(
        ValueError, match=r"camera:3: there is no such camera\. Allowed: camera:0 \(a pattern\)\."
    ):
        missing.read(65535)
    monkeypatch.setattr(av, "enumerate_input_devices", lambda format: [])
    (missing,) = image_inputs("camera:0")
    with pytest.raises(ValueError, match=r"^camera:0: no camera was found\.$"):
        missing.read(65535)


def test_the_extra_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    for given in (str(tmp_path / "clip.mp4"), "camera:0", f"{tmp_path}/*"):
        with pytest.raises(
            ModuleNotFoundError,
            match=r'needs av, which is not installed\. Fix: pip install "normfree\[video\]"\.',
        ):
            image_inputs([given])
    with pytest.raises(ValueError, match=r"every is 0\. Allowed: 1 or more\."):
        image_inputs([], every=0)
