"""The stream of batches: a function of (seed, step), whatever the number of workers or processes.

Position q = step * batch_size + i of the stream is sample `permutation(N, seed, "order", q // N)[q % N]` of
epoch q // N, augmented under a generator seeded with `key(seed, "augment", epoch, index)`. So a run that
stops at any step continues with the very batches that it would have seen, and the state to save is two
integers. With `repeats`, R, each sample stands R times in a row: q // R takes the place of q, and the copies q % R
are augmented as the showings R * turn + q % R of that sample.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normfree.data.sampler import (
    EVAL,
    EvalSampler,
    Pair,
    Plan,
    Prefetcher,
    SampleRef,
    TrainSampler,
    shuffled,
)
from normfree.data.seeds import key
from normfree.data.source import Source
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.mixing import FreshPairs

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one batch.

    `images` grey levels B C H W (uint8 as a rule), `labels` int64 B, `indices` int64 B (positions in the source),
    `names` B paths or ids. `step` counts batches from 0; `epoch` is that of the first sample of the global batch (0 in
    evaluation). With `pairs`, `partners` int64 B are the labels of the second images and `share` float32 B the parts
    of the first ones.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    names: tuple[str, ...]
    step: int
    epoch: int
    partners: Tensor | None = None
    share: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with work."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
            partners=None if self.partners is None else self.partners.pin_memory(),
            share=None if self.share is None else self.share.pin_memory(),
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
    pairs: FreshPairs | None = None,
    repeats: int = 1,
) -> Generator[Batch, None, None]:
    """Batches of the steps `start_step`, ..., `num_steps` - 1 (`num_steps` is the length of the whole run).

    `batch_size` counts samples over all ranks; rank r of W gets the r-th of W equal consecutive parts. Every
    batch is full: one that meets the end of an epoch takes its rest from the next, so it may be larger than
    the data. Batches are bit-identical for any number of `workers` (processes; 0 works in this one) and from
    any `start_step`, and the caller's random state is left alone. With `pairs` every output is mixed of two images
    read for it, so that a step takes 2 * `batch_size` places of the stream. Closing the generator stops the workers. A
    picture that cannot be read raises `ImageError` with its name; wrong arguments raise `ValueError` at once.

    `repeats`: repeated augmentation (Hoffer et al. 2020, "Augment your batch"; Berman et al. 2019, "MultiGrain"). A
    batch holds `batch_size` / `repeats` samples, each `repeats` times in a row under draws of its own; a rank may get
    some of the copies and the next rank the others. Epochs count what is shown, so every sample has been shown
    `repeats` times after `repeats` epochs, with the very augmentations of as many epochs without repeats.
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
    if repeats < 1 or batch_size % repeats:
        nearest = max(d for d in range(1, max(repeats, 1) + 1) if batch_size % d == 0)
        raise ValueError(
            f"repeats={repeats} with batch_size={batch_size}. Allowed: 1 or more, and a divisor of batch_size, as the "
            f"copies of a sample share a batch. Fix: repeats={nearest}"
        )
    own = getattr(source, "order", None)  # of a source that cannot be read anywhere
    plan = TrainSampler(
        len(source),
        batch_size=batch_size,
        steps=range(start_step, num_steps),
        order=shuffled(len(source), seed) if own is None else lambda turn: own(seed, turn),
        rank=rank,
        world_size=world_size,
        pairs=pairs,
        repeats=repeats,
    )
    return _stream(_Fetcher(source, transform, seed, pairs), plan, workers=workers, pin_memory=pin_memory)


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
    plan = EvalSampler(len(source), batch_size, rank, world_size)
    return _stream(_Fetcher(source, transform, 0), plan, workers=workers, pin_memory=pin_memory)


