"""Supervision of the processes that load images: none outlives its parent, and no wait for a batch is endless."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from normfree.suggest import problem

# Seconds between two checks of the workers and of `stopped` while a batch is awaited.
INTERVAL = 1
# Seconds after which a batch is given up. The slowest storage that is still of use takes minutes for a shard.
DEADLINE = 600.0
# Seconds in which workers may finish what they are reading at the end.
GRACE = 3.0
SHARED_MEMORY = Path("/dev/shm")


class LoaderError(ValueError):
    """Batches can no longer be loaded: a worker has ended, shared memory is full, or a wait took too long."""


class LoadingStopped(LoaderError):
    """The caller asked to stop while a batch was awaited."""

    def __init__(self) -> None:
        super().__init__("loading was stopped.")


def never() -> bool:
    """Return False: the default of `stopped`."""
    return False


def started(loader: Iterable[Any]) -> Iterator[Any]:
    """Return the iterator of a PyTorch loader, which starts its workers.

    Raises:
        LoaderError: they cannot be started: the system has too many processes, or the process that starts them for
            this one (Python's fork server) has ended.
    """
    try:
        return iter(loader)
    except (OSError, EOFError) as error:
        given = f"the processes that load images cannot be started ({error or type(error).__name__})"
        raise LoaderError(problem(given, fix="resume the run, or use --input.workers 0")) from None


def supervised(
    batches: Iterator[Any], *, stopped: Callable[[], bool] = never, deadline: float = DEADLINE
) -> Iterator[Any]:
    """Yield the items of a PyTorch loader's iterator whose `timeout` is INTERVAL, or of one without workers.

    Args:
        batches: the iterator.
        stopped: called before each item, and every INTERVAL seconds while one is awaited.
        deadline: seconds to wait for one item.

    Raises:
        LoadingStopped: `stopped` returned True.
        LoaderError: a worker has ended, or the deadline has passed.
    """
    workers = list(getattr(batches, "_workers", ()))
    if workers:
        _hear_of_workers_only_here()
    while True:
        end = time.monotonic() + deadline
        while True:
            if stopped():
                raise LoadingStopped
            try:
                item = next(batches)
                break
            except StopIteration:
                return
            # A worker that dies while it sends breaks the connection, which raises OSError or EOFError.
            except (RuntimeError, OSError, EOFError) as error:
                dead = [w for w in workers if w.exitcode is not None]
                if dead:
                    raise LoaderError(_death(dead[0].exitcode)) from None
                if "timed out" not in str(error):
                    raise
                if time.monotonic() > end:
                    raise LoaderError(
                        problem(f"no batch of images arrived in {deadline:g} seconds",
                                fix="check that the storage of the data answers, then resume")
                    ) from None  # fmt: skip
        yield item


def _hear_of_workers_only_here() -> None:
    """Remove PyTorch's handler of SIGCHLD, which raises an error between any two instructions of the main thread.

    In the middle of an update, that would leave half of the weights changed. `supervised` notices dead workers itself.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    if getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _death(code: int) -> str:
    """Return the message for a worker that ended with this exit code."""
    if code == -getattr(signal, "SIGBUS", 0):
        return full_shared_memory("ended by a bus error")
    reason = f"exit code {code}"
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
    fix = "resume; if memory was short, with fewer --input.workers"
    return problem(f"a process that loads images has ended ({reason})", fix=fix)


def end_workers(batches: Iterator[Any]) -> None:
    """End the workers of a loader's iterator, which would else live until the next garbage collection.

    Those that have not ended after GRACE seconds are stuck in a read, and are killed.
    """
    shut_down = getattr(batches, "_shutdown_workers", None)
    if shut_down is None:
        return
    workers = list(getattr(batches, "_workers", ()))
    timer = threading.Timer(GRACE, _kill, args=(workers,))  # PyTorch would wait 5 seconds for each
    timer.daemon = True
    timer.start()
    try:
        shut_down()
    finally:
        timer.cancel()
        _kill(workers)


def _kill(workers: list[Any]) -> None:
    """Kill the workers that are alive. They ignore SIGTERM."""
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def full_shared_memory(what: str) -> str:
    """Return the message for shared memory that cannot take a batch."""
    size = ""
    if SHARED_MEMORY.exists():
        stats = os.statvfs(SHARED_MEMORY)
        size = f", which has {stats.f_blocks * stats.f_frsize / 2**20:,.1f} MiB"
    return problem(
        f"a process that loads images found no space for a batch in {SHARED_MEMORY}{size} ({what})",
        fix="resume with --input.workers 0, or make it larger (docker run --shm-size=2g)",
    )


# --- in the worker --------------------------------------------------------------------------------------


def share(tensors: list[Tensor]) -> None:
    """Move tensors to shared memory, as PyTorch does when it sends them.

    PyTorch does so in a thread that prints an error and drops the batch, for which the parent would wait for ever.

    Raises:
        LoaderError: shared memory is full.
    """
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise LoaderError(full_shared_memory(f"{sum(t.nbytes for t in tensors):,} bytes")) from error


def begin_worker(_worker: int) -> None:
    """Leave all stop signals to the parent process, and end when it is gone.

    torchrun, Slurm and a terminal send them to workers as well. If workers died of them, the run could not finish its
    step and save.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when `parent` is no longer its parent, also while an image is being read."""
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)
