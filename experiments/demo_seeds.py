"""The demo's network against its batch-norm twin, three seeds each.

    python -m experiments.run --only demo_seeds

Each arm is trained by the recipe `demo`; the twin without AGC, as everywhere. The images are the emoji of the recipe,
whatever `--data` is, and the score is that of the averaged weights on the recipe's own test part. It is no claim of a
paper, so it is not part of `make reproduce`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.cells import Cell, Result, Results, Setup
from experiments.pages import command_of, facts, machine, markdown, write
from experiments.verdicts import RULE, Scores
from normfree import train
from normfree.training.config_io import with_overrides
from normfree.training.divergence import DivergedError
from normfree.training.recipes import demo

SEEDS = 3
TINY = [
    "--data=synthetic:classes=3,size=16,train=16,val=16",
    "--length=2st",
    "--optim.warmup=1st",
    "--input.batch_size=4",
    "--input.image_size=16",
    "--input.eval_size=16",
    "--log.evaluate_every=2st",
]


class DemoSeeds:
    """The experiment; see `experiments.cells.Experiment`."""

    name, title, alone = "demo_seeds", "The demo's network and its batch-norm twin", False

    def __init__(self, preset: str) -> None:
        self.seeds, self.changes = (2, TINY) if preset == "tiny" else (SEEDS, [])

    def cells(self, done: Results) -> list[Cell]:
        """Return all cells; nothing is chosen."""
        return self.all_cells()

    def all_cells(self) -> list[Cell]:
        """Return a cell for each network and seed."""
        own = demo().model
        arms = {own: [], own.removeprefix("nf_"): ["--optim.clip=off"]}
        return [
            Cell.of(self.name, arm, seed=seed, settings={"flags": [*self.changes, *flags]})
            for seed in range(self.seeds)
            for arm, flags in arms.items()
        ]

    def minutes(self, cell: Cell) -> float:
        """Return an estimate: the demo takes about 300 s on two cores."""
        return 9.0

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Train by the recipe, or continue the run in the folder."""
        torch.set_num_threads(1)
        flags = [
            f"--model={cell.arm}",
            f"--seed={cell.seed}",
            f"--device={setup.device}",
            "--precision=float32",
            *cell.options["flags"],
        ]
        try:
            result = train(with_overrides(demo(), flags), folder / "run", console=Console(quiet=True))
        except DivergedError:
            return {"status": "diverged"}
        assert result.test is not None
        return {
            "status": "done",
            "top1": result.test.top1,
            "images": result.test.count,
            "last_top1": result.weights.top1,
        }

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Write page and JSON."""
        rows: list[dict[str, Any]] = [
            {"arm": cell.arm, "point": "", "seed": cell.seed, **result} for cell, result in done.items()
        ]
        scores, (nf, bn) = Scores(rows), list(dict.fromkeys(cell.arm for cell in self.all_cells()))
        images = next((row["images"] for row in rows if row["status"] == "done"), 0)
        table = markdown(
            ["network", "averaged weights, test %", "each seed"],
            [[arm, scores.text(arm), ", ".join(f"{x:.1f}" for x in scores.good(arm))] for arm in (nf, bn)],
        )
        text = "\n".join(
            [
                f"# {self.title}",
                "",
                f"`{command_of(self.name, setup)}`: recipe `demo`, scored on the {images} test emoji, which "
                f"chose nothing. "
                f"{len(rows)} of {len(self.all_cells())} runs are finished.",
                "",
                *table,
                "",
                f"{nf} against {bn}: {scores.compare((nf, ''), (bn, ''))}. {RULE}",
                "",
                f"On {machine()}, one thread for each run; torch {torch.__version__}.",
                "",
            ]
        )
        return write({**facts(self, setup, done), "cells": rows}, text, results)
