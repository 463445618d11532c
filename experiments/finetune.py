"""Fine-tuning on a small folder at batch sizes 2, 8 and 64: a normalizer-free network and its batch-norm twin.

    pip download --no-deps elpv-dataset==1.0.0.post1        # or any folder with one folder per class
    python -m experiments.finetune --elpv elpv_dataset-1.0.0.post1-py3-none-any.whl
    python -m experiments.finetune --data photos/

1. Both networks are trained on the embedded emoji with the demo's recipe.
2. The folder is split once, half of each class for the test, and packed at 128 px. The test images choose nothing.
3. Each arm tries the same learning rates with seeds that are not used in the tables, and keeps the best on a fifth of
   the training images that these runs are not trained on (V).
4. Each cell is one run of the recipe `finetune` on all training images; rate and averaging window scale linearly with
   the batch size. Runs with a patience are trained without V, which chooses their step.

One process with one thread. Finished runs are kept, and interrupted runs continue. The 2,624 photographs of solar cells
(ELPV: Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0) are not part of this repository. Writes results/finetune.json and
results/finetune.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from experiments.pages import machine, markdown
from experiments.verdicts import Scores, spread
from normfree import Config, evaluate, from_pretrained, open_source, train
from normfree.data.sources.packed import PackedSource, pack
from normfree.data.subset import Subset
from normfree.preprocessing import Preprocessing
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES
from normfree.training.stop import StoppedBySignal

RUNS = Path("runs/finetune")
RESULTS = Path(__file__).parent / "results"
GRADES = {
    "0.0": "functional",
    "0.3333333333333333": "probably functional",
    "0.6666666666666666": "probably defective",
    "1.0": "defective",
}
ARMS = {"NF + AGC": ("nf_resnet_nano_64", "agc"), "BN twin": ("resnet_nano_64", "off")}
BATCH_SIZES = (2, 8, 64)
PLAIN = 8  # the batch size of all measurements at a single batch size
RATES = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16)  # at batch size 32; the recipe's is 0.02
LENGTH, PROBE_SEEDS = "4ep", (100, 101, 102)
SIZES = (48, 64, 80, 96, 128)  # test sizes in px; training is at 64
PACKED = 128  # px
POWERS = (0.0, 0.5, 1.0)
FEW = 75  # training images of each class in the small folder
FEW_LENGTHS = ("30ep", "1000st")
WHOLE = "30ep"  # length of the recipe
PATIENCES = (0, 3, 10)  # the recipe uses 10
SCORES = ("top1", "balanced_top1")
V_FRACTION = 0.2  # of the training images
TRAIN, TEST, FEW_TRAIN = RUNS / "train.packed", RUNS / "test.packed", RUNS / "few.packed"


@dataclass(frozen=True)
class Cell:
    """One run: its arm, settings and seed."""

    arm: str
    batch_size: int
    seed: int
    balance: float = 0.0
    pretrained: bool = True
    length: str = LENGTH
    few: bool = False
    patience: int | None = None  # None: trained on all images, without V, to the end

    def name(self) -> str:
        """Return the name of the run folder."""
        parts = [ARMS[self.arm][0], f"b{self.batch_size}", f"s{self.seed}"]
        parts += [f"balance{self.balance:g}"] if self.balance else []
        parts += [] if self.pretrained else ["scratch"]
        parts += ["few"] if self.few else []
        parts += [] if self.patience is None else [f"patience{self.patience}"]
        return "-".join(parts + ([] if self.length == LENGTH else [self.length]))

    def flags(self, rate: float, *, held_out: float = 0.0) -> list[str]:
        """Return the command-line options of a run; `rate` is for batch size 32, `held_out` the fraction that V is."""
        model, clip = ARMS[self.arm]
        scale = self.batch_size / 32
        start = str(RUNS / f"pretrained-{model}") if self.pretrained else ""
        every = "1000st" if self.few else "2ep" if self.patience is None else "1ep"
        options = {
            "data": f"packed:{FEW_TRAIN if self.few else TRAIN},test={TEST}", "model": model, "weights": start,
            "seed": self.seed, "device": "cpu", "precision": "float32", "length": self.length,
            "patience": self.patience or 0, "input.workers": 0,
            "input.val_fraction": held_out if self.patience is None else V_FRACTION, "input.test_fraction": 0.0,
            "input.batch_size": self.batch_size, "optim.lr": rate * scale, "optim.clip": clip,
            "optim.ema_decay": 1 - 0.01 * scale, "optim.class_balance": self.balance,
            "log.evaluate_every": every, "log.checkpoint_every": every,
        }  # fmt: skip
        return [f"--{key}={value}" for key, value in options.items()]


def run(config: Config, out: Path) -> Path:
    """Train or continue the run `out`, unless it is finished; return its folder."""
    if not (out / "results.json").exists():
        print(f"{time.strftime('%H:%M:%S')} {out.name}", flush=True)
        start = time.process_time()
        try:
            train(config, out, console=Console(file=io.StringIO()))
        finally:
            if out.is_dir():
                (out / "cpu_seconds.txt").write_text(
                    f"{cpu_seconds(out) + time.process_time() - start:.1f}\n"
                )
    return out


def cpu_seconds(out: Path) -> float:
    """Return the CPU time of a run so far, without parts that were killed."""
    path = out / "cpu_seconds.txt"
    return float(path.read_text()) if path.exists() else 0.0


def read(out: Path) -> dict[str, Any]:
    """Return the scores of a finished run on the test images, its number of evaluations, and its CPU time."""
    scores = json.loads((out / "results.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "test": {key: scores["test"][key] for key in (*SCORES, "per_class_top1")},
        "evaluations": sum("ema_top1" in row for row in rows),
        "clipped": statistics.fmean(row["clipped"] for row in rows if "clipped" in row),
        "cpu_seconds": cpu_seconds(out),
    }


def unpack_elpv(wheel: Path) -> Path:
    """Copy the package's photographs into one folder per grade; return the parent folder."""
    folder = RUNS / "elpv"
    with zipfile.ZipFile(wheel) as archive:
        for line in archive.read("elpv_dataset/data/labels.csv").decode().splitlines():
            path, grade, _ = line.split()
            target = folder / GRADES[grade] / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(f"elpv_dataset/data/{path}"))
    return folder


