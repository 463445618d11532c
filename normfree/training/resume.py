"""normfree.training.resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normfree.training import checkpoint
from normfree.training.console import RunLog
from normfree.training.early_stopping import Best
from normfree.training.trainer import Trainer


def save_checkpoint(
    trainer: Trainer, folder: Path, step: int, state: dict[str, Any], *, is_best: bool
) -> None:
    trainer.state.align_()
    tensors = trainer.state.tensors()
    with trainer.world.all_or_none():  # nobody leaves, or trains on, before it is on disk
        if trainer.world.is_main:
            saved = checkpoint.save(folder, step, tensors=tensors, state=state, keep=trainer.config.log.keep)
            if is_best:
                checkpoint.point(folder, "best", saved.name)


def restore_newest(trainer: Trainer, out: Path, run_log: RunLog) -> tuple[checkpoint.Checkpoint | None, Best]:
    """The newest sound checkpoint to continue from, if any, and the best averaged score so far."""
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    for reason in passed_over:
        run_log.info(f"passed over: {reason}")
    if saved is None:
        if passed_over:
            raise ValueError(
                f"{out} has checkpoints but none is sound. Nothing was changed; start another run."
            )
        return None, Best()
    if saved.step > trainer.total_steps or saved.state["total_steps"] != trainer.total_steps:
        raise ValueError(f"{out} was to take {saved.state['total_steps']} steps; the data or config now give "
                         f"{trainer.total_steps}. A run continues only as it began: start another run.")  # fmt: skip
    run_log.info(f"continuing {out} after step {saved.step}")
    best = Best.of_state(saved.state)
    if best.step == saved.step:  # killed between saving it and pointing at it
        checkpoint.point(out / "checkpoints", "best", checkpoint.name_of(best.step))
    return saved, best
