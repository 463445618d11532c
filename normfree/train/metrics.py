"""What a run says: metrics.jsonl always, and one live line on a terminal (or a line now and then in a file)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_INTERVAL = 10.0  # seconds between lines where there is no terminal


class Metrics:
    """Appends objects to `metrics.jsonl`. Opened at a step, it drops what a killed run had written beyond it."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """One object; flushed, so that it outlives the process."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class LiveLine:
    """Progress on a terminal: one line with loss, top-1, images/s, clipped fraction and the time left."""

    def __init__(self, console: Console, *, step: int, total_steps: int) -> None:
        self._console, self._total, self._text, self._last = console, total_steps, "", time.monotonic()
        self._progress = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            TextColumn("left"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total_steps, completed=step)
        self._first_step, self._start = step, time.monotonic()

    def __enter__(self) -> LiveLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, **values: float) -> None:
        """Shows the state after `step` steps."""
        self._text = (
            f"loss {values['loss']:.3f}  top-1 {values['top1']:.1f} %  {values['images_per_s']:.0f} images/s  "
            f"clipped {100 * values['clipped']:.1f} %"
        )
        self._progress.update(self._task, completed=step, description=self._text)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last >= QUIET_INTERVAL:
            self._last = now
            pace = (now - self._start) / max(1, step - self._first_step)
            left = pace * (self._total - step)
            self._console.print(
                f"step {step}/{self._total}  {self._text}  {left:.0f} s left", highlight=False
            )

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        self._console.print(text, highlight=False, markup=False)
