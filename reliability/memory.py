"""Goal 9: memory, open files, threads and child processes stay constant over 2,000 steps, and nothing is left."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from normfree.training.trainer import Trainer
from reliability.goals import Case, Result
from reliability.runs import FLAGS, scratch, train

STEPS = 2000
SLOPE = 1.0  # MB per 1,000 steps
SAMPLES = 40
LONG = (*FLAGS, "--data", "synthetic:classes=3,size=16,train=160,val=24", "--log.evaluate_every", "100st",
        "--log.checkpoint_every", "200st", "--log.every", "10")  # fmt: skip
WORKERS = (0, 2)
SHARED = Path("/dev/shm")


def cases(count: int) -> Iterator[Case]:
    """Return `count` of the runs."""
    for workers in WORKERS[:count]:
        check = "2,000 steps: memory grows by less than 1 MB per 1,000; files, threads, processes do not; none left"
        yield Case(check, f"{workers} workers", partial(flat, workers))


@dataclass(frozen=True)
class Watch:
    """Called in a process before the command: it will write what it uses to `file`, every `every` steps.

    Temporary files go to `temporary`.
    """

    file: Path
    temporary: Path
    every: int

    def __call__(self) -> None:
        tempfile.tempdir = os.environ["TMPDIR"] = str(self.temporary)
        original = Trainer.step

        def stepping(trainer: Trainer, batch: Any, index: int) -> Any:
            result = original(trainer, batch, index)
            if (index + 1) % self.every == 0:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(" ".join(map(str, (index + 1, *used()))) + "\n")
            return result

        Trainer.step = stepping  # type: ignore[method-assign]


def used() -> tuple[int, int, int, int]:
    """Return the bytes of memory, the open files, the threads and the children of this process."""
    own = Path("/proc/self")
    pages = int((own / "statm").read_text(encoding="utf-8").split()[1])
    children = "".join(path.read_text(encoding="utf-8") for path in own.glob("task/*/children")).split()
    threads, files = (len(list((own / name).iterdir())) for name in ("task", "fd"))
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads, len(children)


def flat(workers: int, steps: int = STEPS) -> Result:
    """Train for so many steps and check that nothing grows."""
    with scratch() as folder:
        file, temporary = Path(folder) / "used", Path(folder) / "tmp"
        temporary.mkdir()
        shared = set(SHARED.iterdir()) if SHARED.exists() else set()
        flags = (*LONG, "--input.workers", str(workers), "--length", f"{steps}st")
        job = train(Path(folder) / "run", flags=flags, prepare=Watch(file, temporary, steps // SAMPLES))
        codes = job.wait()
        rows = np.loadtxt(file)[SAMPLES // 4 :]  # after the warm-up
        slope = float(np.polyfit(rows[:, 0] / 1000, rows[:, 1] / 1e6, 1)[0])
        half = len(rows) // 2
        grown = [name for i, name in enumerate(("open files", "threads", "children"), 2)
                 if rows[half:, i].max() > rows[:half, i].max()]  # fmt: skip
        left = [path.name for path in temporary.iterdir()]
        new = set(SHARED.iterdir()) - shared if SHARED.exists() else set()
        left += [path.name for path in new if path.name.startswith("torch_") and not _lives(path.name)]
    wrong = [f"exit code {codes[0]}"] * bool(codes[0]) + [f"{name} grow" for name in grown]
    wrong += [f"{slope:.2f} MB per 1,000 steps"] * (slope >= SLOPE) + [f"left: {', '.join(left)}"] * bool(
        left
    )
    return Result(6, 6 - len(wrong), "; ".join(wrong) or f"{slope:+.2f} MB per 1,000 steps")


def _lives(name: str) -> bool:
    """Return True if the process that made a shared file lives: torch_PID_..."""
    process = name.split("_")[1]
    return process.isdigit() and Path("/proc", process).exists()
