"""Threads that decode images: in lanes by size, clients in turn, within a budget, and while a client waits."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from normfree.data.transforms.decode import open_header
from normfree.serve.fair_queue import FairQueue
from normfree.serve.limits import Budget, RequestError

Result = TypeVar("Result")
# Decodes an image; the second argument returns True as soon as its result is not wanted any more.
Decode = Callable[[bytes, Callable[[], bool]], Result]


@dataclass(frozen=True)
class Lane:
    """Threads for images of one range of sizes.

    Attributes:
        max_pixels: pixels of its largest images.
        niceness: by which its threads give way to others, as in the command `nice`.
        alone: one thread only, since each image takes much memory.
    """

    max_pixels: float
    niceness: int
    alone: bool


# Images of most web pages, of most cameras, and larger ones. Large images do not delay small ones.
LANES = (Lane(1e6, 0, False), Lane(16e6, 5, False), Lane(float("inf"), 10, True))


class Decoding(Future[Result], Generic[Result]):
    """The future of one image. Canceling it also gives up a decoding that has begun.

    Attributes:
        given_up: True after `cancel`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given_up = False

    def cancel(self) -> bool:
        """Give up the decoding; return True if it has not begun."""
        self.given_up = True
        return super().cancel()


class Decoders:
    """Daemon threads that call a function on images.

    Args:
        threads: number of threads of each lane, except for that of the largest images, which has one.
        max_pixels: pixels of all images in one lane that wait or are being decoded.
        max_image: pixels of one image. The function is expected to refuse larger ones without decoding them, so they
            do not count.
        max_each: pixels of one client in a lane; one request is always allowed. None: all.
    """

    def __init__(self, threads: int, *, max_pixels: int, max_image: int, max_each: int | None = None) -> None:
        self._max_pixels, self._max_image = max_pixels, max_image
        each = max_pixels if max_each is None else max_each
        self._queues: list[FairQueue[Callable[[], None]]] = [FairQueue() for _ in LANES]
        self._budgets = [Budget(max_pixels, each=each, what="pixels that wait to be decoded") for _ in LANES]
        self._change, self._closed = threading.Condition(), False
        self._running: set[Decoding] = set()
        for lane, queue in zip(LANES, self._queues, strict=True):
            for _ in range(1 if lane.alone else threads):
                arguments = (queue, lane.niceness)
                threading.Thread(
                    target=self._work, args=arguments, name="normfree-decode", daemon=True
                ).start()

    @property
    def pixels(self) -> int:
        """Pixels of all images that wait or are being decoded."""
        return sum(budget.used for budget in self._budgets)

    def submit(
        self, call: Decode[Result], images: Sequence[bytes], *, client: str = ""
    ) -> list[Decoding[Result]]:
        """Queue `call` for all images or none, and return their futures.

        Raises:
            RequestError: 413 if the images exceed the budget alone, 429 if they do with those of the same client, 503
                if they do with all that wait.
        """
        sizes = [size if (size := pixels_in(image)) <= self._max_image else 0 for image in images]
        if sum(sizes) > self._max_pixels:
            raise RequestError(413, f"{sum(sizes):,} pixels in one request; at most {self._max_pixels:,}")
        lanes = [next(i for i, lane in enumerate(LANES) if size <= lane.max_pixels) for size in sizes]
        futures: list[Decoding[Result]] = [Decoding() for _ in images]
        with self._change:
            if self._closed:
                raise RequestError(503, "the server is stopping")
            totals = {
                lane: sum(s for s, at in zip(sizes, lanes, strict=True) if at == lane) for lane in set(lanes)
            }
            with contextlib.ExitStack() as undo:
                for lane, total in totals.items():
                    self._budgets[lane].take(client, total)
                    undo.callback(self._budgets[lane].give_back, client, total)
                undo.pop_all()
            for image, size, lane, future in zip(images, sizes, lanes, futures, strict=True):
                back = (self._budgets[lane], client, size)
                self._queues[lane].append(client, self._job(call, image, future, back))
            self._change.notify_all()
        return futures

    def stop(self) -> None:
        """Cancel all images that wait, give up those that are being decoded, and end the threads without waiting."""
        with self._change:
            self._closed = True
            running = list(self._running)
            self._change.notify_all()
        for future in running:
            future.cancel()

    def _job(
        self, call: Decode[Result], image: bytes, future: Decoding[Result], back: tuple[Budget, str, int]
    ) -> Callable[[], None]:
        def run() -> None:
            try:
                if self._closed:
                    future.cancel()
                if future.set_running_or_notify_cancel():
                    self._running.add(future)
                    future.set_result(call(image, lambda: future.given_up))
            except CancelledError:
                # A new one: the traceback of the old one would keep the pixels in memory until garbage is collected.
                future.set_exception(CancelledError())
            except Exception as error:
                future.set_exception(error)
            finally:
                budget, client, size = back
                with self._change:
                    self._running.discard(future)
                    budget.give_back(client, size)

        return run

    def _work(self, queue: FairQueue[Callable[[], None]], niceness: int) -> None:
        """Take jobs from one queue until the end."""
        if sys.platform == "linux":  # where each thread has a niceness of its own
            with contextlib.suppress(OSError):
                own = os.getpriority(os.PRIO_PROCESS, 0)
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), own + niceness)
        while True:
            with self._change:
                self._change.wait_for(lambda: len(queue) or self._closed)
                if not len(queue):
                    return
                job = queue.popleft()
            job()


def pixels_in(data: bytes) -> int:
    """Return the pixels of an encoded image according to its header; 0 for anything else."""
    try:
        with open_header(data) as image:
            return image.width * image.height
    except Exception:  # decoding it will say why
        return 0