def pack_parts(data: str) -> None:
    """Split the folder into training and test images and pack them, so that every run reads the same ones.

    Earlier versions chose the recipe on one half and trained on the other. The halves are exchanged, so that no test
    image has chosen anything.
    """
    if not (TRAIN.exists() and TEST.exists()):
        split = open_source(data, val_fraction=0.5, seed=0)
        for source, part in ((split.val, TRAIN), (split.train, TEST)):
            pack(source, part, size=PACKED)
    if not FEW_TRAIN.exists():
        images = PackedSource(TRAIN)
        labels = [images.label(i) for i in range(len(images))]
        first = [i for i, label in enumerate(labels) if labels[:i].count(label) < FEW]
        pack(Subset(images, first), FEW_TRAIN, size=PACKED)


def probe() -> dict[str, dict[float, float]]:
    """Return for each arm and rate top-1 on V at batch size 8, averaged over the seeds; each has a V of its own."""
    found: dict[str, dict[float, float]] = {}
    for arm in ARMS:
        for rate in RATES:
            scores = []
            for seed in PROBE_SEEDS:
                cell = Cell(arm, PLAIN, seed)
                config = with_overrides(RECIPES["finetune"](), cell.flags(rate, held_out=V_FRACTION))
                out = run(config, RUNS / f"probe-{cell.name()}-lr{rate:g}")
                scores.append(json.loads((out / "results.json").read_text())["average"]["top1"])
            found.setdefault(arm, {})[rate] = statistics.fmean(scores)
    return found


def at_sizes(cell: Cell) -> dict[int, float]:
    """Return top-1 of a finished cell's network on the test images at several sizes."""
    net, images = from_pretrained(RUNS / cell.name()).net, PackedSource(TEST)
    return {
        size: evaluate(
            net, images, preprocessing=Preprocessing(image_size=size, crop="squash"), device="cpu"
        ).top1
        for size in SIZES
    }


