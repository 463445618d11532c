"""Write the checkpoints of a run and find the one that it continues from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normfree.suggest import problem
from normfree.training import checkpoint
from normfree.training.console import RunLog
from normfree.training.early_stopping import Best
from normfree.training.trainer import Trainer

# Newest checkpoints that stay, in addition to the best one: the newest may be damaged.
KEEP = 2


def save_checkpoint(
    trainer: Trainer, folder: Path, step: int, state: dict[str, Any], *, is_best: bool
) -> None:
    """Save the tensors of the run and `state` as the checkpoint of `step`. Every process makes the call.

    Args:
        folder: the run's `checkpoints` folder.
        is_best: also point the file `best` at it.
    """
    trainer.state.align_()
    tensors = trainer.state.tensors()
    with trainer.world.all_or_none():  # no process exits or trains on before the checkpoint is on disk
        if trainer.world.is_main:
            saved = checkpoint.save(folder, step, tensors=tensors, state=state, keep=KEEP)
            if is_best:
                checkpoint.point(folder, "best", saved.name)


def restore_newest(trainer: Trainer, out: Path, run_log: RunLog) -> tuple[checkpoint.Checkpoint | None, Best]:
    """Return the newest sound checkpoint in the run folder `out`, or None, and the best averaged score so far.

    Raises:
        ValueError: there are checkpoints but none is sound, or the run would now take another number of steps.
    """
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    for reason in passed_over:
        run_log.info(f"passed over: {reason}")
    if saved is None:
        if passed_over:
            given = f"{out} has checkpoints, but none is sound; nothing was changed"
            raise ValueError(problem(given, fix="start another run with --out"))
        return None, Best()
    planned = saved.state["total_steps"]
    if saved.step > trainer.total_steps or planned != trainer.total_steps:
        given = f"{out} was started for {planned} steps, but data and config now give {trainer.total_steps}"
        raise ValueError(problem(given, fix="restore the data and config, or start another run with --out"))
    run_log.info(f"continuing {out} after step {saved.step}")
    best = Best.of_state(saved.state)
    if best.step == saved.step:  # the run may have been killed between saving it and pointing at it
        checkpoint.point(out / "checkpoints", "best", checkpoint.name_of(best.step))
    return saved, best
