"""Where the rows of metrics.jsonl also go: TensorBoard and Weights & Biases, when a run asks for them.

metrics.jsonl is the truth, the others are copies of it. A continued run sends what a logger does not have yet, from
that file; so no step is there twice, none is missing, and a logger may join a run that began without it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from normfree.diagnose.metrics_file import read_metrics
from normfree.training.config import Config, loggers_in
from normfree.training.console import RunLog
from normfree.training.metrics import MetricsWriter

Row = Mapping[str, Any]


class Logger(Protocol):
    """Whoever takes rows: `step`, then names and numbers."""

    def write(self, row: Row) -> None:
        """One row; on its way to the disk when this returns."""

    def close(self) -> None:
        """Ends it; everything is written."""


class TensorBoard:
    """Event files in `folder`, flushed row by row (0.3 ms), so that they outlive a kill.

    `rows`: what metrics.jsonl holds up to `step`, after which the run continues. Only a folder without events takes
    them; in another they lie already, and what lies beyond `step` is marked as void.
    """

    def __init__(self, folder: Path, *, rows: Iterable[Row] = (), step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        old = any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if old else None)
        for row in () if old else rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """One row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


class WandB:
    """One W&B run for one run folder: its id lies in wandb/id. Offline unless WANDB_MODE says otherwise.

    A run that continues online takes up where the server's history ends. Offline there is nobody to ask, and a kill
    may have cut the last file short, so that a continued run writes a file of the whole history, from `rows`: the
    newest one is complete.
    """

    def __init__(self, out: Path, *, config: Config, rows: Iterable[Row] = ()) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # nothing leaves the machine unasked
        name = out / "wandb" / "id"
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            name.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        self._run = wandb.init(
            dir=out, id=name.read_text(encoding="utf-8").strip(), resume="allow",
            mode=mode,
            project=os.environ.get("WANDB_PROJECT") or "normfree",
            name=os.environ.get("WANDB_NAME") or out.resolve().name,
            config=config.model_dump(), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._begin = self._run.step  # smaller steps are on the server already
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """One row; those of one step become one row of W&B's."""
        if row["step"] >= self._begin:
            self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """Ends the run's file; online, waits until it is sent."""
        self._run.finish()


class Logs:
    """metrics.jsonl, and whoever is to hear of its rows as well. One of those that fails is named once and then left
    out: a run is worth more than its log."""

    def __init__(self, metrics: MetricsWriter, others: Mapping[str, Logger], run_log: RunLog) -> None:
        self._metrics, self._others, self._run_log = metrics, dict(others), run_log

    def write(self, **row: Any) -> None:
        """One row, with its `step`."""
        self._metrics.write(**row)
        self._each(lambda other: other.write(row))

    def close(self) -> None:
        """Ends all of them."""
        self._metrics.close()
        self._each(lambda other: other.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name in list(self._others):
            try:
                call(self._others[name])
            except Exception as error:
                del self._others[name]
                what = str(error).splitlines() or [""]
                self._run_log.info(f"{name} has failed and gets nothing more ({type(error).__name__}: {what[0]}); "
                                "metrics.jsonl goes on. A continued run tries again.")  # fmt: skip


def require(to: str) -> None:
    """Looks whether the loggers named in `log.to` are installed, which takes no time.

    Raises:
        ModuleNotFoundError: one is not; the message says what to install.
    """
    for name in loggers_in(to):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # without an origin: a folder called wandb, not the package
            raise ModuleNotFoundError(
                f"log.to={to!r} needs the package {name}, which is not installed. Fix: pip install "
                f"'normfree[{name}]', or --log.to \"\"."
            )


def open_logs(out: Path, config: Config, *, step: int, run_log: RunLog) -> Logs:
    """The logs of the run in `out`, which continues after `step`.

    Raises:
        ValueError: a logger cannot be opened; `log.to` and its reason.
    """
    metrics = MetricsWriter(out / "metrics.jsonl", step=step)
    rows = read_metrics(metrics.path)
    others: dict[str, Logger] = {}
    for name in loggers_in(config.log.to):
        try:
            if name == "tensorboard":
                others[name] = TensorBoard(out / "tensorboard", rows=rows, step=step)
            else:
                others[name] = WandB(out, config=config, rows=rows)
        except Exception as error:  # no disk, no network, no key: theirs to know, the user's to decide
            metrics.close()
            raise ValueError(
                f"log.to={config.log.to!r}: {name} cannot be opened ({type(error).__name__}: {error}). Mend that, or "
                f'leave it out: --log.to "".'
            ) from error
    return Logs(metrics, others, run_log)


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl under the names that these loggers' users know: train/loss, train/lr,
    val/top1, val/ema_top1.

    What was seen on the validation source goes under val/, all else under train/; a key with a group of its own keeps
    it. The epoch goes with a row of losses or of scores; no name has two values at one step.
    """
    place = "val/" if "top1" in row else "train/" if "loss" in row else ""
    found = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, (int, float)) or (key == "epoch" and not place):
            continue
        if "/" in key:
            name = key
        elif key.startswith(("val_", "ema_")) or key in ("top1", "top5"):
            name = "val/" + key.replace("val_", "")
        else:
            name = (place if key == "epoch" else "train/") + key.removeprefix("train_")
        found[name] = float(value)
    return found
