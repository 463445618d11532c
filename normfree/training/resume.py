"""Write the checkpoints of a run and find the one that it continues from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from normfree.suggest import problem, some_names
from normfree.training import checkpoint
from normfree.training.console import RunLog
from normfree.training.divergence import DivergedError
from normfree.training.early_stopping import Best
from normfree.training.identity import require_same, require_same_data
from normfree.training.loggers import Logs
from normfree.training.metrics import NullMetricsWriter
from normfree.training.trainer import Trainer

# Steps after which a checkpoint that the disk did not take is tried again.
RETRY_STEPS = 100
# Newest checkpoints that stay, in addition to the best one: the newest may be damaged.
KEEP = 2


class Checkpoints:
    """The checkpoints that a run writes. Every process makes each call.

    A disk that is full or fails does not end the run: it goes on and tries again, until a checkpoint is required.

    Args:
        trainer: whose tensors are saved.
        folder: the run's `checkpoints` folder.
        run_log: told about each failure.
        identity: entries of each state that do not change, see `identity.py`.
        metrics: whose lines must be on the disk before the checkpoint that counts on them.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: Path,
        run_log: RunLog,
        *,
        identity: Mapping[str, Any],
        metrics: Logs | NullMetricsWriter,
    ) -> None:
        self._trainer, self._folder, self._run_log = trainer, folder, run_log
        self._identity, self._metrics = identity, metrics
        self._retry: int | None = None  # step of the next attempt
        self._run = _identity_of(folder.parent) if trainer.world.is_main else None

    def retry(self, step: int) -> bool:
        """Return True if an earlier attempt has failed and it is time for another."""
        return self._retry is not None and step >= self._retry

    def save(self, step: int, state: Mapping[str, Any], *, best: Best, required: bool) -> bool:
        """Save the tensors of the run and `state` as the checkpoint of `step`; return False if the disk refused.

        The file `best` points to the checkpoint if it is the one of the best score.

        Raises:
            DivergedError: a tensor is not finite; nothing was written.
            ValueError: the disk refused although the checkpoint is `required`: the run ends.
        """
        world = self._trainer.world
        self._trainer.state.align_()
        tensors = self._trainer.state.tensors()
        if wrong := world.all_gather(checkpoint.not_finite(tensors) if world.is_main else [])[0]:
            given = f"step {step}: {len(wrong)} tensors are not finite: {some_names(wrong)}"
            raise DivergedError(problem(given, fix="resume: the last checkpoint is unchanged"))
        refused = ""
        with world.all_or_none():  # no process exits or trains on before the checkpoint is on disk
            if world.is_main:
                # Twice, each time as a whole: the next attempt would be too late for a best checkpoint.
                for _ in range(2):
                    refused = self._write(step, tensors, state, best)
                    if not refused:
                        break
        refused = world.all_gather(refused)[0]
        self._retry = step + RETRY_STEPS if refused else None
        if refused:
            last = checkpoint.pointed(self._folder, "last") or "none"
            given = f"the checkpoint of step {step} could not be written: {refused}; the last one is {last}"
            fix = f"make {self._folder} writable, with space for a checkpoint"
            if required:
                raise ValueError(problem(given, fix=f"{fix}, then resume"))
            self._run_log.info(problem(f"{given}; training goes on", fix=fix))
        return not refused

    def _write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], best: Best
    ) -> str:
        """Write the checkpoint of `step` and the files that name it; return why the disk refused, or ""."""
        try:
            if _identity_of(self._folder.parent) != self._run:
                return "the run folder was moved or removed"  # the path would become a second, incomplete run
            self._metrics.flush()
            whole = {**self._identity, **state, "metrics": self._metrics.state()}
            checkpoint.save(
                self._folder, step, tensors=tensors, state=whole, keep=KEEP, best=best.step or None
            )
            if best.step == step:
                checkpoint.point(self._folder, "best", checkpoint.name_of(step))
        except OSError as error:
            return error.strerror or str(error)
        return ""


