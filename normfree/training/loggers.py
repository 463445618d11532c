"""Optional copies of metrics.jsonl in TensorBoard and Weights & Biases (W&B).

metrics.jsonl is complete; the loggers get copies of its rows. A continued run sends each logger the rows of the file
that it does not have yet, so no step is missing or repeated, and a logger may be added to a run that began without it.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from normfree.diagnose.metrics_file import read_metrics
from normfree.files import write_text
from normfree.suggest import not_installed, problem
from normfree.training.config import Config, loggers_in
from normfree.training.console import RunLog
from normfree.training.metrics import MetricsWriter

Row = Mapping[str, Any]


class Logger(Protocol):
    """Receiver of rows, which hold `step` and named numbers."""

    def write(self, row: Row) -> None:
        """Write one row and flush it."""

    def close(self) -> None:
        """Write everything that is pending and close the logger."""


class TensorBoard:
    """TensorBoard event files in `folder`, flushed after each row (0.3 ms), so that they are kept after a kill.

    Args:
        folder: Folder of the event files.
        rows: Rows of metrics.jsonl up to `step`. They are written if the folder has no events yet.
        step: Step after which the run continues. Existing events after it are marked as invalid.
    """

    def __init__(self, folder: Path, *, rows: Iterable[Row] = (), step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        old = any(folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if old else None)
        for row in () if old else rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """Write one row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """One W&B run for each run folder, with its id in wandb/id. Offline unless WANDB_MODE is set.

    A run that continues online starts where the history on the server ends. Offline this history is not available, and
    a kill may have truncated the last file, so a continued run writes a new file with the whole history from `rows`:
    the newest file is complete.
    """

    def __init__(self, out: Path, *, config: Config, rows: Iterable[Row] = ()) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or "offline"  # send data only on request
        name = out / "wandb" / "id"
        if not name.exists():
            name.parent.mkdir(parents=True, exist_ok=True)
            write_text(name, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            dir=out, id=name.read_text(encoding="utf-8").strip(), resume="allow",
            mode=mode,
            project=os.environ.get("WANDB_PROJECT") or "normfree",
            name=os.environ.get("WANDB_NAME") or out.resolve().name,
            config=config.model_dump(), settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._begin = self._run.step  # the server already has smaller steps
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        """Write one row; W&B merges rows with the same step."""
        if row["step"] >= self._begin:
            self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        """Close the file of the run; if online, wait until it is sent."""
        self._run.finish()


class Logs:
    """Writer to metrics.jsonl and to the other loggers. A logger that fails is reported once and then disabled."""

    def __init__(self, metrics: MetricsWriter, others: Mapping[str, Logger], run_log: RunLog) -> None:
        self._metrics, self._others, self._run_log = metrics, dict(others), run_log

    def write(self, **row: Any) -> None:
        """Write one row, which includes its `step`."""
        self._metrics.write(**row)
        self._each(lambda other: other.write(row))

    def flush(self) -> None:
        """Write the lines of metrics.jsonl that a full disk has not taken yet; raise OSError if it still does not."""
        self._metrics.flush()

    def state(self) -> dict[str, Any]:
        """Return size and SHA-256 of metrics.jsonl, for a checkpoint."""
        return self._metrics.state()

    def close(self) -> None:
        """Close all loggers."""
        self._metrics.close()
        self._each(lambda other: other.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        """Call `call` with each logger; report and disable those that fail."""
        for name in list(self._others):
            try:
                call(self._others[name])
            except Exception as error:
                del self._others[name]
                what = str(error).splitlines() or [""]
                self._run_log.info(f"{name} failed and is disabled ({type(error).__name__}: {what[0]}); "
                                "metrics.jsonl is still written. A continued run tries it again.")  # fmt: skip


def require(to: str) -> None:
    """Check that the loggers named in `log.to` are installed, without importing them.

    Raises:
        ModuleNotFoundError: One is not installed; the message names the package to install.
    """
    for name in loggers_in(to):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a folder called wandb
            raise not_installed(f"log.to={to!r}", name, install=f"normfree[{name}]", otherwise='--log.to ""')


def open_logs(
    out: Path, config: Config, *, step: int, run_log: RunLog, expected: Mapping[str, Any] | None = None
) -> Logs:
    """Open the loggers of the run in `out`, which continues after `step`.

    `expected` is what the checkpoint holds of metrics.jsonl. If the file differs, a message is printed: it affects
    the curves and not the weights.

    Raises:
        ValueError: A logger cannot be opened; the message has its reason.
    """
    metrics = MetricsWriter(out / "metrics.jsonl", step=step, expected=expected)
    if metrics.damaged:
        run_log.info(
            f"{metrics.path} was changed or damaged since step {step}; the lines that can be read are kept"
        )
    rows = read_metrics(metrics.path)
    others: dict[str, Logger] = {}
    for name in loggers_in(config.log.to):
        try:
            if name == "tensorboard":
                others[name] = TensorBoard(out / "tensorboard", rows=rows, step=step)
            else:
                others[name] = WandB(out, config=config, rows=rows)
        except Exception as error:  # for example no disk space, network or API key
            metrics.close()
            raise ValueError(
                problem(
                    f"log.to={config.log.to!r}: {name} cannot be opened ({type(error).__name__}: {error})",
                    fix='remove the cause, or disable it with --log.to ""',
                )
            ) from error
    return Logs(metrics, others, run_log)


def scalars(row: Row) -> dict[str, float]:
    """Return the numbers of a row of metrics.jsonl under grouped names: train/loss, train/lr, val/top1, val/ema_top1.

    Values of the validation source are in val/, all others in train/; a key that contains "/" is kept. The epoch is in
    the group of the row's losses or scores; no name has two values at one step.
    """
    group = "val/" if "top1" in row else "train/" if "loss" in row else ""
    found = {}
    for key, value in row.items():
        if key == "step" or not isinstance(value, (int, float)) or (key == "epoch" and not group):
            continue
        if "/" in key:
            name = key
        elif key.startswith(("val_", "ema_")) or key in ("top1", "top5"):
            name = "val/" + key.replace("val_", "")
        else:
            name = (group if key == "epoch" else "train/") + key.removeprefix("train_")
        found[name] = float(value)
    return found
