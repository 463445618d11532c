"""The whole job: seconds from the start of the program to a usable accuracy on CIFAR-10 from files, with its memory.

Each arm with each seed is a process of its own. Its result is a file in runs/whole_job/, so that an interrupted suite
goes on where it stopped when it is run again.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from benchmarks.harness import Bench, Case, GateError
from benchmarks.machine import processor
from benchmarks.summary import Comparison, spread, timing
from normfree.data.walk import walk_images
from normfree.files import atomic_write_text
from normfree.suggest import problem
from normfree.training.precision import native_precision
from normfree.training.recipes import cifar

ABOUT = (
    "Seconds from the start of a program to 90 % of the final accuracy of the best arm, on CIFAR-10 as JPEG files in "
    "class folders (`--data FOLDER` with train/ and test/), and peak memory of its main process. The first images of "
    "each class are used. `normfree`: `normfree train cifar`. `timm`: timm's class with the same depths and widths, "
    "its loader, Mixup, optimizer, schedule, AGC and average, in the order of timm's train.py, with the numbers of "
    "our recipe. `torchvision`: a ResNet of basic blocks with batch norm and as many parameters, SGD by "
    "the recipe of torchvision's references. All arms have the same images, epochs, batch size, two loading "
    "processes, and are scored on the test images after every epoch; the time includes that, and the imports. They "
    'compute in bfloat16 where `precision = "auto"` does, else in float32. Of '
    "weights and average the better one counts. `accuracy` is that after the last epoch, mean of the seeds. Each run "
    "writes a file, so the suite goes on where it was stopped."
)
FRACTION = 0.9
TITLE = "CIFAR-10 from JPEG files to 90 % of the best final accuracy"
RUNS = Path("runs/whole_job")
ROOT = Path(__file__).parents[1]
LINE = re.compile(r"epoch +([\d.]+) +top-1 ([\d.]+) %(?: +averaged ([\d.]+) %)?")
NAMES = {"torchvision": "torchvision ResNet, batch norm", "timm": "timm, NF network", "normfree": "normfree"}


@dataclass(frozen=True)
class Job:
    """The size of the job: images of each class, and epochs; and whether the arms compute in bfloat16.

    On two cores a run of the default takes two to five minutes.
    """

    train: int = 1000
    test: int = 200
    epochs: int = 8
    seeds: int = 3
    workers: int = 2
    half: bool = False


@dataclass(frozen=True)
class Outcome:
    """A finished run: for each epoch the seconds since its start and the best top-1 of its networks, and its memory."""

    curve: tuple[tuple[float, float], ...]
    peak_mib: float

    def seconds_to(self, top1: float) -> float:
        """Return the seconds until the accuracy in percent was reached; infinite if it never was."""
        return next((seconds for seconds, found in self.curve if found >= top1), float("inf"))

    @property
    def seconds(self) -> float:
        """The time of the whole run."""
        return self.curve[-1][0]

    @property
    def final(self) -> float:
        """The accuracy after the last epoch."""
        return self.curve[-1][1]


def cases(device: torch.device, *, data: Path | None = None) -> list[Case]:
    """Return the only case; `data` has train/ and test/ with one folder per class."""
    return [case(data, Job(half=native_precision(device).name == "bfloat16"))]


def case(data: Path | None, job: Job, *, runs: Path = RUNS) -> Case:
    """Return the case of one size of the job."""
    return Case("CIFAR-10, whole job", ("whole_job",), partial(measure, data, job, runs))


def measure(data: Path | None, job: Job, runs: Path, bench: Bench) -> Iterator[Comparison]:
    """Run what is missing as long as there is time, one seed after another, and compare the complete seeds."""
    if data is None:
        bench.skipped.append("no data; pass a folder with train/ and test/ by --data FOLDER")
        return
    try:
        folder = subset(data, runs / f"data-{job.train}-{job.test}", job)
    except ValueError as error:
        bench.skipped.append(str(error))
        return
    outcomes: dict[str, list[Outcome]] = {arm: [] for arm in NAMES}
    longest = 0.0
    for seed in range(job.seeds):
        for arm in random.Random(seed).sample(list(NAMES), len(NAMES)):
            start = bench.clock()
            found = recorded(runs, arm, seed, job)
            if found is None:
                if bench.left() < longest:
                    bench.skipped.append(f"{arm}, seed {seed}: no time left; run the suite again to continue")
                    continue
                found = run(command(arm, seed, folder, runs, job))
                _record(runs, arm, seed, job, found)
                longest = max(longest, bench.clock() - start)
            outcomes[arm].append(found)
    complete = min(map(len, outcomes.values()))
    if complete:
        yield comparison({arm: own[:complete] for arm, own in outcomes.items()})


def subset(data: Path, folder: Path, job: Job) -> Path:
    """Make train/ and val/ of links to the first images of each class in train/ and test/ of `data`; return `folder`.

    Raises:
        ValueError: a part is missing, or a class has too few images.
    """
    for part, source, count in (("train", "train", job.train), ("val", "test", job.test)):
        if not (data / source).is_dir():
            raise ValueError(problem(f"{data} has no {source}/", allowed="a folder with train/ and test/"))
        classes = sorted(path for path in (data / source).iterdir() if path.is_dir())
        if not classes:
            raise ValueError(problem(f"{data / source} has no folders", allowed="one folder per class"))
        for of_class in classes:
            images = sorted(walk_images(of_class)[0])[:count]
            if len(images) < count:
                raise ValueError(problem(f"{of_class} has {len(images)} images", allowed=f"{count} or more"))
            target = folder / part / of_class.name
            target.mkdir(parents=True, exist_ok=True)
            for image in images:
                link = target / Path(image).name
                if not link.is_symlink():
                    link.symlink_to(Path(image).resolve())
    return folder


def command(arm: str, seed: int, folder: Path, runs: Path, job: Job) -> list[str]:
    """Return the command of one run."""
    if arm != "normfree":
        options = ["--seed", str(seed), "--epochs", str(job.epochs), "--workers", str(job.workers)]
        options += ["--half"] * job.half
        return [sys.executable, "-m", "benchmarks.whole_job_arms", arm, str(folder), *options]
    out = (
        runs / f"normfree-{seed}-{time.time_ns()}"
    )  # a run that was stopped is not continued: its time would be wrong
    options = [
        f"--data={folder}",
        f"--length={job.epochs}ep",
        f"--seed={seed}",
        f"--input.workers={job.workers}",
        f"--precision={'bfloat16' if job.half else 'float32'}",
    ]
    return [sys.executable, "-m", "normfree", "train", "cifar", *options, f"--out={out}"]


def run(args: Sequence[str], *, clock: Callable[[], float] = time.perf_counter) -> Outcome:
    """Run a program, and note when it prints a line with scores.

    Raises:
        GateError: it failed, or printed no scores.
    """
    # Without a buffer each line arrives when it is printed.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start, curve, last = clock(), [], ""
    with subprocess.Popen(
        args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            if scores := LINE.search(line):
                curve.append((clock() - start, max(float(s) for s in scores.groups()[1:] if s is not None)))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not curve:
        raise GateError(
            f"{' '.join(args[2:5])} ended with {process.returncode} after {len(curve)} epochs: {last}"
        )
    return Outcome(tuple(curve), used.ru_maxrss / 1024)


def comparison(outcomes: Mapping[str, Sequence[Outcome]]) -> Comparison:
    """Return the comparison of the times to `FRACTION` of the best arm's final accuracy, one value for each seed."""
    finals = {arm: fmean(o.final for o in own) for arm, own in outcomes.items()}
    target = FRACTION * max(finals.values())
    times = {arm: [o.seconds_to(target) for o in own] for arm, own in outcomes.items()}
    reached = {arm: own for arm, own in times.items() if float("inf") not in own}
    baseline, rng = next(iter(reached)), random.Random(0)
    base = reached[baseline]
    timings = []
    for arm, own in reached.items():
        whole = fmean(o.seconds for o in outcomes[arm])
        facts = {
            "accuracy": finals[arm],
            "peak_mib": median(o.peak_mib for o in outcomes[arm]),
            "whole_s": whole,
        }
        timings.append(timing(NAMES[arm], own, base, rng, facts=facts))
    minutes = sum(o.seconds for own in outcomes.values() for o in own) / 60
    size = f"{len(base)} seeds of each arm, {minutes:.0f} minutes of training in all, also in earlier calls"
    notes = [f"to {target:.1f} % top-1; {size}"]
    for arm in times.keys() - reached.keys():
        missed = sum(seconds == float("inf") for seconds in times[arm])
        whole = fmean(o.seconds for o in outcomes[arm])
        notes.append(
            f"{NAMES[arm]}: {missed} of {len(base)} runs stay below the target; {finals[arm]:.1f} % at the end, after "
            f"{whole:.0f} s"
        )
    noise = spread([seconds / median(base) for seconds in base], rng)
    return Comparison(TITLE, NAMES[baseline], tuple(timings), noise, len(base), unit="s", notes=tuple(notes))


# --- results of single runs ---------------------------------------------------------------------------------------


def _settings(arm: str, seed: int, job: Job) -> dict[str, Any]:
    """Return what a recorded run must have in common with the one that is asked for."""
    return {"arm": arm, "seed": seed, "job": asdict(job) | {"seeds": 0}, "recipe": cifar().model_dump(),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": processor()}  # fmt: skip


def recorded(runs: Path, arm: str, seed: int, job: Job) -> Outcome | None:
    """Return the outcome of a run that was recorded with the same settings, or None."""
    path = runs / f"{arm}-{seed}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if found.get("settings") != json.loads(json.dumps(_settings(arm, seed, job))):
        return None
    return Outcome(tuple((seconds, top1) for seconds, top1 in found["curve"]), found["peak_mib"])


def _record(runs: Path, arm: str, seed: int, job: Job, outcome: Outcome) -> None:
    """Write the outcome of a run."""
    entry = {"settings": _settings(arm, seed, job), **asdict(outcome)}
    runs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(runs / f"{arm}-{seed}.json", json.dumps(entry, indent=1) + "\n")