def _identity_of(folder: Path) -> tuple[int, int] | None:
    """Return what identifies a folder whatever its path is: device and inode; None if it does not exist."""
    try:
        about = folder.stat()
    except FileNotFoundError:
        return None
    return about.st_dev, about.st_ino


def restore_newest(
    trainer: Trainer, out: Path, run_log: RunLog, *, identity: Mapping[str, Any] | None = None
) -> tuple[checkpoint.Checkpoint | None, Best]:
    """Return the newest sound checkpoint in the run folder `out`, or None, and the best averaged score so far.

    The files `last` and `best` are mended if the run was killed before they were written.

    Args:
        identity: config and data of this call, see `identity.py`; None: they are not compared.

    Raises:
        ValueError: there are checkpoints but none is sound; or the run would now take another number of steps, or has
            other data or another config.
    """
    folder = out / "checkpoints"
    saved, passed_over = checkpoint.newest(folder)
    for reason in passed_over:
        run_log.info(f"passed over: {reason}")
    if saved is None:
        if passed_over:
            given = f"{out} has checkpoints, but none is sound; nothing was changed"
            raise ValueError(problem(given, fix="start another run with --out"))
        return None, Best()
    try:
        planned, best = int(saved.state["total_steps"]), Best.of_state(saved.state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        given = f"{folder / checkpoint.name_of(saved.step)}: state.json is of another program ({error!r})"
        raise ValueError(problem(given, fix="start another run with --out")) from None
    before = str(saved.state.get("length", trainer.config.length))
    if before != trainer.config.length:
        _check_longer(trainer, saved.step, planned=planned, before=before, out=out)
        best = replace(best, waited=0)
        run_log.info(
            f"{'lengthened' if trainer.total_steps > planned else 'shortened'} from {before} ({planned} steps) to "
            f"{trainer.config.length} ({trainer.total_steps} steps): the learning rate goes on at "
            f"{trainer.rate_at(saved.step):.3g}, that of the new schedule"
        )
    elif saved.step > trainer.total_steps or planned != trainer.total_steps:
        given = f"{out} was started for {planned} steps, but data and config now give {trainer.total_steps}"
        raise ValueError(problem(given, fix="restore the data and config, or start another run with --out"))
    if identity is not None:
        require_same(out, saved.state.get("config", {}), identity["config"])
        if "data" in saved.state:  # absent from checkpoints of older versions
            require_same_data(out, saved.state["data"], identity["data"])
    finished = saved.step == trainer.total_steps
    run_log.info(f"{out} is finished" if finished else f"continuing {out} after step {saved.step}")
    _mend(folder, saved.step, best)
    return saved, best


def _check_longer(trainer: Trainer, step: int, *, planned: int, before: str, out: Path) -> None:
    """Raise `ValueError` unless the run has its data still, and would take more steps than it has taken."""
    then = trainer.steps_of(before)
    if then != planned:
        given = f"{out} was started for {planned} steps, but its data and length {before} now give {then}"
        raise ValueError(problem(given, fix="restore the data, or start another run with --out"))
    if trainer.total_steps < max(step, 1):
        now = f"length={trainer.config.length} gives {trainer.total_steps} steps"
        given = f"{now}, and {out} has taken {step}"
        raise ValueError(problem(given, allowed="a longer run", fix=f"--length {2 * step}st"))


def _mend(folder: Path, step: int, best: Best) -> None:
    """Point `last` and `best` at their checkpoints, and remove what a killed process has left or was removing."""
    wanted = {"last": checkpoint.name_of(step), "best": checkpoint.name_of(best.step)}
    for name, target in wanted.items():
        if (folder / target).is_dir() and checkpoint.pointed(folder, name) != target:
            checkpoint.point(folder, name, target)
    checkpoint.remove_old(folder, KEEP, newest_step=step, best=best.step or None)
