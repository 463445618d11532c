"""Dynamic micro-batching: pictures that arrive within a few milliseconds of each other go through the network
together. A network without batch statistics answers each as if it had come alone.

Legend: B batch, S image size, K classes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from normfree.data.transforms.normalize import normalize
from normfree.deploy.fold import fold
from normfree.models.net import Net
from normfree.pretrained import TrainedModel

_log = logging.getLogger("normfree.serve")


class Unavailable(RuntimeError):
    """No more pictures are taken now: the queue is full, or the server is stopping."""


@dataclass
class _Waiting:
    image: Tensor
    future: Future[Tensor] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """One worker thread that calls `run` (images B 3 S S -> rows B ..., B at most `max_batch`) on what waits.

    A batch starts when it is full, or when its oldest picture has waited `max_delay_ms` milliseconds for company,
    whichever is first; 0 never waits. At most `max_queue` pictures wait. `on_batch` is told the size and the
    seconds of every batch.

    Raises:
        ValueError: a number makes no sense.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        *,
        max_batch: int = 16,
        max_delay_ms: float = 5.0,
        max_queue: int = 128,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(
                f"max_batch={max_batch}. Allowed: 1 or more. Fix: max_batch=1 takes each picture alone."
            )
        if not 0 <= max_delay_ms <= 10_000:
            raise ValueError(
                f"max_delay_ms={max_delay_ms}. Allowed: 0 to 10000. Fix: max_delay_ms=0 never waits."
            )
        if max_queue < 1:
            raise ValueError(f"max_queue={max_queue}. Allowed: 1 or more. Fix: max_queue=128")
        self._run, self._on_batch = run, on_batch
        self.max_batch, self.max_queue = max_batch, max_queue
        self._delay = max_delay_ms / 1000
        self._queue: deque[_Waiting] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="normfree-batches", daemon=True)
        self._worker.start()

    def __len__(self) -> int:
        """Pictures that wait; those in the network, or whose client gave up, no longer do."""
        with self._change:
            self._drop_cancelled()
            return len(self._queue)

    @property
    def ready(self) -> bool:
        """The worker lives and takes pictures."""
        return not self._closed and self._worker.is_alive()

    def submit(self, images: Sequence[Tensor]) -> list[Future[Tensor]]:
        """Queues pictures (each 3 S S), all or none; one future per picture, with its row of `run`'s answer.

        Raises:
            Unavailable: the queue has no room for all of them, or `stop` was called.
        """
        waiting = [_Waiting(image) for image in images]
        with self._change:
            if self._closed:
                raise Unavailable("the server is stopping")
            if len(self._queue) + len(waiting) > self.max_queue:
                self._drop_cancelled()
            if len(self._queue) + len(waiting) > self.max_queue:
                raise Unavailable(f"the queue is full ({len(self._queue)} pictures wait)")
            self._queue.extend(waiting)
            self._change.notify()
        return [w.future for w in waiting]

    def stop(self, timeout: float = 10.0) -> None:
        """Takes no more, answers what waits, and ends the worker. What is left after `timeout` seconds gets
        `Unavailable`."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._worker.join(timeout)
        with self._change:
            left = list(self._queue)
            self._queue.clear()
        for waiting in left:
            if waiting.future.set_running_or_notify_cancel():
                waiting.future.set_exception(Unavailable("the server is stopping"))

    def _take(self) -> list[_Waiting]:
        """The next batch; empty when the end has come."""
        with self._change:
            while True:
                self._drop_cancelled()
                left = self._queue[0].arrived + self._delay - time.monotonic() if self._queue else None
                if self._closed or len(self._queue) >= self.max_batch or (left is not None and left <= 0):
                    return [self._queue.popleft() for _ in range(min(self.max_batch, len(self._queue)))]
                self._change.wait(left)

    def _drop_cancelled(self) -> None:
        """Whoever gave up waiting takes no room."""
        self._queue = deque(w for w in self._queue if not w.future.cancelled())

    def _work(self) -> None:
        while batch := self._take():
            # one may have given up since
            batch = [w for w in batch if w.future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[_Waiting]) -> None:
        started = time.monotonic()
        try:
            rows = self._run(torch.stack([w.image for w in batch]))
            if len(rows) != len(batch):
                raise RuntimeError(f"the network gave {len(rows)} answers to {len(batch)} pictures")
        except Exception as error:
            for waiting in batch:
                waiting.future.set_exception(error)
            return
        for waiting, row in zip(batch, rows, strict=True):
            waiting.future.set_result(row)
        if self._on_batch is not None:
            try:
                self._on_batch(len(batch), time.monotonic() - started)
            except Exception:  # counting must not end the worker
                _log.exception("on_batch failed")


def probabilities(model: TrainedModel, *, device: torch.device) -> Callable[[Tensor], Tensor]:
    """uint8 images B 3 S S -> probabilities B K, float32 on the CPU, as `normfree.inference.predict` has them.

    A network of ours is folded first (`normfree.deploy.fold`): the same answers to rounding, in less time.
    """
    pre = model.preprocessing
    net = fold(model.net) if isinstance(model.net, Net) else model.net
    net = net.eval().to(device)

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        normal = normalize(images.to(device), mean=pre.mean, std=pre.std)
        return net(normal).float().softmax(dim=1).cpu()

    return run
