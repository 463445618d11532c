"""Tasks of tests/training/distributed/test_modes.py, run in every process of a world."""

from __future__ import annotations

import io
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from world_worker import patched

from normfree.training import checkpoint, loop, resume
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.distributed.world import World
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.stop import StoppedBySignal
from normfree.training.trainer import Trainer

resume.KEEP = 9  # the tests compare all checkpoints


def config(run: Path, flags: list[str], more: list[str]) -> Config:
    """Return the config of a run that continues, or of a new one, with further flags."""
    path = run / "config.toml"
    base = load_config(path) if path.exists() else with_overrides(RECIPES["scratch"](), flags)
    return with_overrides(base, more)


def train(
    world: World, folder: str, flags: list[str], name: str, more: list[str], stop: int, copy: str
) -> None:
    """Train or continue the run `name`.

    stop: end by a signal after this step; 0 is never. copy: continue a copy of that run.
    """
    run = Path(folder) / name
    if copy and world.is_main:
        shutil.copytree(run.parent / copy, run)
    world.barrier()
    original = Trainer.step

    def step(self: Trainer, batch: Any, at: int) -> Any:
        result = original(self, batch, at)
        if at + 1 == stop and world.is_main:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with patched(Trainer, "step", step):
        try:
            loop.train(config(run, flags, more), run, console=Console(file=io.StringIO()))
        except StoppedBySignal as stopped:
            if stopped.step != stop:
                raise


def restore(world: World, folder: str, flags: list[str], name: str, more: list[str]) -> None:
    """Save what a new trainer holds after restoring the newest checkpoint of a run: equal tensors, their number, and
    the rows of the classifier's momentum in this process."""
    run = Path(folder) / name
    trainer = Trainer(resolve(config(run, flags, more)), num_classes=3, samples=48, world=world)
    saved, _ = checkpoint.newest(run / "checkpoints")
    trainer.state.restore_(saved if world.is_main else None)
    rows = trainer.optimizer.named_state()["head.weight"]
    here = (rows.to_local() if hasattr(rows, "to_local") else rows).shape[0]
    held = trainer.state.tensors()
    if world.is_main:
        assert saved is not None
        same = {
            f"{file}:{k}": torch.equal(t, held[file][k])
            for file, part in saved.tensors.items()
            for k, t in part.items()
        }
        result = f"restored-{name}-{world.size}-{trainer.config.parallel}.pt"
        torch.save((same, sum(map(len, held.values())), here), run.parent / result)
