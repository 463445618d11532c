"""Which samples make which step, and, for a source that is read forwards only, their bytes fetched ahead of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from normfree.data.seeds import permutation
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.mixing import FreshPairs

EVAL = -1  # the showing of a picture in evaluation, which draws nothing
AHEAD = 8  # steps whose pictures a stream fetches before they are asked for

SampleRef = tuple[int, int]  # (the how manieth showing, from 0, or EVAL; index)
Pair = tuple[SampleRef, SampleRef, bool, int]  # own, other, by cutmix?, number of the output in its batch
Entry = tuple[int, int, list[Any]]  # step, epoch of the batch, places or pairs


class TrainSampler:
    """Which samples make which step: iterates over lists of (step, epoch of the batch, [(showing, index), ...]).

    `order(turn)` holds each of the `n` indices once: how samples follow each other when they come for the turn-th time.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        steps: range,
        order: Callable[[int], np.ndarray],
        rank: int = 0,
        world_size: int = 1,
        pairs: FreshPairs | None = None,
        repeats: int = 1,
    ) -> None:
        self._n, self._batch_size, self._steps, self._order = n, batch_size, steps, order
        self._pairs, self._repeats = pairs, repeats
        self._part = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Entry]:
        orders: dict[int, np.ndarray] = {}
        reads = self._batch_size * (2 if self._pairs else 1)
        for step in self._steps:
            start = step * reads
            turns = start // self._repeats // self._n, (start + reads - 1) // self._repeats // self._n
            orders = {t: orders[t] if t in orders else self._order(t) for t in range(turns[0], turns[1] + 1)}

            def place(offset: int, start: int = start, orders: dict[int, np.ndarray] = orders) -> SampleRef:
                position, copy = divmod(start + offset, self._repeats)
                turn, position = divmod(position, self._n)
                return turn * self._repeats + copy, int(orders[turn][position])

            epoch = start // self._n
            if self._pairs is None:
                yield step, epoch, [place(i) for i in self._part]
            else:
                whole = [(i, self._pairs.places(i, self._batch_size)) for i in self._part]
                yield step, epoch, [(place(own), place(other), cut, i) for i, (own, other, cut) in whole]


def shuffled(n: int, seed: int) -> Callable[[int], np.ndarray]:
    """The order of a source of `n` samples that can be read anywhere: a new permutation of all in each turn."""
    return lambda turn: permutation(n, seed, "order", turn)


class EvalSampler:
    """The same for evaluation: consecutive indices of one rank, in batches."""

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int) -> None:
        self._part = range(rank * n // world_size, (rank + 1) * n // world_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._part) // self._batch_size)

    def __iter__(self) -> Iterator[Entry]:
        for step in range(len(self)):
            part = self._part[step * self._batch_size : (step + 1) * self._batch_size]
            yield step, 0, [(EVAL, index) for index in part]


Plan = TrainSampler | EvalSampler
Data = dict[int, Any]  # index -> what `read` found for it
PrefetchedEntry = tuple[int, int, list[Any], Data | ImageError]


class Prefetcher:
    """The entries of a plan, each with the data that `read(indices)` finds for it: (step, epoch, places, data), or
    with the `ImageError` that it raised.

    One thread reads, in the order of the plan and up to `AHEAD` steps before the consumer, so that `read` may go
    forwards through a stream while a network trains.
    """

    def __init__(self, plan: Plan, read: Callable[[Sequence[int]], Data]) -> None:
        self._plan, self._read = plan, read
        self._pool = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[PrefetchedEntry]:
        waiting: deque[Future[PrefetchedEntry]] = deque()
        for entry in self._plan:
            waiting.append(self._pool.submit(self._with_data, entry))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Stops reading; what has begun is finished in its thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with_data(self, entry: Entry) -> PrefetchedEntry:
        step, epoch, places = entry
        flat = places if not places or len(places[0]) == 2 else [p for pair in places for p in pair[:2]]
        try:
            return step, epoch, places, self._read(sorted({index for _, index in flat}))
        except ImageError as error:
            return step, epoch, places, error  # an error in its sampler would leave torch's loader half-made
