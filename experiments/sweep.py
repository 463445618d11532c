"""`Sweep`: an experiment that is a table of arms. Most experiments of this folder are one, see `catalog`.

Each arm is trained at each point of an axis with several seeds. Rates and λ are chosen first, on V, training images
that are not trained on, with a seed that is in no table. The report then scores all networks on the test images,
once.
"""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments import classify, pages, sweep_page
from experiments.candidates import tried_rows
from experiments.cells import Cell, Result, Results, Setup, computed_once, read_result
from experiments.choices import Changes, Choices
from experiments.classify import Settings
from experiments.networks import measure_statistics_, variant_for
from experiments.parts import balanced, of_classes, open_part, packed_parts
from experiments.verdicts import Finding, Scores
from normfree.data.source import Source
from normfree.diagnose.gradients import recommended_clipping
from normfree.files import atomic_write_text
from normfree.models.cost import count

# CPU time of a training on one core of an AMD EPYC: seconds for each step, for each block in a step, for each image
# (loading, elementwise operations), and for each multiply-accumulate of the forward pass of an image. From a dozen
# measured steps of each of 13 networks and batches on a busy machine, scaled so that the 45 trainings of
# results/batch_size_shared_rate.md take the 44 minutes that they took.
STEP_S, BLOCK_S, IMAGE_S, MAC_S = 5e-3, 1e-3, 0.28e-3, 1.3e-10
SCORING_S = 3.0  # start of the process, choice or test
FEW_IMAGES = 32  # in a batch, below which running statistics are estimates from few images


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the things compared: changes of the settings, and the candidates of which the best on V is used."""

    changes: Changes = field(default_factory=dict)
    candidates: Sequence[Changes] = ({},)


@dataclass(frozen=True, kw_only=True)
class Images:
    """How many images the data must have, and their size in pixels."""

    train: int
    choice: int
    test: int
    size: int = 32


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """A training on other classes before the cell's own.

    Attributes:
        changes: of the settings of the cell.
        by_method: further changes, by the method of the cell.
        classes: numbers of the classes; the cell itself trains on all others.
    """

    changes: Changes
    by_method: Mapping[str, Changes]
    classes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """An experiment as a table of arms; see the functions of `catalog`.

    Attributes:
        name: of the files of results.
        title: of the page.
        about: what is compared, in one paragraph.
        base: settings of all cells.
        images: the data.
        arms: by name.
        axis: what the points are, such as "batch".
        points: changes of the settings by label.
        choose_at: the point at which an arm's candidates are tried; None: at each point by itself.
        pairs: (arm, baseline) that are compared at each point.
        decide: the rule: scores to findings; its docstring is on the page.
        seeds: of each cell of the table.
        paper: numbers of a paper by (arm, point), in percent, or text that says how it failed.
        paper_points: the paper's labels of the points, where they are not ours.
        source: of these numbers.
        pretraining: None: from random weights.
    """

    name: str
    title: str
    about: str
    base: Settings
    images: Images
    arms: Mapping[str, Arm]
    decide: Callable[[Table], list[Finding]]
    axis: str = ""
    points: Mapping[str, Changes] = field(default_factory=lambda: {"": {}})
    choose_at: str | None = None
    pairs: Sequence[tuple[str, str]] = ()
    seeds: int = 3
    paper: Mapping[tuple[str, str], float | str] = field(default_factory=dict)
    paper_points: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    pretraining: Pretraining | None = None
    alone: ClassVar[bool] = False

    # --- cells ---

    def settings(self, arm: str, point: str, candidate: Changes) -> Settings:
        """Return the settings of a cell."""
        own = self.arms[arm]
        return self.base.changed(own.changes).changed(self.points[point]).changed(candidate)

    def cell(self, arm: str, point: str, candidate: Changes, seed: int) -> Cell:
        """Return a cell."""
        training = self.settings(arm, point, candidate)
        network = variant_for(
            training.base, training.method, training.fields
        )  # so that its change makes other cells
        settings = {"training": asdict(training), "images": asdict(self.images), "network": asdict(network)}
        if self.pretraining is not None:
            settings["pretraining"] = asdict(self.pretraining)
        return Cell.of(self.name, arm, point=point, seed=seed, settings=settings)

    @property
    def choices(self) -> Choices:
        """The rows of the table and the candidates of each."""
        return Choices(
            rows=[(arm, point) for point in self.points for arm in self.arms],
            candidates={name: arm.candidates for name, arm in self.arms.items()},
            cell=self.cell,
            score="choice_top1",
            seeds=self.seeds,
            axis=self.axis,
            choose_at=self.choose_at,
        )

    def cells(self, done: Results) -> list[Cell]:
        """Return the cells that can be run."""
        return self.choices.cells(done)

    def all_cells(self) -> list[Cell]:
        """Return as many cells as there will be."""
        return self.choices.all_cells()

    # --- one cell ---

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Train; a cell that chooses is scored on V, and the others keep their weights for the report."""
        torch.set_num_threads(1)
        settings = Settings().changed(cell.options["training"])
        files = packed_parts(setup, **asdict(self.images))
        source = self.own_classes(open_part(files, "train"))
        source = balanced(source, min(settings.images, len(source)))
        weights = None
        if self.pretraining is not None:
            first, path = self._pretrained(files, cell, setup)
            if first["status"] == "diverged":
                return first
            weights = torch.load(path, map_location="cpu", weights_only=True)
        net, found = classify.train(
            settings, source, seed=cell.seed, folder=folder, setup=setup, weights=weights
        )
        if found["status"] == "diverged":
            return found
        if cell.chooses:
            part = self.own_classes(open_part(files, "choice"))
            scored = classify.hits_of(
                net, part, size=(settings.sizes or (settings.size,))[0], device=setup.device
            )
            return {**found, "choice_top1": 100 * scored["hits"] / scored["count"]}
        found["trained_top1"] = classify.accuracy_on_trained(net, source, settings, setup.device)
        classify.save_weights(net, folder / "weights.pt")
        return found

    def own_classes(self, source: Source) -> Source:
        """Return the images that a cell itself uses: with a pretraining, those of the other classes."""
        if self.pretraining is None:
            return source
        numbers = [n for n in range(len(source.classes)) if n not in self.pretraining.classes]
        return of_classes(source, numbers)

    def pretraining_of(self, cell: Cell) -> Cell:
        """Return the pretraining of a cell; cells of equal network and seed share it."""
        assert self.pretraining is not None
        settings = Settings().changed(cell.options["training"])
        first = Settings(
            base=settings.base,
            method=settings.method,
            fields=settings.fields,
            clip=settings.clip,
            clipping=settings.clipping,
        ).changed({**self.pretraining.changes, **self.pretraining.by_method.get(settings.method, {})})
        options = {**cell.options, "training": asdict(first)}
        return Cell.of(self.name, "pretraining", point=settings.method, seed=cell.seed, settings=options)

    def _pretrained(self, files: dict[str, Path], cell: Cell, setup: Setup) -> tuple[Result, Path]:
        """Return the result of the pretraining of a cell, and its weights."""
        assert self.pretraining is not None
        classes, one = self.pretraining.classes, self.pretraining_of(cell)
        first, folder = Settings().changed(one.options["training"]), setup.folder_of(one)

        def train() -> Result:
            source = of_classes(open_part(files, "train"), classes)
            source = balanced(source, min(first.images, len(source)))
            net, found = classify.train(first, source, seed=cell.seed, folder=folder, setup=setup)
            classify.save_weights(net, folder / "weights.pt")
            return found

        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the cells that need the same weights wait for the first one
            return computed_once(folder / "result.json", train), folder / "weights.pt"

    def minutes(self, cell: Cell) -> float:
        """Return an estimate from the multiply-accumulates of the network."""
        settings = Settings().changed(cell.options["training"])
        seconds = training_seconds(settings)
        if self.pretraining is not None and settings.size == self.base.size:
            seconds += training_seconds(settings.changed(self.pretraining.changes))
        return (seconds + SCORING_S) / 60

    # --- report ---

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Score the networks on the test images, unless that was done, and write page, plot and JSON."""
        complete = len(done) == len(self.all_cells())
        if complete:
            self._score(done, setup)
        trained = dict(done)
        if self.pretraining is not None:
            shared = {self.pretraining_of(cell) for cell in done}
            trained |= {one: result for one in shared if (result := read_result(one, setup)) is not None}
        found = {
            **pages.facts(self, setup, done),
            "cpu_minutes": pages.cpu_minutes(trained),
            "images": vars(self.images),
            "complete": complete,
            "cells": [self._row(cell, result, setup) for cell, result in done.items() if not cell.chooses],
            "chosen": tried_rows(self.choices, done),
        }
        return self.publish(found, results)

    def publish(self, found: Mapping[str, Any], results: Path) -> str:
        """Judge what the JSON holds, write page, plot and JSON, and return the page."""
        table = Table(self, found["cells"], tried=found["chosen"])
        judged = self.decide(table) if found["complete"] else []
        found = {**found, "findings": [finding.as_json() for finding in judged]}
        if judged:
            sweep_page.draw(self, found, results / f"{found['stem']}.png")
        return pages.write(found, sweep_page.page(self, found), results)

    def _score(self, done: Results, setup: Setup) -> None:
        """Write test.json into each folder of a finished network that has none."""
        left = [
            c
            for c, r in done.items()
            if not c.chooses and r["status"] == "done" and not (setup.folder_of(c) / "test.json").exists()
        ]
        if not left:
            return
        print(f"{self.name}: scoring {len(left)} networks on the test images", flush=True)
        files = packed_parts(setup, **asdict(self.images))
        source = self.own_classes(open_part(files, "test"))
        for cell in left:
            folder, settings = setup.folder_of(cell), Settings().changed(cell.options["training"])
            found = {}
            for name in ("weights", "average"):
                if not (folder / f"{name}.pt").exists():
                    continue
                net = classify.load_network(settings, folder / f"{name}.pt", classes=len(source.classes))
                for size in settings.sizes or (settings.size,):
                    found[f"{name}@{size}"] = classify.hits_of(net, source, size=size, device=setup.device)
            if settings.method == "batch" and settings.batch < FEW_IMAGES:
                net = classify.load_network(settings, folder / "weights.pt", classes=len(source.classes))
                trained_on = self.own_classes(open_part(files, "train"))
                measure_statistics_(net, classify.training_inputs(trained_on, settings))
                key = f"measured@{settings.size}"
                found[key] = classify.hits_of(net, source, size=settings.size, device=setup.device)
            atomic_write_text(folder / "test.json", json.dumps(found, indent=1) + "\n")

    def _row(self, cell: Cell, result: Result, setup: Setup) -> dict[str, Any]:
        """Return what the JSON holds of a cell of the table."""
        training = cell.options["training"]
        row = {
            "arm": cell.arm,
            "point": cell.point,
            "seed": cell.seed,
            "rate": training["rate"],
            "clipping": training["clipping"] if training["clip"] != "off" else 0.0,
            **{k: v for k, v in result.items() if k != "ratios"},
        }
        recommended = recommended_clipping(result.get("ratios", ()))
        if math.isfinite(recommended):
            row["recommended"] = recommended
        path = setup.folder_of(cell) / "test.json"
        if path.exists():
            scores = json.loads(path.read_text(encoding="utf-8"))
            row["test_images"] = next(iter(scores.values()))["count"]
            for name, found in scores.items():
                kind, _, size = name.partition("@")
                if not math.isfinite(found["loss"]):  # the weights give no finite logits
                    row["status"] = "diverged"
                    continue
                top1 = 100 * found["hits"] / found["count"]
                key = {"weights": "top1", "average": "average_top1", "measured": "measured_top1"}[kind]
                row.setdefault(key, top1)
                row[f"{key}@{size}"] = top1
        return row


class Table(Scores):
    """The scores of a sweep, for its rule.

    Args:
        sweep: the experiment.
        rows: cells of the table, as in its JSON.
        key: the number that is compared.
        tried: candidates of the arms, as in its JSON.
    """

    def __init__(
        self,
        sweep: Sweep,
        rows: Sequence[Mapping[str, Any]],
        *,
        key: str = "top1",
        tried: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(rows, key=key)
        self.sweep, self.rows, self.tried = sweep, rows, tried
        self.points = list(sweep.points)

    def other(self, key: str) -> Table:
        """Return the table of another number of the cells, such as step_ms."""
        return Table(self.sweep, self.rows, key=key)


def training_seconds(settings: Settings) -> float:
    """Return an estimate of the CPU time of a training."""
    variant = variant_for(settings.base, settings.method, settings.fields)
    blocks = sum(variant.depths)
    macs = count(variant, image_size=settings.size, num_classes=10).macs
    passes = 1.2 if settings.sam else 1.0
    each = STEP_S + BLOCK_S * blocks + settings.batch * (IMAGE_S + MAC_S * macs)
    return settings.steps * passes * each
