"""The batches of a run: fetched so that a failure or a signal saves first, and recorded by the profiler on request."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NoReturn

from normfree.data.loader import Batch, train_batches
from normfree.data.source import Split
from normfree.data.supervision import LoaderError, LoadingStopped
from normfree.data.transforms.decode import ImageError
from normfree.suggest import problem
from normfree.training.config import profile_steps
from normfree.training.console import RunLog
from normfree.training.distributed.world import World
from normfree.training.loading import loading
from normfree.training.profile import profiled
from normfree.training.stop import Stop, StoppedBySignal
from normfree.training.trainer import Trainer

# A process cannot continue. As a reason to stop it is larger than the number of any signal.
FAILED = 1000


def run_batches(
    trainer: Trainer, split: Split, out: Path, run_log: RunLog, stop: Stop, *, start_step: int
) -> Generator[Batch, None, None]:
    """Return the training batches from `start_step` on, under the profiler if the config asks for it."""
    config, world = trainer.config, trainer.world
    workers, deadline = loading(config)
    batches = train_batches(
        split.train, trainer.transform, batch_size=config.input.batch_size, seed=config.seed,
        start_step=start_step, num_steps=trainer.total_steps, workers=workers,
        pin_memory=trainer.device.type == "cuda", pairs=trainer.pairs, rank=world.rank, world_size=world.size,
        repeats=config.augment.repeats, members=trainer.members(len(split.train)), stopped=stop.requested,
        deadline=deadline,
    )  # fmt: skip
    return profiled(
        batches, steps=profile_steps(config.log.to) if world.is_main else 0, net=trainer.net, folder=out / "profile",
        compiled=config.compile, log=run_log.info,
    )  # fmt: skip


def fetch(batches: Iterator[Batch]) -> tuple[Batch | None, ValueError | None]:
    """Return the next batch, or the reason why there is none; neither if a signal has arrived."""
    try:
        return next(batches), None
    except LoadingStopped:
        return None, None
    except (ImageError, LoaderError) as error:
        return None, error


def tell_replaced(batch: Batch, known: set[str], run_log: RunLog) -> None:
    """Print the images that have gone bad since the last batch, and add them to `known`."""
    for name, reason in batch.bad:
        text = f"{name}: {reason}"
        if text not in known:
            known.add(text)
            run_log.info(f"from step {batch.step + 1} on, another image replaces {text}")


def leave(step: int, reason: int, failure: ValueError | None, world: World, run_log: RunLog) -> NoReturn:
    """Raise why the run ends after `step` steps, which are saved: a signal, or `failure` in one of the processes."""
    if reason == FAILED:
        run_log.info(f"stopped after step {step}; everything is saved")
        with world.all_or_none():
            if isinstance(failure, ImageError):
                fix = "restore the image and resume"
                if failure.reason != "no such file":  # the list of images would no longer be that of the run
                    fix += ", or resume with --input.bad_images skip"
                raise ValueError(problem(str(failure), fix=fix))
            if failure is not None:
                raise failure
    raise StoppedBySignal(step, reason)