def differences(cells: Mapping[Cell, Mapping[str, Any]]) -> list[list[str]]:
    """Return table rows that compare kinds of cells, seed by seed."""
    nf, bn = ARMS
    last = Cell(nf, 32, 0, length=WHOLE, patience=0)
    pairs = [
        *((Cell(nf, batch, 0), Cell(bn, batch, 0)) for batch in BATCH_SIZES),
        *((Cell(arm, min(BATCH_SIZES), 0), Cell(arm, max(BATCH_SIZES), 0)) for arm in ARMS),
        *((Cell(arm, PLAIN, 0, balance=b), Cell(arm, PLAIN, 0)) for arm in ARMS for b in POWERS if b),
        tuple(Cell(nf, 32, 0, length=length, few=True) for length in FEW_LENGTHS),
        (Cell(nf, PLAIN, 0), Cell(nf, PLAIN, 0, pretrained=False)),
        *((replace(last, patience=patience), last) for patience in PATIENCES if patience),
    ]
    rows = [
        {
            "arm": replace(cell, seed=0).name(),
            "point": "",
            "seed": cell.seed,
            "status": "done",
            **result["test"],
        }
        for cell, result in cells.items()
    ]
    scores = [Scores(rows, key=key) for key in SCORES]
    return [
        [
            *(cell.name().replace("-s0", "") for cell in pair),
            *(str(one.compare(*((cell.name(), "") for cell in pair))) for one in scores),
        ]
        for pair in pairs
    ]


