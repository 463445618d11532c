"""The processes of a run and what they exchange. A single process is a world of size 1, so the loop has one path.

torchrun starts the processes and identifies them by RANK, LOCAL_RANK and WORLD_SIZE. Without batch statistics a
gradient is a sum over images, so the processes exchange only one sum of gradients per step, one number that tells
whether a process was asked to stop, and the results of an evaluation.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from normfree.device import run_device
from normfree.suggest import problem

Result = TypeVar("Result")

# Elements that are sent together: 32 MiB of float32, enough to use a fast network fully.
BUCKET = 2**23
# How long the other ranks wait while rank 0 opens each image or writes to a slow disk.
PATIENCE = timedelta(hours=2)


class ElsewhereError(ValueError):
    """Error raised in all other processes when one process of the run fails, so that none waits for it.

    The message contains that of the failed process.
    """


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen by one of them.

    Methods that end in `_` change tensors in place. All methods are collective: every process calls them in the same
    order. They raise ElsewhereError if another process has ended.

    Args:
        rank: Index of this process, counted from 0. Only rank 0 writes files and prints.
        size: Number of processes.
        device: Device of this process.
        backend: "gloo", "nccl", or "" for a world of size 1, which exchanges nothing.
        control: A gloo group for flags and messages, so that they need neither a GPU nor its queue.
        owned: Whether `close` destroys the process group.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = ""
    control: Any = None
    owned: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def part(self, batch_size: int) -> int:
        """Return the number of images of a batch for each process.

        Raises:
            ValueError: The batch cannot be divided equally.
        """
        if batch_size % self.size:
            below = batch_size // self.size * self.size
            near = f"{below} or {below + self.size}" if below else str(self.size)
            raise ValueError(
                problem(
                    f"input.batch_size={batch_size} for {self.size} processes",
                    allowed=f"a multiple of {self.size}, because all processes take equal parts",
                    fix=f"use {near}",
                )
            )
        return batch_size // self.size

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, bit for bit the same in all of them."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            _exchange(dist.all_reduce, flat)
            parts = flat.split([t.numel() for t in bucket])
            torch._foreach_copy_(
                [t.detach() for t in bucket], [p.view(t.shape) for p, t in zip(parts, bucket, strict=True)]
            )

    def tree_sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, added in pairs: ((t0 + t1) + (t2 + t3)) + ...

        The result has the bits that one process would get in this order. The size must be a power of two.
        """
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
        """Replace each floating-point tensor by its mean over the processes."""
        if self.size > 1 and tensors:
            self.sum_(tensors)
            torch._foreach_div_([t.detach() for t in tensors], self.size)

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""
        for bucket in _buckets(tensors) if self.size > 1 else ():
            # the step counts of PyTorch's optimizers are on the CPU, where NCCL cannot broadcast
            flat = torch.cat([t.detach().reshape(-1).to(self.device) for t in bucket])
            _exchange(dist.broadcast, flat, src=0)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def concatenate(self, part: Tensor) -> Tensor:
        """Concatenate tensors of one shape, on the device, of all processes in order of rank."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        _exchange(dist.all_gather, parts, part.contiguous())
        return torch.cat(parts)

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows ([N_r, C] on the CPU) of all processes in order of rank; N_r may differ and be 0."""
        return rows if self.size == 1 else torch.cat(self.all_gather(rows))

    def largest(self, number: int) -> int:
        """Return the largest `number` of all processes. With flags, 0 means that no process has set one."""
        if self.size == 1:
            return number
        flag = torch.tensor([number])
        _exchange(dist.all_reduce, flag, op=dist.ReduceOp.MAX, group=self.control)
        return int(flag)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""
        return bool(self.largest(int(flag)))

    def all_gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, in order of rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            _exchange(dist.all_gather_object, values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        self.largest(0)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Return a context that either all processes complete or none does.

        If processes raise, the one of lowest rank raises its error again and all others raise ElsewhereError with its
        message. So rank 0 always knows the reason, and an error of all processes is reported once.
        """
        failure: Exception | None = None
        try:
            yield
        except ElsewhereError:
            raise  # the connection to the other processes is lost
        except Exception as error:
            failure = error
        message = "" if failure is None else str(failure) or type(failure).__name__
        try:
            failed = {rank: text for rank, text in enumerate(self.all_gather(message)) if text}
        except ElsewhereError:
            raise failure or ElsewhereError(
                "another process of this run has ended. Its output has the reason."
            ) from None
        if failure is not None and self.rank == min(failed):
            raise failure
        if failed:
            raise ElsewhereError(f"process {min(failed)} of {self.size}: {failed[min(failed)]}")

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Return a context in which FSDP2's own collectives also raise ElsewhereError if a process has ended."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "onnection" in str(error)
            if self.size == 1 or not lost:
                raise
            raise _ended(error) from error

    def close(self) -> None:
        """Destroy the process group if this world has created it, and end its threads.

        Gloo's threads end when the last reference to the group is gone. A thread that outlives the interpreter and
        still holds a tensor of the last collective aborts the process, after all its work was done.
        """
        if self.owned:
            dist.destroy_process_group()
            object.__setattr__(self, "control", None)
            gc.collect()  # for a reference in a cycle, such as a traceback

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_world(device: str) -> World:
    """Join the world that torchrun describes in the environment; without torchrun, return a world of size 1.

    An existing process group is used, and not destroyed by `close`.

    Args:
        device: With "auto" and "cuda" each process of a machine gets its own GPU, by LOCAL_RANK; "cpu" needs none.

    Raises:
        ValueError: Several processes cannot use the device, or the variables of the environment are not valid.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return World(device=run_device(device))
    rank, local = _number("RANK", -1), _number("LOCAL_RANK", -1)
    if not 0 <= rank < size or local < 0 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ValueError(
            problem(
                f"WORLD_SIZE={size} without valid RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
                fix="start several processes with torchrun --nproc-per-node N -m normfree train ...",
            )
        )
    own = device_of(device, local=local, gpus=torch.cuda.device_count())
    backend = "nccl" if own.type == "cuda" else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError(
            problem(f"device {device!r} for {size} processes needs PyTorch with NCCL", fix="use --device cpu")
        )
    if own.type == "cuda":
        torch.cuda.set_device(own)
    owned = not dist.is_initialized()
    if owned:
        # This module's functions have the default group as the default of an argument. Imported later (torch's
        # optimizers do), it would keep the group alive until the process ends.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group(backend)
    return World(rank, size, own, backend, dist.new_group(backend="gloo", timeout=PATIENCE), owned)


def device_of(device: str, *, local: int, gpus: int) -> torch.device:
    """Return the device of one of several processes.

    Args:
        device: "auto", "cuda" or "cpu".
        local: Index of the process on its machine, counted from 0.
        gpus: Number of GPUs of the machine.

    Raises:
        ValueError: There is no GPU for the process, or the device cannot be shared by processes.
    """
    if device == "cpu" or (device == "auto" and gpus == 0):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise ValueError(
            problem(
                f"device {device!r} for several processes",
                allowed="auto, cuda (one GPU each), cpu",
                fix="use --device auto",
            )
        )
    if local >= gpus:
        raise ValueError(
            problem(
                f"no GPU for process {local + 1} of this machine, which has {gpus}",
                fix=f"use --nproc-per-node {gpus}" if gpus else "use --device cpu",
            )
        )
    return torch.device("cuda", local)


def _number(name: str, default: int) -> int:
    """Return an integer variable of the environment."""
    text = os.environ.get(name, str(default))
    if not text.lstrip("-").isdigit():
        raise ValueError(
            problem(f"{name}={text!r} in the environment", allowed="a whole number, as set by torchrun")
        )
    return int(text)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield lists of tensors of one dtype with about BUCKET elements, in the same order in all processes."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        members = alike.setdefault(tensor.dtype, [])
        members.append(tensor)
        if sum(t.numel() for t in members) >= BUCKET:
            yield alike.pop(tensor.dtype)
    yield from alike.values()


def _exchange(collective: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Call a collective; turn a broken connection into an ElsewhereError, which prints one line."""
    try:
        collective(*arguments, **options)
    except RuntimeError as error:
        raise _ended(error) from error


def _ended(error: RuntimeError) -> ElsewhereError:
    """Return the error for a connection that `error` reports as broken."""
    first = (str(error).splitlines() or [""])[0]
    return ElsewhereError(
        f"another process of this run has ended ({first[:200]}). Its output has the reason."
    )


def _swap(mine: Tensor, theirs: Tensor, *, partner: int) -> None:
    """Send `mine` to `partner` and receive its tensor in `theirs`."""
    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
    ):
        work.wait()
