"""Accuracy under differential privacy: a normalizer-free network, group norm, and a network without its batch norms.

    python -m experiments.run --only privacy --data cifar10/        # needs pip install 'normfree[private]'

Arms: `nf`, the normalizer-free network; `group`, its twin with group norm (the remedy of De et al. 2022, arXiv
2204.13650, and of Opacus); `converted`, its batch-norm twin after `convert_batchnorm`, which folds norms whose
statistics are those of noise images, since private images must not determine them. Each arm is trained from random
weights with epsilon 1, 3, 8 and infinity (clipping without noise), at delta 1e-5: Poisson samples, clipped gradients
of examples averaged over augmented copies, noise by the RDP accountant of Opacus, plain SGD, a weight average.

Each arm has its own learning rate for each epsilon, chosen on V. The images are public, so that the choice spends no
privacy here; with private images it would. The clipping norm is so small that in each arm nearly all gradients are
clipped. A step then depends on the rate times the clipping norm alone, so no arm is favored by the size of its
gradients, which at the start differs fourfold between them. Noise and sampling follow from the seed, so that a cell can
be repeated.
The report scores the averaged weights on the test images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from experiments.candidates import edge_lines, section, tried_rows
from experiments.cells import Cell, Result, Results, Setup, computed_once
from experiments.choices import Changes, Choices, settings_of
from experiments.classify import hits_of
from experiments.networks import build, measure_statistics_, variant_for
from experiments.pages import facts, markdown, verdict_lines, write
from experiments.parts import open_part, packed_parts
from experiments.verdicts import RULE, Finding, Scores, as_good, spread
from normfree import Ema, convert_batchnorm
from normfree.data.loader import train_batches
from normfree.data.seeds import key
from normfree.data.source import Source
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import train_transform
from normfree.device import run_device
from normfree.diagnose.plotting import BLUE, GREEN, ORANGE, new_figure
from normfree.files import atomic_write
from normfree.optim.per_example import clipped_gradient_sum
from normfree.training.accounting import noise_for
from normfree.training.allocator import keep_freed_memory
from normfree.training.secret import SecretKey

ARMS = {"nf": "nf", "group": "group", "converted": "batch"}  # and the methods of their networks
NOISE_IMAGES = 64  # whose statistics the folded norms have


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the experiment. `batch` is the expected number of examples, each with `copies` images; `rates` are
    tried for each arm and epsilon; an epsilon is a text, since JSON has no infinity."""

    base: str = "thin"
    image_size: int = 32
    train: int = 8_000
    choice: int = 2_000
    test: int = 5_000
    batch: int = 512
    copies: int = 1
    epochs: float = 8
    epsilons: tuple[str, ...] = ("1", "3", "8", "inf")
    delta: float = 1e-5
    clip: float = 0.1
    average: float = 0.95
    rates: tuple[float, ...] = (5.0, 15.0, 45.0, 135.0)
    seeds: int = 3
    chunk: int = 64  # examples whose gradients are in memory at a time


SIZES = {
    "cpu": Size(),
    "gpu": Size(
        base="mini",
        train=45_000,
        choice=5_000,
        test=10_000,
        batch=4096,
        copies=16,
        epochs=100,
        average=0.999,
        seeds=5,
        chunk=256,
    ),
    "tiny": Size(
        base="tiny",
        image_size=16,
        train=40,
        choice=10,
        test=20,
        batch=8,
        copies=2,
        epochs=1,
        epsilons=("inf",),
        rates=(0.5,),
        seeds=2,
    ),
}


def network(size: Size, arm: str, *, classes: int, seed: int) -> nn.Module:
    """Return the network of an arm with the initial weights of a seed."""
    net: nn.Module = build(size.base, ARMS[arm], classes=classes, seed=seed)
    if arm == "converted":
        generator = torch.Generator().manual_seed(key(seed, "statistics"))
        noise = torch.randn(NOISE_IMAGES, 3, size.image_size, size.image_size, generator=generator)
        measure_statistics_(net, [noise])
        net = convert_batchnorm(net).model
    return net.train()