class _Fetcher(torch.utils.data.Dataset[Any]):
    """Turns one entry of a plan into a `Batch`; this is what runs in the workers."""

    def __init__(
        self, source: Source, transform: Transform, seed: int, pairs: FreshPairs | None = None
    ) -> None:
        self.source, self._transform, self._seed, self._pairs = source, transform, seed, pairs

    def __getitem__(self, entry: Any) -> Batch | ImageError:
        step, epoch, places, *data = entry
        if data and isinstance(data[0], ImageError):
            return data[0]
        if data:  # read for this step, in the process that plans
            self.source.hold(data[0])  # type: ignore[attr-defined]
        # The default generator of the CPU alone: `torch.manual_seed` would reset every GPU's as well.
        state = torch.default_generator.get_state()
        try:
            if self._pairs is None:
                return self._batch([self._sample(*place) for place in places], places, step, epoch)
            images, shares = zip(*(self._pair(pair, step) for pair in places), strict=True)
            batch = self._batch(images, [own for own, _, _, _ in places], step, epoch)
            partners = torch.tensor([self.source.label(other[1]) for _, other, _, _ in places])
            return replace(batch, partners=partners, share=torch.tensor(shares, dtype=torch.float32))
        except ImageError as error:
            return error  # raised by `_stream`: torch would bury its message in the traceback of a worker
        finally:
            torch.default_generator.set_state(state)

    def _batch(self, images: Sequence[Tensor], places: list[SampleRef], step: int, epoch: int) -> Batch:
        indices = [index for _, index in places]
        return Batch(
            images=torch.stack(list(images)),
            labels=torch.tensor([self.source.label(index) for index in indices]),
            indices=torch.tensor(indices),
            names=tuple(self.source.name(index) for index in indices),
            step=step,
            epoch=epoch,
        )

    def _pair(self, pair: Pair, step: int) -> tuple[Tensor, float]:
        own, other, cut, number = pair
        assert self._pairs is not None
        rng = np.random.default_rng(key(self._seed, "mix", step, number))
        return self._pairs.combine(self._sample(*own), self._sample(*other), cut=cut, rng=rng)

    def _sample(self, showing: int, index: int) -> Tensor:
        if showing == EVAL:
            return self._transform(self.source.image(index))
        number = key(self._seed, "augment", showing, index)
        # transforms v2 draw from torch's default generator and from nothing else, so seeding it is enough.
        torch.default_generator.manual_seed(number)
        return self._transform(self._picture(index, number))

    def _picture(self, index: int, draw: int) -> Any:
        # Some sources hold or decode arrays; a detour over a PIL image would cost them a copy or two.
        pixels = getattr(self.source, "pixels", None)
        if pixels is None or not getattr(self._transform, "takes_arrays", False):
            return self.source.image(index, draw=draw)
        return pixels(index, draw)


def _stream(fetcher: _Fetcher, plan: Plan, *, workers: int, pin_memory: bool) -> Generator[Batch, None, None]:
    from torch.utils.data import DataLoader

    read = getattr(fetcher.source, "read", None)
    ahead = None if read is None else Prefetcher(plan, read)
    batches = iter(
        DataLoader(
            fetcher,
            sampler=plan if ahead is None else ahead,
            batch_size=None,  # the fetcher makes whole batches
            num_workers=workers,  # torch gives each one thread
            pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns where there is no GPU
            prefetch_factor=4 if workers else None,
            generator=torch.Generator().manual_seed(0),  # else it would take a number from the caller's
            worker_init_fn=_leave_signals_to_the_trainer,
        )
    )
    try:
        for batch in batches:
            if isinstance(batch, ImageError):
                raise batch
            yield batch
    finally:
        if ahead is not None:
            ahead.close()
        # Without this, workers would live until the garbage collector comes by.
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
            for worker in getattr(batches, "_workers", ()):  # one that is stuck; it would not hear SIGTERM
                if worker.is_alive():
                    worker.kill()


def _leave_signals_to_the_trainer(_worker: int) -> None:
    # torchrun, Slurm and a terminal send SIGTERM and SIGINT to workers as well. If those died of it, the run could not
    # finish its step and save. A worker ends when the process that it reads for tells it to, or is gone.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
