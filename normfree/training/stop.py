"""Stop a run after the current step when SIGTERM or SIGINT arrives."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class StoppedBySignal(Exception):
    """A signal ended the run after `step` steps. This is no error: the run was saved.

    `exit_code` is 128 + the number of the signal.
    """

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.exit_code = step, 128 + number


@contextlib.contextmanager
def stop_flag() -> Iterator[list[int]]:
    """Yield a list that receives the number of the first SIGTERM or SIGINT; a second signal acts as usual."""
    stop: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        stop.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread, which alone can handle signals
        pass
    try:
        yield stop
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)