def train(
    size: Size,
    arm: str,
    *,
    epsilon: float,
    rate: float,
    seed: int,
    source: Source,
    device: torch.device,
    workers: int = 0,
) -> tuple[nn.Module, float]:
    """Train a network privately; return it with its averaged weights, and the noise multiplier."""
    secret = SecretKey(hashlib.sha256(f"privacy {seed}".encode()).digest())
    net = network(size, arm, classes=len(source.classes), seed=seed).to(device)
    ema = Ema(net, decay=size.average)
    steps, sample_rate = max(2, round(size.epochs * len(source) / size.batch)), size.batch / len(source)
    noise = noise_for(epsilon, delta=size.delta, sample_rate=sample_rate, steps=steps, accountant="rdp")
    batches = train_batches(
        source,
        train_transform(image_size=size.image_size, crop_min=0.6),
        batch_size=size.batch * size.copies,
        seed=seed,
        num_steps=steps,
        workers=workers,
        repeats=size.copies,
        members=lambda step: secret.members(len(source), sample_rate, step=step),
    )
    for batch in batches:
        sums = clipped_gradient_sum(
            net,
            normalize(batch.images.to(device)),
            batch.labels.to(device),
            max_norm=size.clip,
            copies=size.copies,
            chunk=size.chunk,
        )
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                total = sums[name]
                if noise:
                    drawn = torch.from_numpy(secret.gaussian(total.shape, batch.step, name))
                    total = total + noise * size.clip * drawn.to(total)
                parameter.sub_(rate * total / size.batch)
        ema.update(net)
    return ema.module, noise


class Privacy:
    """The experiment; see `experiments.cells.Experiment`."""

    name, title, alone = "privacy", "Accuracy under differential privacy", False

    def __init__(self, preset: str) -> None:
        self.size = SIZES[preset]

    @property
    def seeds(self) -> int:
        """How many cells there are of each row of the table."""
        return self.size.seeds

    def cell(self, arm: str, epsilon: str, candidate: Changes, seed: int) -> Cell:
        """Return a cell."""
        settings = settings_of(self.size, candidate, variant_for(self.size.base, ARMS[arm], {}))
        return Cell.of(self.name, arm, point=epsilon, seed=seed, settings=settings)

    @property
    def choices(self) -> Choices:
        """The rows of the table and the rates of each."""
        return Choices(
            rows=[(arm, epsilon) for epsilon in self.size.epsilons for arm in ARMS],
            candidates={arm: [{"rate": rate} for rate in self.size.rates] for arm in ARMS},
            cell=self.cell,
            score="top1",
            seeds=self.seeds,
            axis="epsilon",
        )

    def cells(self, done: Results) -> list[Cell]:
        """Return the cells that can be run."""
        return self.choices.cells(done)

    def all_cells(self) -> list[Cell]:
        """Return as many cells as there will be."""
        return self.choices.all_cells()

    def minutes(self, cell: Cell) -> float:
        """Return an estimate: an image of 32 px takes 2.7 ms on one core of an Intel Xeon with AVX-512."""
        return 2.7e-3 / 60 * self.size.epochs * self.size.train * self.size.copies

    def _files(self, setup: Setup) -> dict[str, Path]:
        size = self.size
        return packed_parts(setup, train=size.train, choice=size.choice, test=size.test, size=size.image_size)

    def _scored(self, net: nn.Module, source: Source, device: torch.device) -> Result:
        """Return the accuracy of a network, or that it diverged, which its logits show."""
        found = hits_of(net, source, size=self.size.image_size, device=str(device))
        if not math.isfinite(found["loss"]):
            return {"status": "diverged"}
        return {"top1": 100 * float(found["hits"]) / found["count"]}

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Train; a cell that chooses is scored on V, the others keep their weights for the report."""
        keep_freed_memory()
        files, device = self._files(setup), run_device(setup.device)
        net, noise = train(
            self.size,
            cell.arm,
            epsilon=float(cell.point),
            rate=cell.options["rate"],
            seed=cell.seed,
            source=open_part(files, "train"),
            device=device,
            workers=setup.workers,
        )
        if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
            return {"status": "diverged", "noise": noise}
        found: Result = {"status": "done", "noise": noise}
        if cell.chooses:
            return {**found, **self._scored(net, open_part(files, "choice"), device)}
        atomic_write(folder / "weights.pt", lambda path: torch.save(net.state_dict(), path))
        return found

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Score the networks on the test images, unless that was done, and write page, plot and JSON."""
        if len(done) < len(self.all_cells()):
            return f"{self.title}: {len(done)} cells are finished; the test images were not opened.\n"
        rows = []
        for cell, result in done.items():
            own = {"arm": cell.arm, "point": cell.point, "seed": cell.seed, "rate": cell.options["rate"]}
            if not cell.chooses:
                rows.append({**own, **result, **self._tested(cell, result, setup)})
        found = {
            **facts(self, setup, done),
            "size": asdict(self.size),
            "cells": rows,
            "chosen": tried_rows(self.choices, done),
        }
        return self.publish(found, results)

    def publish(self, found: Mapping[str, Any], results: Path) -> str:
        """Judge what the JSON holds, write page, plot and JSON, and return the page."""
        scores = Scores(found["cells"])
        found = {**found, "findings": [one.as_json() for one in findings(scores, self.size.epsilons)]}
        plot(scores, self.size.epsilons, results / f"{found['stem']}.png")
        return write(found, page(self, found), results)

    def _tested(self, cell: Cell, result: Result, setup: Setup) -> Result:
        """Return the score of a network on the test images; empty if its training diverged."""
        if result["status"] != "done":
            return {}
        folder, device = setup.folder_of(cell), run_device(setup.device)

        def compute() -> Result:
            source = open_part(self._files(setup), "test")
            net = network(self.size, cell.arm, classes=len(source.classes), seed=cell.seed)
            net.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
            return self._scored(net, source, device)

        return computed_once(folder / "test.json", compute)


