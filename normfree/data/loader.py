"""The stream of batches: a function of (seed, step), independent of the number of workers and processes.

Position q = step * batch_size + i of the stream is sample `permutation(N, seed, "order", q // N)[q % N]` of epoch
q // N, augmented by a generator seeded with `key(seed, "augment", epoch, index)`. So a run that stops at any step
continues with the same batches, and the state to save is two integers. With `repeats` = R, each sample is used R times
in a row: q // R replaces q, and copy q % R is augmented as repetition R * cycle + q % R of that sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from normfree.data.multilabel import as_multilabel, targets_of
from normfree.data.sampler import (
    EVAL,
    EvalSampler,
    PairRef,
    PoissonSampler,
    Prefetcher,
    Sampler,
    SampleRef,
    TrainSampler,
    shuffled,
)
from normfree.data.seeds import key
from normfree.data.source import Source, as_streamed, has_pixels, pixels_of
from normfree.data.supervision import (
    DEADLINE,
    INTERVAL,
    LoaderError,
    begin_worker,
    end_workers,
    never,
    share,
    started,
    supervised,
)
from normfree.data.transforms.decode import ImageError
from normfree.data.transforms.mixing import FreshPairs
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one batch.

    Attributes:
        images: Pixel values 0 to 255, B C H W, usually uint8.
        labels: Class numbers, int64 B.
        indices: Sample indices in the source, int64 B.
        names: B paths or ids.
        step: Index of the batch, from 0.
        epoch: Epoch of the first sample of the global batch; 0 in evaluation.
        partners: With `pairs`, the labels of the second images, int64 B.
        share: With `pairs`, the shares of the first images in their outputs, float32 B.
        targets: With a source of several classes for each sample, 1 for its classes and 0 for the others, float32 B K;
            `labels` are the first classes. With `pairs` they are mixed already.
        bad: Names and reasons of images that a `Substituting` source has replaced so far in the same process.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    names: tuple[str, ...]
    step: int
    epoch: int
    partners: Tensor | None = None
    share: Tensor | None = None
    targets: Tensor | None = None
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU can overlap with computation."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            indices=self.indices.pin_memory(),
            partners=None if self.partners is None else self.partners.pin_memory(),
            share=None if self.share is None else self.share.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
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
    members: Callable[[int], np.ndarray] | None = None,
    stopped: Callable[[], bool] = never,
    deadline: float = DEADLINE,
) -> Generator[Batch, None, None]:
    """Return the batches of steps `start_step` to `num_steps` - 1.

    Every batch is full: at the end of an epoch it takes its remaining samples from the next epoch, so it may be larger
    than the data set. Batches are bit-identical for any number of `workers` and any `start_step`, and the caller's
    random state is unchanged. Closing the generator stops the workers.

    Args:
        source: Data set.
        transform: From an RGB image to a tensor; it may draw from PyTorch's default CPU generator.
        batch_size: Samples per step over all ranks; rank r of W gets the r-th of W equal consecutive parts.
        seed: Seed of the order and of all augmentations.
        num_steps: Steps of the whole run, including the finished ones.
        start_step: First step to return.
        workers: Processes that decode; 0 decodes in this one.
        rank: This process.
        world_size: Number of processes.
        pin_memory: Return batches in page-locked memory if there is a GPU.
        pairs: If given, every output is a mix of two images read for it, so a step reads 2 * `batch_size` samples.
        repeats: Repeated augmentation. A batch holds `batch_size` / `repeats` samples, each `repeats` times in a row
            with different augmentations; some copies may be on one rank and the others on the next. Epochs count
            the images shown: after `repeats` epochs every sample has been shown `repeats` times, with the same
            augmentations as in that many epochs without repeats.
        members: If given, `members(step)` returns the indices of the samples of a step, of any number, in place of the
            permutation: for Poisson sampling, in one process and without `pairs`. It is called in this process alone.
        stopped: Called before each batch, and every second while one is awaited; True raises LoadingStopped.
        deadline: Seconds to wait for one batch of the workers.

    Raises:
        ValueError: An argument is out of range; raised at once.
        ImageError: An image cannot be read; raised while iterating, with the name of the image.
        LoaderError: A worker has ended, shared memory is full, or the deadline has passed.

    Source:
        Repeated augmentation: Hoffer et al. 2020, "Augment your batch"; Berman et al. 2019, "MultiGrain".
    """
    _check(source, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)
    _check_train(
        batch_size, world_size=world_size, start_step=start_step, num_steps=num_steps, repeats=repeats
    )
    streamed = as_streamed(source)
    n, steps = len(source), range(start_step, num_steps)
    order = shuffled(n, seed) if streamed is None else lambda cycle: streamed.order(seed, cycle)
    sampler: Sampler = TrainSampler(
        n, batch_size=batch_size, steps=steps, order=order, rank=rank, world_size=world_size, pairs=pairs,
        repeats=repeats,
    )  # fmt: skip
    if members is not None:
        assert streamed is None
        sampler = PoissonSampler(n, batch_size=batch_size, steps=steps, members=members, repeats=repeats)
    return _stream(
        _Fetcher(source, transform, seed, pairs),
        sampler,
        workers=workers,
        pin_memory=pin_memory,
        stopped=stopped,
        deadline=deadline,
    )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    stopped: Callable[[], bool] = never,
    deadline: float = DEADLINE,
) -> Generator[Batch, None, None]:
    """Return every sample exactly once over all ranks, in order, as its canonical image.

    The last batch may be short. Ranks take consecutive parts whose sizes differ by at most one, so ranks may see
    different numbers of batches, or none: to average over ranks, sum the counts, then divide.

    Args:
        source: Data set.
        transform: From an RGB image to a tensor.
        batch_size: Samples per step of one rank.
        workers: Processes that decode; 0 decodes in this one.
        rank: This process.
        world_size: Number of processes.
        pin_memory: Return batches in page-locked memory if there is a GPU.
        stopped: Called before each batch, and every second while one is awaited; True raises LoadingStopped.
        deadline: Seconds to wait for one batch of the workers.

    Raises:
        ValueError: An argument is out of range; raised at once.
        ImageError: An image cannot be read; raised while iterating, with the name of the image.
        LoaderError: A worker has ended, shared memory is full, or the deadline has passed.
    """
    _check(source, batch_size=batch_size, workers=workers, rank=rank, world_size=world_size)
    sampler = EvalSampler(len(source), batch_size, rank, world_size)
    return _stream(
        _Fetcher(source, transform, 0),
        sampler,
        workers=workers,
        pin_memory=pin_memory,
        stopped=stopped,
        deadline=deadline,
    )


class _Fetcher(torch.utils.data.Dataset[Any]):
    """A map from an entry of a sampler to a `Batch`, evaluated in the workers."""

    def __init__(
        self, source: Source, transform: Transform, seed: int, pairs: FreshPairs | None = None
    ) -> None:
        self.source, self._transform, self._seed, self._pairs = source, transform, seed, pairs
        self.streamed = as_streamed(source)
        self._several = as_multilabel(source) is not None
        self._reads_pixels = has_pixels(source) and getattr(transform, "takes_arrays", False)

    def __getitem__(self, entry: Any) -> Batch | ImageError | LoaderError:
        step, epoch, refs, *data = entry
        if data and isinstance(data[0], ImageError | LoaderError):
            return data[0]
        if data and self.streamed is not None:
            self.streamed.hold(data[0])
        # Only the default CPU generator: `torch.manual_seed` would also reset the generators of all GPUs.
        state = torch.default_generator.get_state()
        try:
            if self._pairs is None:
                # A step of a Poisson sample may have no samples; one image gives its tensor a shape.
                shown = refs or [(step, 0)]
                return self._batch([self._sample(*ref) for ref in shown], refs, step, epoch)
            images, shares = zip(*(self._pair(pair, step) for pair in refs), strict=True)
            batch = self._batch(images, [own for own, _, _, _ in refs], step, epoch)
            partners = torch.tensor([self.source.label(other[1]) for _, other, _, _ in refs])
            share = torch.tensor(shares, dtype=torch.float32)
            targets = batch.targets
            if targets is not None:
                others = targets_of(self.source, [other[1] for _, other, _, _ in refs])
                targets = share[:, None] * targets + (1 - share[:, None]) * others
            return replace(batch, partners=partners, share=share, targets=targets)
        except (ImageError, LoaderError) as error:
            return error  # raised by `_stream`: PyTorch would bury its message in the traceback of a worker
        finally:
            torch.default_generator.set_state(state)

    def _batch(self, images: Sequence[Tensor], refs: list[SampleRef], step: int, epoch: int) -> Batch:
        """Stack the images of `refs` and add their labels and names."""
        indices = [index for _, index in refs]
        stack = torch.stack(list(images))[: len(refs)]
        if len(stack) and torch.utils.data.get_worker_info() is not None:
            share([stack])
        return Batch(
            images=stack,
            labels=torch.tensor([self.source.label(index) for index in indices], dtype=torch.int64),
            indices=torch.tensor(indices, dtype=torch.int64),
            names=tuple(self.source.name(index) for index in indices),
            step=step,
            epoch=epoch,
            targets=targets_of(self.source, indices) if self._several else None,
            bad=tuple(getattr(self.source, "bad", {}).items()),
        )

    def _pair(self, pair: PairRef, step: int) -> tuple[Tensor, float]:
        """Return the mix of two samples, and the share of the first one."""
        own, other, cut, output = pair
        assert self._pairs is not None
        rng = np.random.default_rng(key(self._seed, "mix", step, output))
        return self._pairs.combine(self._sample(*own), self._sample(*other), cut=cut, rng=rng)

    def _sample(self, repetition: int, index: int) -> Tensor:
        """Return one transformed image, augmented unless `repetition` is EVAL."""
        if repetition == EVAL:
            return self._transform(self.source.image(index))
        draw = key(self._seed, "augment", repetition, index)
        # transforms v2 draw only from PyTorch's default generator, so seeding it is enough.
        torch.default_generator.manual_seed(draw)
        # Some sources hold or decode arrays; a detour through a PIL image would cost them a copy or two.
        image: Any = (
            pixels_of(self.source, index, draw) if self._reads_pixels else self.source.image(index, draw=draw)
        )
        return self._transform(image)


def _stream(
    fetcher: _Fetcher,
    sampler: Sampler,
    *,
    workers: int,
    pin_memory: bool,
    stopped: Callable[[], bool] = never,
    deadline: float = DEADLINE,
) -> Generator[Batch, None, None]:
    """Run PyTorch's loader over `sampler`, raise the errors of the workers, and stop the workers at the end."""
    from torch.utils.data import DataLoader

    prefetcher = (
        None if fetcher.streamed is None else Prefetcher(sampler, fetcher.streamed.read, stopped=stopped)
    )
    batches: Iterator[Any] | None = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "This DataLoader will create"
            )  # more workers than cores are no fault
            batches = started(
                DataLoader(
                    fetcher,
                    sampler=sampler if prefetcher is None else prefetcher,
                    batch_size=None,  # the fetcher makes whole batches
                    num_workers=workers,  # PyTorch gives each one thread
                    pin_memory=pin_memory and torch.cuda.is_available(),  # PyTorch warns if there is no GPU
                    prefetch_factor=4 if workers else None,
                    generator=torch.Generator().manual_seed(0),  # else it would draw from the caller's
                    worker_init_fn=begin_worker,
                    timeout=INTERVAL if workers else 0,  # `supervised` then calls again
                )
            )
        for batch in supervised(batches, stopped=stopped, deadline=deadline):
            if isinstance(batch, ValueError):  # ImageError or LoaderError
                raise batch
            yield batch
    finally:
        if prefetcher is not None:
            prefetcher.close()
        if batches is not None:
            end_workers(batches)


