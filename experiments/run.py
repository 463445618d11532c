"""Run the experiments, resume them, and report all: `make reproduce DATA=FOLDER`.

    python -m experiments.run --data cifar10/                      # all; a folder with train/ and test/, or cifar10
    python -m experiments.run --data cifar10/ --only depth,batch_size
    python -m experiments.run --data cifar10/ --dry-run            # the cells, and estimated minutes
    python -m experiments.run --preset gpu --data cifar10/ --device cuda --workers 8

Each cell is a run folder in runs/experiments/PRESET/EXPERIMENT/ and a process of its own. After an interruption, the
same command continues: finished cells are kept, and a stopped cell goes on from its checkpoint. The test images are
opened by the report of an experiment, when all its cells are finished. Pages, plots and JSON go to
experiments/results/, the claims of the papers with our verdicts to docs/claims.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import claims
from experiments.catalog import DATA, DEFAULT, NAMES, PRESETS, experiment
from experiments.cells import Cell, Experiment, Setup, finish, known_cells, measure_cell
from normfree.training.stop import StoppedBySignal

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", default="", help="any value of normfree's --data, with a test part; default: cifar10"
    )
    parser.add_argument("--only", default="", help=f"names separated by commas, of: {', '.join(NAMES)}")
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        help="cells that run at the same time, one thread each; 0: in this process",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each cell")
    parser.add_argument("--runs", type=Path, default=Setup.runs, help="folder of the cells")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of pages, plots and JSON")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the cells and estimated minutes, and run nothing"
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    setup = Setup(
        preset=given.preset,
        data=given.data or DATA[given.preset],
        device=given.device,
        runs=given.runs,
        workers=given.workers,
    )
    try:
        if given.cell:
            cell = Cell(**json.loads(given.cell))
            measure_cell(experiment(cell.experiment, setup.preset), cell, setup)
            return 0
        chosen = [
            experiment(name, setup.preset) for name in (given.only.split(",") if given.only else DEFAULT)
        ]
        if given.dry_run:
            print(plan(chosen, setup, jobs=given.jobs))
            return 0
        given.results.mkdir(parents=True, exist_ok=True)
        for one in chosen:
            print(one.report(finish(one, setup, jobs=given.jobs), setup, given.results), flush=True)
        if given.results == RESULTS:
            claims.write()
    except StoppedBySignal as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, ModuleNotFoundError) as error:  # an extra is not installed
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def plan(experiments: Sequence[Experiment], setup: Setup, *, jobs: int) -> str:
    """Return the list of cells with estimated minutes of CPU time, and the sum."""
    lines, total = [], 0.0
    for one in experiments:
        _, done = known_cells(one, setup)
        cells = one.all_cells()
        left = [cell for cell in cells if cell not in done]
        minutes = sum(one.minutes(cell) for cell in left)
        wall = minutes / (1 if one.alone else max(1, jobs))
        total += wall
        lines += [
            f"{one.name}: {len(cells)} cells, {len(cells) - len(left)} finished, about {wall:.0f} minutes left",
            *(
                f"  {one.minutes(cell):6.2f}  {cell.name}{' (chooses)' if cell.chooses else ''}"
                for cell in left
            ),
        ]
    return "\n".join([*lines, f"in total about {total:.0f} minutes with {jobs} cells at a time"])


if __name__ == "__main__":
    sys.exit(main())
