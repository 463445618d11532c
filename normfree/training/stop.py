"""Stop a run when SIGTERM, SIGINT, SIGHUP or SIGUSR1 arrives: between two steps, or at once if nothing can be lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

# End of a job (TERM), Ctrl-C (INT), a closed terminal (HUP), and the warning of Slurm's --signal=USR1.
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
# Seconds between two checks whether the launcher lives.
_INTERVAL = 1.0


class StoppedBySignal(BaseException):
    """A signal ended the run. This is no error: everything is saved. Like KeyboardInterrupt, it is no `Exception`.

    `step` is the number of steps in the last checkpoint if the signal arrived between the first step and the last
    one, else None: nothing was left to save. `exit_code` is 128 + the number of the signal.
    """

    def __init__(self, step: int | None, number: int) -> None:
        super().__init__("stopped by a signal" if step is None else f"stopped after step {step}")
        self.step, self.exit_code = step, 128 + number


class Stop:
    """What a signal does: it raises StoppedBySignal at once, or within `deferred` only sets `number`."""

    def __init__(self) -> None:
        self.number = 0  # of the first signal, 0 before
        self._deferred = False

    def requested(self) -> bool:
        """Return True if a signal has arrived."""
        return self.number != 0

    def arrive(self, number: int) -> None:
        """Act on a signal."""
        self.number = self.number or number
        if not self._deferred:
            raise StoppedBySignal(None, number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Return a context whose code looks at `number` itself, to save first."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle the first signal of each kind with a `Stop`; a second one acts as before.

    Signals that the caller ignores, as under nohup or in a background job, stay ignored. SIGHUP and SIGUSR1 that the
    caller handles stay the caller's.
    """
    stop = Stop()
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        signal.signal(number, previous[number])
        stop.arrive(number)

    try:
        for name in NAMES if threading.current_thread() is threading.main_thread() else ():
            number = getattr(signal, name, None)  # Windows has two of them
            before = None if number is None else signal.getsignal(number)
            theirs = before is not signal.SIG_DFL and name in ("SIGHUP", "SIGUSR1")
            if number is None or before is signal.SIG_IGN or before is None or (theirs and not _ours(before)):
                continue
            previous[number] = before
            signal.signal(number, handle)
        yield stop
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)


def _ours(handler: Any) -> bool:
    """Return True for a handler that an outer `stop_signals` has set."""
    return getattr(handler, "__module__", "") == __name__


def stop_with_launcher() -> None:
    """Under torchrun, let this process stop as by SIGTERM when its launcher is gone, which would have sent it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    """Send SIGTERM to this process when `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(_INTERVAL)
    os.kill(os.getpid(), signal.SIGTERM)
