"""Goal 2: a run stopped after any step continues with the same bits, for any number of processes that load images."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from normfree.training.trainer import Trainer
from normfree.weights.tensor_file import read_tensors
from reliability.goals import Case, Result, spread
from reliability.runs import FLAGS, differences, finish, scratch, train, uninterrupted

# Two epochs of 157 images in batches of 8; the end of the first is within a batch.
STEPS = 39
RANDOM = (
    *FLAGS, "--data", "synthetic:classes=3,size=16,train=157,val=9", "--length", "2ep", "--log.evaluate_every", "1ep",
    "--log.checkpoint_every", "2ep", "--log.every", "5", "--net.stochdepth_rate", "0.2",
)  # fmt: skip
WORKERS = (0, 1, 2, 4)


def cases(count: int) -> Iterator[Case]:
    """Return `count` steps to stop after, for each number of processes that load images."""
    for workers in WORKERS:
        check = f"stopped after a step, {workers} processes load images: 0 differing bits"
        for index in spread(STEPS - 1, count):
            yield Case(
                check, f"{workers} workers, step {index + 1}", partial(stopped_after, index + 1, workers)
            )
    yield Case("weights do not depend on the number of processes that load images", "workers", equal_weights)


def flags_of(workers: int) -> tuple[str, ...]:
    """Return the flags of a run with so many processes that load images."""
    return (*RANDOM, "--input.workers", str(workers))


@dataclass(frozen=True)
class StopAfter:
    """Called in a process before the command: it will get SIGTERM at the end of a step."""

    step: int

    def __call__(self) -> None:
        original, last = Trainer.step, self.step - 1

        def stepping(trainer: Trainer, batch: Any, index: int) -> Any:
            result = original(trainer, batch, index)
            if index == last:
                signal.raise_signal(signal.SIGTERM)
            return result

        Trainer.step = stepping  # type: ignore[method-assign]


def stopped_after(step: int, workers: int) -> Result:
    """Stop a run after a step, continue it, and compare it."""
    whole, _ = uninterrupted(flags_of(workers))
    with scratch() as folder:
        out = Path(folder) / "run"
        job = train(out, flags=flags_of(workers), prepare=StopAfter(step))
        code = job.wait()[0]
        wrong = [] if code == 143 else [f"exit code {code}: {job.printed()[-300:]}"]
        if not (out / "checkpoints" / f"step-{step:08d}").is_dir():
            wrong.append("no checkpoint of the step")
        finish(out)
        wrong += differences(whole, out, older_checkpoints=False)  # that of the stop may be among the newest
    return Result(1, int(not wrong), "; ".join(wrong))


def equal_weights() -> Result:
    """Compare the models of uninterrupted runs."""
    models = [read_tensors(uninterrupted(flags_of(n))[0] / "model" / "model.safetensors") for n in WORKERS]
    equal = [
        all(m[k].equal(v) for k, v in models[0].items()) and m.keys() == models[0].keys() for m in models
    ]
    return Result(len(models), sum(equal))