def _check(source: Source, *, batch_size: int, workers: int, rank: int, world_size: int) -> None:
    """Raise `ValueError` for an empty source and for arguments out of range."""
    if len(source) == 0:
        raise ValueError(
            problem("the source has no samples", allowed="at least one", fix="check the path of the data")
        )
    for option, value, least in (
        ("batch_size", batch_size, 1),
        ("workers", workers, 0),
        ("world_size", world_size, 1),
    ):
        if value < least:
            raise ValueError(
                problem(f"{option}={value}", allowed=f"{least} or more", fix=f"{option}={least}")
            )
    if not 0 <= rank < world_size:
        raise ValueError(
            problem(
                f"rank={rank} of {world_size}", allowed=f"0 to {world_size - 1}", fix=f"rank={world_size - 1}"
            )
        )


def _check_train(batch_size: int, *, world_size: int, start_step: int, num_steps: int, repeats: int) -> None:
    """Raise `ValueError` for arguments of `train_batches` that do not fit together."""
    if batch_size % world_size:
        nearest = max(batch_size // world_size, 1) * world_size
        raise ValueError(
            problem(
                f"batch_size={batch_size} for {world_size} processes",
                allowed=f"multiples of {world_size}, as each process takes an equal part",
                fix=f"batch_size={nearest}",
            )
        )
    if not 0 <= start_step <= num_steps:
        raise ValueError(
            problem(
                f"start_step={start_step} of num_steps={num_steps}",
                allowed=f"0 to {num_steps}",
                fix="num_steps counts the steps of the whole run, including the finished ones",
            )
        )
    if repeats < 1 or batch_size % repeats:
        nearest = max(d for d in range(1, min(max(repeats, 1), batch_size) + 1) if batch_size % d == 0)
        raise ValueError(
            problem(
                f"repeats={repeats} with batch_size={batch_size}",
                allowed="1 or more, and a divisor of batch_size, as the copies of a sample share a batch",
                fix=f"repeats={nearest}",
            )
        )