def page(found: dict[str, Any], seeds: int) -> str:
    """Return the text of the page, from the results that `main` has collected so far."""
    cells = {Cell(**c["cell"]): c for c in found["cells"]}

    def of(arm: str, batch: int, **other: Any) -> list[dict[str, Any]]:
        return [cells[c] for s in range(seeds) if (c := Cell(arm, batch, s, **other)) in cells]

    def pair(arm: str, batch: int, **other: Any) -> list[str]:
        scores = [cell["test"] for cell in of(arm, batch, **other)]
        return [spread([x[kind] for x in scores]) for kind in SCORES]

    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in found["rates"].items())
    tried = "; ".join(
        f"{a}: " + ", ".join(f"{r} {v:.1f}" for r, v in p.items()) for a, p in found["probes"].items()
    )
    at_size = {arm: [found["sizes"].get(Cell(arm, PLAIN, s).name()) for s in range(seeds)] for arm in ARMS}
    lines = [
        "# Fine-tuning on a small folder", "",
        f"`python -m experiments.finetune`: {found['images'][0]} training and {found['images'][1]} test images "
        f"in {found['classes']} classes; the largest has {found['largest']:.1f} % of the latter. Both networks were "
        f"trained on the emoji before. Recipe `finetune`, {LENGTH}, 64 px, no early stopping, averaged weights after "
        f"the last step; mean ± standard deviation of {seeds} seeds. The seed changes "
        "everything except the split. The BN twin has no clipping; all else is the same.", "",
        f"Learning rate at batch size 32: {rates}; scaled linearly at other batch sizes, as is the averaging window. "
        f"Both arms tried the same rates at batch size {PLAIN} with {len(PROBE_SEEDS)} other seeds, each trained "
        f"without a fifth of the training images, on which it was scored; top-1 %: {tried}.", "",
        *markdown(
            ["network", "batch", "top-1 %", "mean over classes %", "clipped units %", "CPU s per run"],
            [
                [arm, str(batch), *pair(arm, batch),
                 spread([100 * c["clipped"] for c in of(arm, batch)]),
                 spread([c["cpu_seconds"] for c in of(arm, batch)])]
                for arm in ARMS for batch in BATCH_SIZES
            ],
        ), "",
        f"The standard error of one figure is about {found['error']:.1f} points; all cells use the same "
        "images, so differences are more certain than that.", "", f"## Class balance, batch size {PLAIN}", "",
        *markdown(
            ["network", "class_balance", "top-1 %", "mean over classes %"],
            [[arm, f"{b:g}", *pair(arm, PLAIN, balance=b)] for arm in ARMS for b in POWERS],
        ), "", "## Few images, batch size 32", "",
        f"The first {FEW} training images of each class, {FEW * found['classes']} in total; the test images are "
        "the same.", "",
        *markdown(
            ["network", "length", "top-1 %", "mean over classes %"],
            [["NF + AGC", n, *pair("NF + AGC", 32, length=n, few=True)] for n in FEW_LENGTHS],
        ), "", f"## Patience, batch size 32, {WHOLE}", "",
        "Trained without a fifth of the training images, on which the averaged weights are scored after each epoch: "
        "the run ends when as many epochs in a row bring nothing better, and the best is kept. Patience 0 goes on to "
        "the end and keeps the last.", "",
        *markdown(
            ["patience", "epochs run", "top-1 %", "mean over classes %"],
            [
                [str(patience),
                 spread([float(c["evaluations"]) for c in of("NF + AGC", 32, length=WHOLE, patience=patience)]),
                 *pair("NF + AGC", 32, length=WHOLE, patience=patience)]
                for patience in PATIENCES
            ],
        ), "", f"## Pretrained and random weights, batch size {PLAIN}", "",
        *markdown(
            ["network", "start", "top-1 %", "mean over classes %"],
            [
                ["NF + AGC", start, *pair("NF + AGC", PLAIN, pretrained=p)]
                for start, p in (("emoji", True), ("random", False))
            ],
        ), "", f"## Test resolution, batch size {PLAIN}, top-1 %", "",
        *markdown(
            ["network, trained at 64 px", *(f"{size} px" for size in SIZES)],
            [
                [arm, *(spread([x[str(size)] for x in scores if x]) for size in SIZES)]
                for arm, scores in at_size.items()
            ],
        ), "", "## Differences, in points", "",
        "Of the same seeds, with 95 % intervals.", "",
        *markdown(["first", "second", "top-1", "mean over classes"], differences(cells)), "",
        f"{found['machine']}, torch {found['torch']}, one thread; {found['cpu_minutes']:.0f} core-minutes in total.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def every_cell(seeds: int) -> list[Cell]:
    """Return all cells: the main table first, seed by seed, then the other measurements."""
    table = [Cell(arm, batch, seed) for seed in range(seeds) for batch in (PLAIN, 64, 2) for arm in ARMS]
    rest = [Cell(arm, PLAIN, seed, balance=b) for b in POWERS if b for seed in range(seeds) for arm in ARMS]
    rest += [Cell("NF + AGC", PLAIN, seed, pretrained=False) for seed in range(seeds)]
    rest += [Cell("NF + AGC", 32, seed, length=n, few=True) for seed in range(seeds) for n in FEW_LENGTHS]
    rest += [Cell("NF + AGC", 32, seed, length=WHOLE, patience=p) for seed in range(seeds) for p in PATIENCES]
    return table + rest


def main() -> None:
    """Run all cells that are missing, and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a folder with one folder per class")
    parser.add_argument("--elpv", type=Path, help="the wheel of elpv-dataset")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.data and not arguments.elpv:
        parser.error("pass --data FOLDER or --elpv WHEEL")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    for model, _ in ARMS.values():
        flags = [f"--model={model}", "--device=cpu", "--precision=float32"]
        run(with_overrides(RECIPES["demo"](), flags), RUNS / f"pretrained-{model}")
    pack_parts(arguments.data or str(unpack_elpv(arguments.elpv)))
    probes = probe()
    rates = {arm: max(tried.items(), key=itemgetter(1))[0] for arm, tried in probes.items()}
    print(probes, rates, flush=True)
    train_part, test_part = PackedSource(TRAIN), PackedSource(TEST)
    labels = torch.tensor([test_part.label(i) for i in range(len(test_part))])
    largest = float(torch.bincount(labels).max()) / len(labels)
    found = {
        "machine": machine(), "torch": torch.__version__, "images": [len(train_part), len(test_part)],
        "classes": len(test_part.classes), "largest": 100 * largest,
        "error": 100 * (largest * (1 - largest) / len(labels)) ** 0.5, "probes": probes, "rates": rates,
        "cells": [], "sizes": {},
    }  # fmt: skip
    for cell in every_cell(arguments.seeds):
        config = with_overrides(RECIPES["finetune"](), cell.flags(rates[cell.arm]))
        found["cells"].append({"cell": vars(cell), **read(run(config, RUNS / cell.name()))})
        if cell == Cell(cell.arm, PLAIN, cell.seed):
            found["sizes"][cell.name()] = at_sizes(cell)
        found["cpu_minutes"] = sum(map(cpu_seconds, RUNS.iterdir())) / 60
        text = json.dumps(found)
        (RESULTS / "finetune.json").write_text(text.replace('{"cell"', '\n{"cell"') + "\n", encoding="utf-8")
        (RESULTS / "finetune.md").write_text(page(json.loads(text), arguments.seeds), encoding="utf-8")
    print((RESULTS / "finetune.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        main()
    except StoppedBySignal as stopped:
        sys.exit(stopped.exit_code)  # the state is saved; the same command continues