def findings(scores: Scores, epsilons: Sequence[str]) -> list[Finding]:
    """The accuracy of a seed is its mean over epsilon 3 and 8; with 1, networks may be little better than random, which
    would hide differences. A normalizer-free network reaches the accuracy of group norm if `nf` is as good as `group`.
    A network whose batch norm was folded trains privately as well as a normalizer-free one if `converted` is as good as
    `nf`."""
    judged = [epsilon for epsilon in epsilons if 1 < float(epsilon) < math.inf]
    means = []
    for arm in ARMS:
        each = [scores.by_seed(arm, epsilon) for epsilon in judged]
        for seed in set.intersection(*map(set, each)) if each else ():
            own = [top1 for one in each if (top1 := one[seed]) is not None]
            status = "done" if len(own) == len(each) else "diverged"
            means.append({"arm": arm, "point": "", "seed": seed, "status": status, "top1": fmean(own or [0])})
    found = []
    for claim, arm, baseline in (("dp", "nf", "group"), ("dp-converted", "converted", "nf")):
        one = Scores(means).compare((arm, ""), (baseline, ""))
        over = f"mean over epsilon {', '.join(judged)}: {one}" if judged else "no epsilon of 3 or 8"
        shown = f"{arm} against {baseline}, {over}"
        rows = tuple((own, epsilon) for own in (arm, baseline) for epsilon in judged)
        found.append(Finding(claim, as_good(one), shown, rows))
    return found


def page(experiment: Privacy, found: Mapping[str, Any]) -> str:
    """Return the page of results, from what the JSON holds."""
    size, scores, rows = experiment.size, Scores(found["cells"]), []
    for epsilon in size.epsilons:
        own = [cell for cell in found["cells"] if cell["point"] == epsilon]
        row = [epsilon, f"{own[0]['noise']:.3g}"]
        for arm in ARMS:
            rate = next(cell["rate"] for cell in own if cell["arm"] == arm)
            diverged = scores.diverged(arm, epsilon)
            row.append(
                f"{spread(scores.good(arm, epsilon))} (rate {rate:g}{f', {diverged} diverged' * (diverged > 0)})"
            )
        others = [arm for arm in ARMS if arm != "nf"]
        compared = [f"against {arm}: {scores.compare(('nf', epsilon), (arm, epsilon))}" for arm in others]
        rows.append([*row, "; ".join(compared)])
    return "\n".join(
        [
            "# Accuracy under differential privacy",
            "",
            f"`{found['command']}`: a small network and its twins, {size.train} training images, "
            f"{size.epochs:g} epochs of Poisson samples of {size.batch} expected images (augmented copies of each: "
            f"{size.copies}), clipping norm {size.clip:g}, delta {size.delta:g}, scored on {size.test} test images. "
            f"Top-1 in percent, mean ± standard deviation of {found['seeds']} seeds; rates chosen on V.",
            "",
            *verdict_lines(found),
            *edge_lines(found["chosen"], experiment.choices),
            "",
            f"![Accuracy over epsilon]({found['stem']}.png)",
            "",
            *markdown(["epsilon", "noise", *ARMS, "nf in points (95 %)"], rows),
            "",
            *section(found["chosen"], experiment.choices),
            f"The rule: {' '.join((findings.__doc__ or '').split())} {RULE}",
            "",
            f"{found['cpu_minutes']:.0f} minutes of CPU time on {found['machine']}; torch {found['torch']}.",
            "",
        ]
    )


def plot(scores: Scores, epsilons: tuple[str, ...], path: Path) -> None:
    """Draw accuracy over epsilon, one point for each seed."""
    figure = new_figure(5.5, 3.6)
    axis = figure.subplots()
    for arm, color in zip(ARMS, (BLUE, ORANGE, GREEN), strict=True):
        means = [scores.mean(arm, epsilon) for epsilon in epsilons]
        axis.plot(range(len(means)), [math.nan if m is None else m for m in means], color=color, label=arm)
        for at, epsilon in enumerate(epsilons):
            good = scores.good(arm, epsilon)
            axis.plot([at] * len(good), good, ".", color=color)
    axis.set_xticks(range(len(epsilons)), epsilons)
    axis.set_xlabel("epsilon")
    axis.set_ylabel("test top-1, %")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
