"""The stream of batches: a function of (seed, step), whatever the number of workers or processes.

Position q = step * batch_size + i of the stream is sample `permutation(N, seed, "order", q // N)[q % N]` of
epoch q // N, augmented under a generator seeded with `key(seed, "augment", epoch, index)`. So a run that
stops at any step continues with the very batches that it would have seen, and the state to save is two
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normfree.data.images import ImageError
from normfree.data.protocol import Source
from normfree.data.seeds import key, permutation

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
_Place = tuple[int, int]  # (epoch, index); the epoch is -1 for evaluation, which draws nothing
_EVAL = -1


@dataclass(frozen=True)
class Batch:
    """This rank's part of one batch.

    `images` uint8 B C H W, `labels` int64 B, `indices` int64 B (positions in the source), `names` B paths or
    ids. `step` counts batches from 0; `epoch` is that of the first sample of the global batch (0 in
    evaluation).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    names: tuple[str, ...]
    step: int
    epoch: int

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with work."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
        )


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Batches of the steps `start_step`, ..., `num_steps` - 1 (`num_steps` is the length of the whole run).

    `batch_size` counts samples over all ranks; rank r of W gets the r-th of W equal consecutive parts. Every
    batch is full: one that meets the end of an epoch takes its rest from the next, so it may be larger than
    the data. Batches are bit-identical for any number of `workers` (processes; 0 works in this one) and from
    any `start_step`, and the caller's random state is left alone. Closing the generator stops the workers. A
    picture that cannot be read raises `ImageError` with its name; wrong arguments raise `ValueError` at once.
    """
    _check(source, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)
    if batch_size % world_size:
        nearest = max(batch_size // world_size, 1) * world_size
        raise ValueError(
            f"batch_size={batch_size} for {world_size} processes. Allowed: multiples of {world_size}, as each process "
            f"takes an equal part. Fix: batch_size={nearest}"
        )
    if not 0 <= start_step <= num_steps:
        raise ValueError(
            f"start_step={start_step} of num_steps={num_steps}. Allowed: 0 to {num_steps}. "
            "Fix: num_steps counts the steps of the whole run, the finished ones included"
        )
    plan = TrainPlan(len(source), batch_size, seed, range(start_step, num_steps), rank, world_size)
    return _stream(_Fetcher(source, transform, seed), plan, workers=workers, pin_memory=pin_memory)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """Every sample exactly once over all ranks, in order, in its canonical picture; the last batch may be short.

    Here `batch_size` counts the samples of one rank. Ranks take consecutive parts whose sizes differ by at
    most one, so ranks may see different numbers of batches (or none): sum the counts, then divide.
    """
    _check(source, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)
    plan = EvalPlan(len(source), batch_size, rank, world_size)
    return _stream(_Fetcher(source, transform, 0), plan, workers=workers, pin_memory=pin_memory)


class TrainPlan:
    """Which samples make which step: iterates over lists of (step, epoch of the batch, [(epoch, index), ...])."""

    def __init__(self, n: int, batch_size: int, seed: int, steps: range, rank: int, world_size: int) -> None:
        self._n, self._batch_size, self._seed, self._steps = n, batch_size, seed, steps
        self._part = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[tuple[int, int, list[_Place]]]:
        orders: dict[int, np.ndarray] = {}
        for step in self._steps:
            start = step * self._batch_size
            places = [divmod(start + i, self._n) for i in self._part]
            for epoch in {epoch for epoch, _ in places} - orders.keys():
                orders[epoch] = permutation(self._n, self._seed, "order", epoch)
            orders = {epoch: order for epoch, order in orders.items() if epoch >= places[0][0]}
            yield step, start // self._n, [(epoch, int(orders[epoch][place])) for epoch, place in places]


class EvalPlan:
    """The same for evaluation: consecutive indices of one rank, in batches."""

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int) -> None:
        self._part = range(rank * n // world_size, (rank + 1) * n // world_size)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._part) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[int, int, list[_Place]]]:
        for step in range(len(self)):
            part = self._part[step * self._batch_size : (step + 1) * self._batch_size]
            yield step, 0, [(_EVAL, index) for index in part]


class _Fetcher(torch.utils.data.Dataset[Any]):
    """Turns one entry of a plan into a `Batch`; this is what runs in the workers."""

    def __init__(self, source: Source, transform: Transform, seed: int) -> None:
        self._source, self._transform, self._seed = source, transform, seed

    def __getitem__(self, entry: tuple[int, int, list[_Place]]) -> Batch | ImageError:
        step, epoch, places = entry
        indices = [index for _, index in places]
        # The default generator of the CPU alone: `torch.manual_seed` would reset every GPU's as well.
        state = torch.default_generator.get_state()
        try:
            images = torch.stack([self._sample(*place) for place in places])
        except ImageError as error:
            return error  # raised by `_stream`: torch would bury its message in the traceback of a worker
        finally:
            torch.default_generator.set_state(state)
        return Batch(
            images=images,
            labels=torch.tensor([self._source.label(index) for index in indices]),
            indices=torch.tensor(indices),
            names=tuple(self._source.name(index) for index in indices),
            step=step,
            epoch=epoch,
        )

    def _sample(self, epoch: int, index: int) -> Tensor:
        if epoch == _EVAL:
            return self._transform(self._source.image(index))
        number = key(self._seed, "augment", epoch, index)
        # transforms v2 draw from torch's default generator and from nothing else, so seeding it is enough.
        torch.default_generator.manual_seed(number)
        return self._transform(self._source.image(index, draw=number))


def _stream(
    fetcher: _Fetcher, plan: TrainPlan | EvalPlan, *, workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    from torch.utils.data import DataLoader

    batches = iter(
        DataLoader(
            fetcher,
            sampler=plan,
            batch_size=None,  # the fetcher makes whole batches
            num_workers=workers,  # torch gives each one thread
            pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns where there is no GPU
            prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(0),  # else it would take a number from the caller's
        )
    )
    try:
        for batch in batches:
            if isinstance(batch, ImageError):
                raise batch
            yield batch
    finally:
        # Without this, workers would live until the garbage collector comes by.
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _check(source: Source, *, batch_size: int, workers: int, rank: int, world_size: int) -> None:
    if len(source) == 0:
        raise ValueError("a source without samples. Allowed: at least one. Fix: check the path of the data")
    for option, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("world_size", world_size, 1),
    ):
        if value < least:
            raise ValueError(f"{option}={value}. Allowed: {least} or more. Fix: {option}={least}")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank} of {world_size}. Allowed: 0 to {world_size - 1}. Fix: rank={world_size - 1}"
        )
