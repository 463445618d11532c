"""The processes of a run. One process is a world too: the loop has no second path.

torchrun starts the processes and says in RANK, LOCAL_RANK and WORLD_SIZE who is who. Without batch statistics a
gradient is a sum over images, so what the processes exchange is one sum of gradients per step, one number that
tells whether anybody was asked to stop, and the rows of an evaluation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.device import run_device

Result = TypeVar("Result")

BUCKET = 2**23  # elements that are sent together: 32 MiB of float32, large enough to fill a fast network
PATIENCE = timedelta(
    hours=2
)  # the others wait for the first one to open each picture, or to write on a slow disk


class ElsewhereError(ValueError):
    """Another process of the run failed; `str(error)` has its words. Raised in all others, so that none waits."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: number of this process, from 0; the first one alone writes and speaks. size: how many there are.
    device: where this process computes. backend: "gloo", "nccl", or "" for a world of one, which exchanges nothing.

    Methods ending in `_` change tensors in place. All are collective: every process calls them in the same order.
    They raise ElsewhereError when another process has ended.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = ""
    control: Any = None  # a gloo group, so that words and flags need neither a GPU nor its queue
    owned: bool = False  # whether `close` ends the process group

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def part(self, batch_size: int) -> int:
        """Images of a batch that fall to each process. Raises ValueError when they cannot be equally many."""
        if batch_size % self.size:
            below = batch_size // self.size * self.size
            near = f"{below} or {below + self.size}" if below else str(self.size)
            raise ValueError(
                f"input.batch_size={batch_size} for {self.size} processes: expected a multiple of {self.size}, as each "
                f"takes an equal part. Nearest: {near}."
            )
        return batch_size // self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by its sum over the processes, bit for bit the same in all of them."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            _exchange(dist.all_reduce, flat)
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(
                [t.detach() for t in bucket], [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)]
            )

    def tree_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by its sum over the processes, a power of two, added in pairs: ((t0 + t1) + (t2 + t3))
        + ..., with the bits that one process would get in this order."""
        assert self.size & (self.size - 1) == 0, self.size
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            other = torch.empty_like(flat)
            for level in range(self.size.bit_length() - 1):
                _exchange(_swap, flat, other, partner=self.rank ^ (1 << level))
                flat += other  # a + b and b + a are the same float
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(
                [t.detach() for t in bucket], [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)]
            )

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every floating-point tensor by its mean over the processes."""
        if self.size > 1 and tensors:
            self.sum_(tensors)
            torch._foreach_div_([t.detach() for t in tensors], self.size)

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replaces every tensor by the first process's."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            _exchange(dist.broadcast, flat, src=0)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (N_r C, on the CPU) of all processes, in order of rank; N_r may differ and be 0."""
        return rows if self.size == 1 else torch.cat(self.all_gather(rows))

    def largest(self, number: int) -> int:
        """The largest `number` of all processes: 0 means that nobody raised a flag."""
        if self.size == 1:
            return number
        flag = torch.tensor([number])
        _exchange(dist.all_reduce, flag, op=dist.ReduceOp.MAX, group=self.control)
        return int(flag)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.largest(int(flag)))

    def all_gather(self, value: Result) -> list[Result]:
        """What every process said, in order of rank."""
        said: list[Any] = [value] * self.size
        if self.size > 1:
            _exchange(dist.all_gather_object, said, value, group=self.control)
        return said

    def barrier(self) -> None:
        """Waits for all processes."""
        self.largest(0)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """All processes leave the block, or none does.

        Of those that raised, the one of lowest rank raises its error again, all others ElsewhereError with its words.
        So the first process always has the reason, and a mistake that all meet is not told by each.
        """
        problem: Exception | None = None
        try:
            yield
        except ElsewhereError:
            raise  # nobody is left to talk to
        except Exception as error:
            problem = error
        words = "" if problem is None else str(problem) or type(problem).__name__
        try:
            failed = {rank: text for rank, text in enumerate(self.all_gather(words)) if text}
        except ElsewhereError:
            raise problem or ElsewhereError(
                "another process of this run has ended. Its own output says why."
            ) from None
        if problem is not None and self.rank == min(failed):
            raise problem
        if failed:
            raise ElsewhereError(f"process {min(failed)} of {self.size}: {failed[min(failed)]}")

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Within the block, exchanges that FSDP2 makes by itself raise ElsewhereError too, when a process has ended."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error)
            if self.size == 1 or not lost:
                raise
            raise _ended(error) from error

    def close(self) -> None:
        """Leaves the world."""
        if self.owned:
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_world(device: str) -> World:
    """Joins the world that torchrun describes in the environment; without torchrun, a world of this one process.

    device: "auto" and "cuda" give every process of a machine a GPU of its own, by LOCAL_RANK; "cpu" needs none.
    A process group that exists already is used, and left open by `close`.

    Raises:
        ValueError: the device cannot serve several processes, or the environment is not torchrun's.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return World(device=run_device(device))
    rank, local = _number("RANK", -1), _number("LOCAL_RANK", -1)
    if not 0 <= rank < size or local < 0 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            f"WORLD_SIZE={size} without a usable RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Several processes are "
            "started by torchrun: torchrun --nproc-per-node N -m normfree train ..."
        )
    place = device_of(device, local=local, gpus=torch.cuda.device_count())
    backend = "nccl" if place.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError(f"device {device!r} for {size} processes needs a torch with NCCL. Use --device cpu.")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group(backend)
    return World(rank, size, place, backend, dist.new_group(backend="gloo", timeout=PATIENCE), owned)


def device_of(device: str, *, local: int, gpus: int) -> torch.device:
    """The device of process number `local` on a machine with `gpus` GPUs, when there are several processes.

    Raises:
        ValueError: there is no GPU for it, or the device is one that processes cannot share.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"device {device!r} for several processes. Allowed: auto, cuda (one GPU each), cpu. Use --device auto."
        )
    if local >= gpus:
        raise ValueError(
            f"process {local + 1} of this machine has no GPU of its own: there are {gpus}. "
            + (f"Use --nproc-per-node {gpus}." if gpus else "Use --device cpu.")
        )
    return torch.device("cuda", local)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.lstrip("-").isdigit():
        raise ValueError(f"{name}={text!r} in the environment. Allowed: a whole number, as torchrun sets it.")
    return int(text)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in lists of about BUCKET elements, in an order that all processes share."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        members = alike.setdefault(tensor.dtype, [])
        members.append(tensor)
        if sum(t.numel() for t in members) >= BUCKET:
            yield alike.pop(tensor.dtype)
    yield from alike.values()


def _exchange(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Runs a collective; a broken connection becomes one line instead of a traceback."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        raise _ended(error) from error


def _ended(error: RuntimeError) -> ElsewhereError:
    first = (str(error).splitlines() or [""])[0]
    return ElsewhereError(f"another process of this run has ended ({first[:200]}). Its own output says why.")


def _swap(mine: Tensor, theirs: Tensor, *, partner: int) -> None:
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
    ):
        work.wait()
