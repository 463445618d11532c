"""Samplers: which samples make which step, and a prefetcher that reads the data of a streamed source ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from normfree.data.seeds import permutation
from normfree.data.supervision import INTERVAL, LoaderError, LoadingStopped, never
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.mixing import FreshPairs

EVAL = -1  # the repetition of a sample in evaluation, where nothing is random
AHEAD = 8  # steps whose images a streamed source reads before they are needed

SampleRef = tuple[int, int]  # (repetition, counted from 0, or EVAL; sample index)
PairRef = tuple[SampleRef, SampleRef, bool, int]  # own, other, by cutmix?, index of the output in its batch
Entry = tuple[int, int, list[Any]]  # step, epoch of the batch, list of SampleRef or of PairRef


class TrainSampler:
    """The samples of each training step, as (step, epoch of the batch, [(repetition, sample index), ...]).

    With `pairs`, the list holds a `PairRef` for each output instead.

    Args:
        n: Number of samples.
        batch_size: Samples per step over all ranks.
        steps: Steps to iterate over.
        order: `order(cycle)` returns the permutation of the `n` indices used in that cycle, a pass over the data.
        rank: This process.
        world_size: Number of processes.
        pairs: How two samples make one output, or None.
        repeats: How many times in a row each sample is used.
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
            first, last = start // self._repeats // self._n, (start + reads - 1) // self._repeats // self._n
            orders = {c: orders[c] if c in orders else self._order(c) for c in range(first, last + 1)}

            def sample(offset: int, start: int = start, orders: dict[int, np.ndarray] = orders) -> SampleRef:
                position, copy = divmod(start + offset, self._repeats)
                cycle, position = divmod(position, self._n)
                return cycle * self._repeats + copy, int(orders[cycle][position])

            epoch = start // self._n
            if self._pairs is None:
                yield step, epoch, [sample(i) for i in self._part]
            else:
                pairs = [(i, self._pairs.positions(i, self._batch_size)) for i in self._part]
                yield step, epoch, [(sample(own), sample(other), cut, i) for i, (own, other, cut) in pairs]


class PoissonSampler:
    """The samples of each training step, as for `TrainSampler`, chosen by `members` instead of a permutation.

    Steps have different numbers of samples, also none. Differential privacy needs steps in which each sample occurs by
    itself with the same probability.

    Args:
        n: Number of samples.
        batch_size: Samples per step that are expected, with their repeats; an epoch has `n` samples.
        steps: Steps to iterate over.
        members: `members(step)` returns the indices of a step.
        repeats: How many times in a row each sample is used.
    """

    def __init__(
        self, n: int, *, batch_size: int, steps: range, members: Callable[[int], np.ndarray], repeats: int = 1
    ) -> None:
        self._n, self._batch_size, self._steps = n, batch_size, steps
        self._members, self._repeats = members, repeats

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Entry]:
        for step in self._steps:
            chosen = self._members(step).tolist()
            refs = [(step * self._repeats + copy, index) for index in chosen for copy in range(self._repeats)]
            yield step, step * self._batch_size // self._n, refs


def shuffled(n: int, seed: int) -> Callable[[int], np.ndarray]:
    """Return the `order` of a source of `n` samples with random access: a new permutation in each cycle."""
    return lambda cycle: permutation(n, seed, "order", cycle)


class EvalSampler:
    """The samples of each evaluation step, as for `TrainSampler`: consecutive indices of one rank, in batches."""

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int) -> None:
        self._part = range(rank * n // world_size, (rank + 1) * n // world_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._part) // self._batch_size)

    def __iter__(self) -> Iterator[Entry]:
        for step in range(len(self)):
            part = self._part[step * self._batch_size : (step + 1) * self._batch_size]
            yield step, 0, [(EVAL, index) for index in part]


Sampler = TrainSampler | PoissonSampler | EvalSampler
Data = dict[int, Any]  # sample index -> what `read` returned for it
PrefetchedEntry = tuple[int, int, list[Any], Data | ImageError | LoaderError]


class Prefetcher:
    """The entries of a sampler, each with the data that `read(indices)` returns or the `ImageError` that it raises.

    One thread reads, in the order of the sampler and up to `AHEAD` steps before the consumer, so `read` can go forward
    through a stream while a network trains.
    """

    def __init__(
        self,
        sampler: Sampler,
        read: Callable[[Sequence[int]], Data],
        *,
        stopped: Callable[[], bool] = never,
    ) -> None:
        self._sampler, self._read, self._stopped = sampler, read, stopped
        self._pool = ThreadPoolExecutor(1)

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[PrefetchedEntry]:
        waiting: deque[Future[PrefetchedEntry]] = deque()
        for entry in self._sampler:
            waiting.append(self._pool.submit(self._with_data, entry))
            if len(waiting) > AHEAD:
                yield self._result(waiting.popleft())
        while waiting:
            yield self._result(waiting.popleft())

    def _result(self, future: Future[PrefetchedEntry]) -> PrefetchedEntry:
        """Return what was read, or LoadingStopped instead if `stopped` returns True before."""
        while True:
            try:
                return future.result(timeout=INTERVAL)
            except TimeoutError:
                if future.done():  # it is the reader's own
                    raise
                if self._stopped():
                    return 0, 0, [], LoadingStopped()

    def close(self) -> None:
        """Stop reading. A read that has begun is finished in its thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _with_data(self, entry: Entry) -> PrefetchedEntry:
        """Return `entry` with its data."""
        step, epoch, refs = entry
        samples = refs if not refs or len(refs[0]) == 2 else [ref for pair in refs for ref in pair[:2]]
        try:
            return step, epoch, refs, self._read(sorted({index for _, index in samples}))
        except ImageError as error:
            # Passed on, not raised: an error in its sampler would leave PyTorch's loader half built.
            return step, epoch, refs, error
