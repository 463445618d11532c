"""Call a function in a process of its own, which may crash, hang or eat memory; watch what it opens elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reliability.runs import CONTEXT, start_process

# inotify(7)
_OPEN, _CREATE, _MODIFY, _NONBLOCK = 0x20, 0x100, 0x2, 0o4000
_EVENT = struct.Struct("iIII")


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        value: what the function returned; None if it did not.
        error: name of the exception's type, or "killed" or "hangs"; "" if there was none.
        text: text of the exception.
        seconds: processor time of the call and of the processes that it started, which does not depend on others.
        memory: bytes by which the process grew at most.
    """

    value: Any = None
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    memory: int = 0


def call(function: Callable[..., Any], *arguments: Any, patience: float = 60.0) -> Outcome:
    """Call a function, which must be picklable, in another process; kill it after `patience` seconds."""
    here, there = CONTEXT.Pipe(duplex=False)
    process = start_process(_run, there, function, arguments)
    there.close()
    try:
        if not here.poll(patience):
            return Outcome(error="hangs", seconds=patience)
        return here.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        return Outcome(error="killed", text=f"exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        here.close()


def _run(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send the outcome of a call to the parent."""
    before, start = _memory("VmRSS"), _processor_time()
    found: dict[str, Any] = {}
    try:
        found["value"] = function(*arguments)
    except BaseException as error:  # also SystemExit
        found |= {"error": _kind(error), "text": str(error)}
    pipe.send(Outcome(seconds=_processor_time() - start, memory=_memory("VmHWM") - before, **found))


def _processor_time() -> float:
    """Return the processor time of this process and of those that it has waited for."""
    return sum(
        time[0] + time[1]
        for time in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _kind(error: BaseException) -> str:
    """Return "ValueError" for subclasses of it too, which the command prints in one line, else the name of the type."""
    return "ValueError" if isinstance(error, ValueError) else type(error).__name__


def _memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Fill a list with the names of all files of a folder that any process opens, creates or changes meanwhile."""
    events: list[str] = []
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(_NONBLOCK)
    assert handle >= 0, os.strerror(ctypes.get_errno())
    try:
        mask = _OPEN | _CREATE | _MODIFY
        assert libc.inotify_add_watch(handle, os.fsencode(folder), mask) >= 0, os.strerror(ctypes.get_errno())
        yield events
        with contextlib.suppress(BlockingIOError):
            while data := os.read(handle, 65_536):
                events += _names(data)
    finally:
        os.close(handle)


def _names(data: bytes) -> Iterator[str]:
    """Yield the names in the records of inotify."""
    while data:
        _, _, _, length = _EVENT.unpack_from(data)
        name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
        if name:  # else the folder itself
            yield os.fsdecode(name)
        data = data[_EVENT.size + length :]
