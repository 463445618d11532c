"""normfree.training.console."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_INTERVAL = 10.0  # seconds between lines where there is no terminal


class RunLog:
    """What a run tells its user: printed, and kept in the run folder's log.txt as soon as there is one."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._said: list[str] = []
        self._log: Path | None = None

    def info(self, text: str) -> None:
        """One line; long ones are left to the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        if self._log is None:
            self._said.append(text + "\n")
        else:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def attach_file(self, path: Path) -> None:
        """From now on, and for what was said before, also write to `path`."""
        with path.open("a", encoding="utf-8") as file:
            file.writelines(self._said)
        self._said, self._log = [], path


class ProgressLine:
    """Progress on a terminal: one line with loss, top-1, images/s, clipped fraction and the time left."""

    def __init__(self, run_log: RunLog, *, step: int, total_steps: int) -> None:
        console = run_log.console
        self._run_log, self._quiet, self._total, self._last = (
            run_log,
            not console.is_terminal,
            total_steps,
            time.monotonic(),
        )
        self._progress = Progress(
            BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
            TextColumn("left"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting", total=total_steps, completed=step)
        self._first_step, self._start = step, time.monotonic()

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: int, **values: float) -> None:
        """Shows the state after `step` steps."""
        text = (
            f"loss {values['loss']:.3f}  top-1 {values['train_top1']:.1f} %  {values['images_per_s']:.0f} images/s  "
            f"clipped {100 * values['clipped']:.1f} %"
        )
        self._progress.update(self._task, completed=step, description=text)
        now = time.monotonic()
        if self._quiet and now - self._last >= QUIET_INTERVAL:
            self._last = now
            pace = (now - self._start) / max(1, step - self._first_step)
            self._run_log.info(f"step {step}/{self._total}  {text}  {pace * (self._total - step):.0f} s left")
