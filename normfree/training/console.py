"""Messages and progress of a run on the console."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from normfree.suggest import printable

# Seconds between progress lines if the output is not a terminal.
QUIET_INTERVAL = 10.0
# The same for lines without scores, which slow steps make necessary, after a first one.
SLOW_INTERVAL = 60.0


class RunLog:
    """Messages of a run: printed to a console and, once a file is attached, also written to that file.

    A console that is gone (a closed terminal or pipe) and a full disk do not end the run: the messages are dropped.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._earlier: list[str] = []
        self._file: Path | None = None

    def info(self, text: str) -> None:
        """Print a line and write it to the attached file. Long lines are not wrapped."""
        text = printable(text)
        try:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        except OSError:
            self.console.quiet = True
        if self._file is None:
            self._earlier.append(text + "\n")
        else:
            self._append(text + "\n")

    def attach_file(self, path: Path) -> None:
        """Append all earlier and later messages to the file `path`."""
        self._file = path
        self._append("".join(self._earlier))
        self._earlier = []

    def _append(self, text: str) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8", newline="\n") as file:
            file.write(text)


class ProgressLine:
    """Progress of a run: loss, top-1, images per second, fraction of clipped units and remaining time.

    On a terminal it is one line that is updated in each step, elsewhere a new line every QUIET_INTERVAL seconds. If
    scores are rare, lines with the remaining time alone are printed between them: the first one after QUIET_INTERVAL.
    """

    def __init__(self, run_log: RunLog, *, step: int, total_steps: int) -> None:
        console = run_log.console
        self._run_log, self._quiet = run_log, not console.is_terminal
        self._total, self._last = total_steps, time.monotonic()
        self._progress = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            TextColumn("left"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total_steps, completed=step)
        self._first_step, self._start = step, time.monotonic()
        self._updated, self._wait = self._start, QUIET_INTERVAL

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, step: int) -> None:
        """Show that `step` steps were taken."""
        self._progress.update(self._task, completed=step)
        now = time.monotonic()
        if self._quiet and now - max(self._last, self._updated) >= self._wait:
            self._print(step, now)
            self._wait = SLOW_INTERVAL

    def _print(self, step: int, now: float, text: str = "") -> None:
        """Print a line with the remaining time, predicted from the steps taken so far."""
        pace = (now - self._start) / max(1, step - self._first_step)
        left = duration(pace * (self._total - step))
        self._run_log.info("  ".join(filter(None, (f"step {step}/{self._total}", text, f"{left} left"))))
        self._last = now

    def update(self, step: int, **values: float) -> None:
        """Show the values after `step` steps: loss, train_top1 (percent), images_per_s and clipped (fraction).

        A private run has no values, since they are properties of the training images.
        """
        text = "private"
        if values:
            text = (
                f"loss {values['loss']:.3f}  top-1 {values['train_top1']:.1f} %  "
                f"{values['images_per_s']:.0f} images/s  clipped {100 * values['clipped']:.1f} %"
            )
        self._progress.update(self._task, completed=step, description=text)
        self._updated = now = time.monotonic()
        if self._quiet and now - self._last >= QUIET_INTERVAL:
            self._print(step, now, text)


def duration(seconds: float) -> str:
    """Return a number of seconds as a person would write it.

    >>> duration(50), duration(400), duration(5108), duration(300_000)
    ('50 s', '7 min', '1 h 25 min', '3 d 11 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
