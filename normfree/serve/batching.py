"""Dynamic batching: images that arrive within a few milliseconds of each other go through the network together.

Without batch statistics, the output for an image does not depend on the other images of its batch.

Shapes: B batch, S image size, K classes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normfree.data.transforms.normalize import normalize
from normfree.deploy.fold import fold
from normfree.models.net import Net
from normfree.pretrained import TrainedModel
from normfree.serve.fair_queue import FairQueue
from normfree.suggest import problem

_log = logging.getLogger("normfree.serve")


class Unavailable(RuntimeError):
    """No images are accepted at the moment: the queue is full, or the server is stopping."""


class ClientLimit(Unavailable):
    """No images of this client are accepted at the moment: it has too many in the queue."""


@dataclass
class _Waiting:
    """An image in the queue."""

    image: Tensor
    future: Future[Tensor] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """A worker thread that collects images into batches and runs a function on each batch.

    A batch starts when it is full, or when its oldest image has waited for `max_delay_ms`. Clients take turns.

    Args:
        run: function from images B 3 S S to outputs B x ..., where B is at most `max_batch`.
        max_batch: maximum number of images per batch.
        max_delay_ms: milliseconds that an image waits for others; 0 means no waiting.
        max_queue: maximum number of waiting images.
        max_each: maximum number of waiting images of one client; None: `max_queue`.
        on_batch: called with the size and the seconds of every batch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        *,
        max_batch: int = 16,
        max_delay_ms: float = 5.0,
        max_queue: int = 128,
        max_each: int | None = None,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(problem(f"max_batch is {max_batch}", allowed="1 or more", fix="max_batch=1"))
        if not 0 <= max_delay_ms <= 10_000:
            raise ValueError(
                problem(f"max_delay_ms is {max_delay_ms}", allowed="0 to 10000", fix="max_delay_ms=5")
            )
        if max_queue < 1:
            raise ValueError(problem(f"max_queue is {max_queue}", allowed="1 or more", fix="max_queue=128"))
        self._run, self._on_batch = run, on_batch
        self.max_batch, self.max_queue = max_batch, max_queue
        self._max_each = max_queue if max_each is None else max_each
        self._delay = max_delay_ms / 1000
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._change = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="normfree-batches", daemon=True)
        self._worker.start()

    def __len__(self) -> int:
        """Return the number of waiting images, without those in the network and those that were canceled."""
        with self._change:
            self._drop_cancelled()
            return len(self._queue)

    @property
    def ready(self) -> bool:
        """True if the worker is alive and accepts images."""
        return not self._closed and self._worker.is_alive()

    def submit(self, images: Sequence[Tensor], *, client: str = "") -> list[Future[Tensor]]:
        """Queue images, each 3 S S, all or none; return a future for the output of each.

        Raises:
            ClientLimit: the client has too many images in the queue.
            Unavailable: the queue cannot take all of them, or `stop` was called.
        """
        waiting = [_Waiting(image) for image in images]
        with self._change:
            if self._closed:
                raise Unavailable("the server is stopping")
            own = self._queue.count(client)
            if len(self._queue) + len(waiting) > self.max_queue or own + len(waiting) > self._max_each:
                self._drop_cancelled()
                own = self._queue.count(client)
            if len(self._queue) + len(waiting) > self.max_queue:
                raise Unavailable(f"the queue is full ({len(self._queue)} images wait)")
            if own + len(waiting) > self._max_each:
                raise ClientLimit(f"{own} images of this client wait already")
            for each in waiting:
                self._queue.append(client, each)
            self._change.notify()
        return [w.future for w in waiting]

    def stop(self, timeout: float = 10.0) -> None:
        """Accept no more images, process those that wait, and end the worker.

        Images that are left after `timeout` seconds get the exception `Unavailable`.
        """
        with self._change:
            self._closed = True
            self._change.notify()
        self._worker.join(timeout)
        with self._change:
            left = self._queue.clear()
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(Unavailable("the server is stopping"))

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when the end has come."""
        with self._change:
            while True:
                self._drop_cancelled()
                oldest = min((w.arrived for w in self._queue.first()), default=None)
                left = None if oldest is None else oldest + self._delay - time.monotonic()
                if self._closed or len(self._queue) >= self.max_batch or (left is not None and left <= 0):
                    return [self._queue.popleft() for _ in range(min(self.max_batch, len(self._queue)))]
                self._change.wait(left)

    def _drop_cancelled(self) -> None:
        """Remove canceled images from the queue."""
        self._queue.keep(lambda w: not w.future.cancelled())

    def _work(self) -> None:
        """Process batches until the batcher is stopped."""
        while batch := self._take():
            # An image may have been canceled since `_take`.
            batch = [w for w in batch if w.future.set_running_or_notify_cancel()]
            if batch:
                self._process(batch)

    def _process(self, batch: list[_Waiting]) -> None:
        """Run a batch and set the results of its futures."""
        started = time.monotonic()
        try:
            outputs = self._run(torch.stack([w.image for w in batch]))
            if len(outputs) != len(batch):
                raise RuntimeError(f"the network returned {len(outputs)} outputs for {len(batch)} images")
        except Exception as error:
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        # The batch is recorded first, so that the metrics count it when a client has its response.
        if self._on_batch is not None:
            try:
                self._on_batch(len(batch), time.monotonic() - started)
            except Exception:  # an error in `on_batch` must not end the worker
                _log.exception("on_batch failed")
        for waiting, output in zip(batch, outputs, strict=True):
            waiting.future.set_result(output)


def probabilities(model: TrainedModel, *, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 images B 3 S S to probabilities B K, float32 on the CPU.

    The probabilities are those of `normfree.predict`. A `Net` is folded first, which is faster and gives the same
    outputs up to rounding.
    """
    pre = model.preprocessing
    net = fold(model.net) if isinstance(model.net, Net) else model.net
    net = net.eval().to(device)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        normal = normalize(images.to(device), mean=pre.mean, std=pre.std)
        return model.probabilities(net(normal)).cpu()

    return run
