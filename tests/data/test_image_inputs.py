"""Everything that names an image gives the same pixels; what is no image is refused at the call."""

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.data.image_inputs import image_inputs
from normfree.data.remote_image import download
from normfree.data.transforms.decode import ImageError
from normfree.data.walk import expanded, find_images

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray = PIXELS) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """A server whose answers show each limit."""

    stop = threading.Event()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/image.png":
            self.answer(200, encoded())
        elif path == "/page":
            self.answer(200, b"<html>", "text/html; charset=utf-8")
        elif path == "/moved":
            self.moved("/image.png")
        elif path == "/to-file":
            self.moved("file:///etc/hostname")
        elif path == "/short":
            self.answer(200, encoded(), length=10**6)
        elif path == "/drip":  # the headers never end
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
            while not self.stop.wait(0.02):
                self.wfile.write(b"X-More: 1\r\n")
        else:
            self.answer(404, b"")

    def answer(self, status: int, body: bytes, kind: str = "image/png", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def moved(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of the server."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    Handler.stop.set()
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def read(images: object) -> list[np.ndarray]:
    return [np.asarray(item.read(65535)) for item in image_inputs(images)]


def test_every_form_of_an_image_gives_its_pixels(server: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.png"
    file.write_bytes(encoded())
    forms = [file, str(file), tmp_path / "in", f"{tmp_path}/*/*.png", f"{tmp_path}/**/a.p?g", encoded(),
             bytearray(encoded()), memoryview(encoded()),
             Image.fromarray(PIXELS), PIXELS, np.dstack([PIXELS, np.full((9, 7), 255, np.uint8)]),
             f"{server}/image.png", f"{server}/moved?size=1"]  # fmt: skip
    for form in forms:
        for given in (form, [form]):
            (found,) = read(given)
            np.testing.assert_array_equal(found, PIXELS)
    assert [item.name for item in image_inputs([encoded(), file, PIXELS])] == [
        "image 0",
        str(file),
        "image 2",
    ]
    np.testing.assert_array_equal(read(io.BytesIO(encoded()))[0], PIXELS)
    with file.open("rb") as one, file.open("rb") as other:
        assert len(read([one, other])) == 2
    assert read([]) == []


def test_gray_arrays(tmp_path: Path) -> None:
    gray = PIXELS[..., 0]
    expected = np.repeat(gray[..., None], 3, axis=2)
    for form in (gray, gray[..., None], gray.astype(np.uint16) * 257):
        np.testing.assert_array_equal(read(form)[0], expected)
    (item,) = image_inputs(gray.astype(np.uint16) * 16)
    assert np.abs(np.asarray(item.read(4095)).astype(int) - expected).max() <= 1  # a camera of 12 bits


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((3, 20, 20), np.uint8), r"uint8 of shape \(3, 20, 20\) is no image.*channels last"),
        (np.zeros((4, 4, 3)), r"float64 of shape \(4, 4, 3\) is no image.*255 \* array"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            r"no image\. Allowed: .*Fix: pass a list of images: list\(array\)\.",
        ),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 of shape \(0, 4, 3\) is no image"),
        (
            7,
            r"'7' \(int\) is no image\. Allowed: paths, patterns, http and https URLs, camera:0, encoded bytes",
        ),
        (io.StringIO("text"), r"\(str\) is no image"),
        (
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            r"uint8 of shape \(3, 4, 4\) is no image.*tensor\.permute\(1, 2, 0\)",
        ),
        ("gone.png", r"'gone\.png' does not exist\. Allowed: image files, folders of images, and patterns"),
        ("gone/*.png", r"the pattern 'gone/\*\.png' matches nothing"),
        ("s3://bucket/a.png", r"does not exist"),
        (
            "https://example.org/a/clip.MP4?x=1",
            r"is a video\. Allowed: URLs of images\. Fix: download it first",
        ),
    ],
)
def test_what_is_no_image_is_refused_at_the_call(item: object, message: str) -> None:
    for given in ([item], item):
        with pytest.raises(ValueError, match=message):
            image_inputs(given)


def test_a_name_that_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    for name in ("a[1].png", "a1.png", ".hidden.png"):
        (tmp_path / name).write_bytes(encoded())
    assert expanded(tmp_path / "a[1].png") == [tmp_path / "a[1].png"]
    (tmp_path / "a[1].png").unlink()
    assert expanded(tmp_path / "a[1].png") == [tmp_path / "a1.png"]
    assert find_images([f"{tmp_path}/*"]) == [tmp_path / "a1.png"]


def test_offline_is_one_line_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"^https://x\.org/a\.png would be downloaded, and HF_HUB_OFFLINE is set\. "
    ):
        image_inputs("https://x.org/a.png")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none", "the server answered 404 Not Found"),
        ("/page", "the server sent a web page, not an image"),
        ("/to-file", "the server answered 302 .*file:.* is not allowed"),
        ("/short", "the connection broke after"),
    ],
)
def test_a_server_that_sends_no_image(server: str, path: str, reason: str) -> None:
    with pytest.raises(ImageError, match=f"{server}{path}: .*{reason}"):
        download(server + path)


def test_limits_of_a_download(server: str) -> None:
    with pytest.raises(ImageError, match="more than 20 bytes"):
        download(f"{server}/image.png", max_bytes=20)
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"the server took longer than 0\.2 seconds"):
        download(f"{server}/drip", max_seconds=0.2)
    assert time.monotonic() - start < 60  # it ended
    with pytest.raises(ImageError, match="cannot be downloaded: "):
        download("http://127.0.0.1:1/a.png")
