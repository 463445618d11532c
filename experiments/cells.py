"""Cells: the runs of an experiment, each in its own folder and process, which an interrupted experiment does not
repeat.

An experiment is an object with a name and three functions (`Experiment`): it lists cells, measures one, and makes a
page of the results. A cell is an arm with all its settings and a seed. Its folder is named after a hash of these, so
a changed plan never reuses old runs. `run_cells` starts one process for each cell, `jobs` at a time:

    RUNS/EXPERIMENT/LABEL-HASH/cell.json      the cell
    RUNS/EXPERIMENT/LABEL-HASH/result.json    its result, which says that it is finished
    RUNS/EXPERIMENT/LABEL-HASH/...            what the experiment itself keeps there, such as checkpoints and weights
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from normfree.files import atomic_write_text
from normfree.suggest import problem

CHOICE_SEED = 100  # of the cells that choose rates and λ; in no table
Result = dict[str, Any]
Results = Mapping["Cell", Result]


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        experiment: its name.
        arm: what is compared.
        point: where on the axis, such as "128" for a batch size; "" without an axis.
        seed: of initial weights, order and augmentation; `CHOICE_SEED` for a cell that chooses.
        settings: everything else that decides the result, as JSON text with sorted keys.
    """

    experiment: str
    arm: str
    point: str
    seed: int
    settings: str

    @classmethod
    def of(
        cls,
        experiment: str,
        arm: str,
        *,
        point: str = "",
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> Cell:
        """Return a cell with these settings."""
        return cls(experiment, arm, point, seed, json.dumps(settings or {}, sort_keys=True))

    @property
    def options(self) -> dict[str, Any]:
        """The settings."""
        found: dict[str, Any] = json.loads(self.settings)
        return found

    @property
    def chooses(self) -> bool:
        """Whether the cell chooses a rate or λ, on training images that are not trained on."""
        return self.seed == CHOICE_SEED

    @property
    def name(self) -> str:
        """The name of the folder: readable, and different for different settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        parts = (self.arm, self.point, f"s{self.seed}")
        return "-".join([*(re.sub(r"[^\w.]+", "_", part).strip("_") for part in parts if part), digest])


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a call share.

    Attributes:
        preset: name of a size: cpu, gpu or tiny.
        data: any value of normfree's `--data`.
        device: where networks are trained.
        runs: folder of all experiments.
        workers: processes that load images, for each cell.
    """

    preset: str = "cpu"
    data: str = ""
    device: str = "cpu"
    runs: Path = field(default=Path("runs/experiments"))
    workers: int = 0

    @property
    def folder(self) -> Path:
        """The folder of this preset."""
        return self.runs / self.preset

    def folder_of(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.folder / cell.experiment / cell.name

    def stem(self, name: str) -> str:
        """Return the name of the files of results of an experiment, which differs between presets."""
        return name if self.preset == "cpu" else f"{name}_{self.preset}"

    def flags(self) -> list[str]:
        """Return the options of `python -m experiments.run` that give this setup."""
        return [
            "--preset",
            self.preset,
            "--data",
            self.data,
            "--device",
            self.device,
            "--runs",
            str(self.runs),
            "--workers",
            str(self.workers),
        ]


class Experiment(Protocol):
    """What `experiments.run` needs to know of an experiment."""

    name: str
    title: str
    alone: bool
    """Whether its cells measure time, so that they run one at a time with all cores."""
    seeds: int
    """How many cells there are of each row of its table."""

    def cells(self, done: Results) -> list[Cell]:
        """Return the cells that are known now. After those that choose are done, it returns the others too."""
        ...

    def all_cells(self) -> list[Cell]:
        """Return as many cells as there will be, for a plan; where a choice is open, with any of its candidates."""
        ...

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Run a cell and return its result, which is JSON. Called in a process of its own; may continue old files."""
        ...

    def minutes(self, cell: Cell) -> float:
        """Return an estimate of the CPU time of a cell in minutes, of one core."""
        ...

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Write page, plot and JSON of finished cells into the folder `results`, and return the page."""
        ...


def read_result(cell: Cell, setup: Setup) -> Result | None:
    """Return the result of a finished cell, or None."""
    path = setup.folder_of(cell) / "result.json"
    if not path.exists():
        return None
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def computed_once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON of a file; a missing file is computed and written."""
    if not path.exists():
        atomic_write_text(path, json.dumps(compute(), indent=1) + "\n")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def known_cells(experiment: Experiment, setup: Setup) -> tuple[list[Cell], dict[Cell, Result]]:
    """Return the cells of an experiment that are known now, and the results of those that are finished."""
    done: dict[Cell, Result] = {}
    while True:
        cells = experiment.cells(done)
        found = {cell: result for cell in cells if (result := read_result(cell, setup)) is not None}
        if found.keys() == done.keys():
            return cells, found
        done = found


def finish(experiment: Experiment, setup: Setup, *, jobs: int) -> dict[Cell, Result]:
    """Run all unfinished cells of an experiment, and those that become known by their results; return the results.

    `jobs` 0 runs them one by one in this process, for tests and debuggers.

    Raises:
        KeyboardInterrupt: a signal arrived; running cells were told to save their state.
        ValueError: a cell failed.
    """
    while True:
        cells, done = known_cells(experiment, setup)
        left = [cell for cell in cells if cell not in done]
        print(f"{experiment.name}: {len(done)} of {len(cells)} cells are finished", flush=True)
        if not left:
            return done
        if jobs == 0:
            for cell in left:
                measure_cell(experiment, cell, setup)
        elif experiment.alone:
            run_cells(left, setup, jobs=1, threads=os.cpu_count() or 1)
        else:
            run_cells(left, setup, jobs=jobs)


def run_cells(cells: Sequence[Cell], setup: Setup, *, jobs: int, threads: int = 1) -> None:
    """Run cells, `jobs` at a time, each in a process with `threads` threads; see `finish`."""
    running = set[subprocess.Popen[bytes]]()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def work(cell: Cell) -> None:
        command = [
            sys.executable,
            "-m",
            "experiments.run",
            *setup.flags(),
            "--cell",
            json.dumps(asdict(cell)),
        ]
        # A new session, so that Ctrl-C reaches only this process, which then tells each cell once to save its state.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        running.add(process)
        code = process.wait()
        running.discard(process)
        result = read_result(cell, setup)
        if code or result is None:
            raise ValueError(
                problem(
                    f"cell {cell.name} ended with exit code {code}", fix=f"look into {setup.folder_of(cell)}"
                )
            )
        print(f"  {cell.name}: {summary(result)}", flush=True)

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(work, cell) for cell in cells]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(running):
                    process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(result: Result) -> str:
    """Return the numbers of a result in one line."""
    shown = {
        k: round(v, 4) if isinstance(v, float) else v
        for k, v in result.items()
        if not isinstance(v, dict | list)
    }
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def measure_cell(experiment: Experiment, cell: Cell, setup: Setup) -> None:
    """Run a cell in this process, unless it is finished, and write its result."""
    if read_result(cell, setup) is not None:
        return
    folder = setup.folder_of(cell)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "cell.json", json.dumps(asdict(cell), indent=1) + "\n")
    start = time.process_time()
    result = experiment.measure(cell, folder, setup)
    result.setdefault("cpu_seconds", round(time.process_time() - start, 1))
    atomic_write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
