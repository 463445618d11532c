"""Threads that decode images, with a budget of pixels for all that wait; large images do not delay small ones."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from normfree.data.transforms.decode import formats
from normfree.serve.upload import RequestError

Result = TypeVar("Result")

# Images with more pixels than most cameras take share one thread, so that they never delay the others for long.
LARGE = 16_000_000


class Decoders:
    """Daemon threads that call a function on images. One takes the large images, the others take the small ones.

    Args:
        threads: number of threads, at least 2.
        max_pixels: pixels of all images that wait or are being decoded.
    """

    def __init__(self, threads: int, *, max_pixels: int) -> None:
        self._max_pixels, self.pixels = max_pixels, 0
        self._queues: tuple[deque[Callable[[], None]], ...] = (deque(), deque())
        self._change, self._closed = threading.Condition(), False
        for index in range(max(2, threads)):
            lane = self._queues[int(index == 0)]
            threading.Thread(target=self._work, args=(lane,), name="normfree-decode", daemon=True).start()

    def submit(self, call: Callable[[bytes], Result], images: list[bytes]) -> list[Future[Result]]:
        """Queue `call(image)` for all images or none; a canceled future is skipped.

        Raises:
            RequestError: 413 if the images exceed the budget alone, 503 if they do with those that wait.
        """
        sizes = [pixels_in(image) for image in images]
        if sum(sizes) > self._max_pixels:
            raise RequestError(413, f"{sum(sizes):,} pixels in one request; at most {self._max_pixels:,}")
        futures: list[Future[Result]] = [Future() for _ in images]
        with self._change:
            if self._closed:
                raise RequestError(503, "the server is stopping")
            if self.pixels + sum(sizes) > self._max_pixels:
                raise RequestError(503, "too many pixels wait to be decoded")
            self.pixels += sum(sizes)
            for image, size, future in zip(images, sizes, futures, strict=True):
                job = self._job(call, image, size, future)
                self._queues[int(size > LARGE)].append(job)
            self._change.notify_all()
        return futures

    def stop(self) -> None:
        """Cancel all images that wait, and end each thread after the image that it is decoding, without waiting."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _job(
        self, call: Callable[[bytes], Result], image: bytes, size: int, future: Future[Result]
    ) -> Callable[[], None]:
        def run() -> None:
            try:
                if self._closed:
                    future.cancel()
                if future.set_running_or_notify_cancel():
                    future.set_result(call(image))
            except Exception as error:
                future.set_exception(error)
            finally:
                with self._change:
                    self.pixels -= size

        return run

    def _work(self, lane: deque[Callable[[], None]]) -> None:
        """Take jobs from one queue until the end."""
        while True:
            with self._change:
                self._change.wait_for(lambda: lane or self._closed)
                if not lane:
                    return
                job = lane.popleft()
            job()


def pixels_in(data: bytes) -> int:
    """Return the pixels of an encoded image according to its header; 0 for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            return image.width * image.height
    except Exception:  # decoding it will say why
        return 0
