"""Accuracy against batch size for batch norm, no norm, and no norm with AGC: figure 2a of [B] at the size of CIFAR-10.

    python -m experiments.batch_size [--preset cpu|gpu] [--data DATA] [--jobs 1]
    python -m experiments.batch_size --probe        # the runs that determined the rate and λ

[B] is arXiv 2102.06171. Three arms share a variant, a base learning rate (times batch / 256) and a number of epochs:
`bn` is the batch-norm twin, `nf` the normalizer-free network without clipping, and `nf_agc` the same with AGC. A cell
is one arm at one batch size with one seed; it has its own run folder in runs/batch_size/. After an interruption, run
the same command again: finished cells are kept, and the interrupted cell continues from its checkpoint. Writes
experiments/results/batch_size.md, .json and .png. `--data` takes any value of normfree's `--data`. The default,
cifar10, must be in data/ (`normfree train cifar --data cifar10:download=yes` downloads it). The images used are packed
once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.batch_size_report import ARMS, write
from normfree import VARIANTS
from normfree.data.seeds import permutation
from normfree.suggest import problem
from normfree.training.allocator import keep_freed_memory
from normfree.training.config import (
    AugmentConfig,
    Config,
    InputConfig,
    LogConfig,
    NetConfig,
    OptimConfig,
    steps_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from normfree.data.source import Source

RUNS = Path("runs/batch_size")
RESULTS = Path(__file__).parent / "results"
PROBE_SEED = 100  # not used in the table

# Variants of this experiment only: six bottleneck blocks at 16, 8 and 4 px; two cores can train them 45 times.
_THIN = replace(VARIANTS["nf_resnet_nano"], stem="conv3_stride2", depths=(2, 2, 2), widths=(32, 64, 128))
EXTRA_VARIANTS = {"nf_resnet_thin": _THIN, "resnet_thin": replace(_THIN, norm="batch")}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of the experiment.

    `lr` is the peak rate at a batch of 256. `clippings` are AGC's λ, one for each batch size, since [B] used the best
    for each. `probes` are the λ that were tried, by batch size.
    """

    data: str = "cifar10"
    model: str
    train_images: int
    val_images: int
    length: str
    warmup: str
    batches: tuple[int, ...]
    seeds: int
    lr: float
    clippings: tuple[float, ...]
    workers: int = 0
    probe_lrs: tuple[float, ...] = ()
    probes: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""


PRESETS = {
    "cpu": Preset(
        model="nf_resnet_thin", train_images=8_000, val_images=2_000, length="10ep", warmup="1ep",
        batches=(32, 64, 128, 256, 512), seeds=3, lr=0.4, clippings=(0.16, 0.16, 0.16, 0.08, 0.02),
        probe_lrs=(0.2, 0.4, 0.8),
        probes={32: (0.08, 0.16), 64: (0.08, 0.16), 128: (0.04, 0.08, 0.16), 256: (0.04, 0.08, 0.16),
                512: (0.005, 0.01, 0.02, 0.04, 0.08)},
        note="The machine was shared with other work. The first plan used λ = 0.02 at every batch size. After its "
             "seed 0 (below), each batch size got its own λ; the largest kept 0.02.",
    ),
    "gpu": Preset(
        model="nf_resnet_mini", train_images=50_000, val_images=10_000, length="60ep", warmup="5ep",
        batches=(128, 256, 512, 1024, 2048, 4096), seeds=5, lr=0.1, workers=8,
        # 0.01 at 4096 is from [B]; the others are a guess, doubled when the batch size is halved.
        clippings=(0.16, 0.16, 0.08, 0.04, 0.02, 0.01),
        probe_lrs=(0.1, 0.2, 0.4), probes=dict.fromkeys((128, 512, 1024, 2048, 4096), (0.01, 0.02, 0.04, 0.08, 0.16)),
    ),
    "tiny": Preset(
        data="synthetic:classes=4,size=16,train=64,val=32", model="nf_resnet_thin", train_images=32, val_images=16,
        length="2ep", warmup="1ep", batches=(8, 16), seeds=1, lr=0.1, clippings=(0.04, 0.02),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: `lr` is the peak rate at a batch of 256, `clipping` is AGC's λ (0 in the other arms)."""

    arm: str
    batch: int
    seed: int
    lr: float
    clipping: float

    @property
    def name(self) -> str:
        clip = f"-agc{self.clipping:g}" if self.clipping else ""
        return f"{self.arm}-b{self.batch}-lr{self.lr:g}{clip}-s{self.seed}"


def cell(preset: Preset, arm: str, *, batch: int, seed: int, lr: float = 0.0, clipping: float = 0.0) -> Cell:
    """Return a cell with the preset's rate and λ unless others are given."""
    own = dict(zip(preset.batches, preset.clippings, strict=True))[batch]
    clipping = (clipping or own) if arm == "nf_agc" else 0.0
    return Cell(arm, batch, seed, lr or preset.lr, clipping)


def cells(preset: Preset) -> list[Cell]:
    """Return all cells of the table, ordered by seed, so that an interrupted experiment has complete tables."""
    return [
        cell(preset, arm, batch=batch, seed=seed)
        for seed in range(preset.seeds)
        for arm in ARMS
        for batch in preset.batches
    ]


def config_of(preset: Preset, cell: Cell, data: str) -> Config:
    """Return the config of a cell: [B] section 4.1 and appendix D, but shorter, smaller and with skip gains of 1."""
    samples, batch = preset.train_images, cell.batch
    steps = steps_of(preset.length, samples=samples, batch_size=batch)
    return Config(
        data=data,
        model=preset.model.removeprefix("nf_") if cell.arm == "bn" else preset.model,
        length=preset.length,
        seed=cell.seed,
        net=NetConfig(drop_rate=0.0, stochdepth_rate=0.0),
        input=InputConfig(batch_size=batch, workers=preset.workers),
        augment=AugmentConfig(crop_min=0.5),
        optim=OptimConfig(
            lr=cell.lr * batch / 256, weight_decay=1e-4, warmup=preset.warmup,
            clip="agc" if cell.arm == "nf_agc" else "off", clipping=cell.clipping or 0.01,
            ema_decay=0.0,  # the average equals the weights
        ),
        log=LogConfig(every=max(1, steps // 100), evaluate_every=preset.length, checkpoint_every="2ep"),
    )  # fmt: skip


class BalancedSubset:
    """`count` samples of a source, balanced over classes as far as possible, chosen by a fixed permutation."""

    def __init__(self, source: Source, count: int) -> None:
        if count > len(source):
            given = f"{count} images are requested and the data has {len(source)}"
            raise ValueError(problem(given, allowed=f"at most {len(source)}", fix="pass another --data"))
        self._source, self.classes = source, source.classes
        members: dict[int, list[int]] = {}
        for index in permutation(len(source), 0, "batch_size"):
            members.setdefault(source.label(int(index)), []).append(int(index))
        order = sorted((rank, label, i) for label, own in members.items() for rank, i in enumerate(own))
        self._indices = sorted(i for _, _, i in order[:count])

    def __len__(self) -> int:
        return len(self._indices)

    def label(self, index: int) -> int:
        return self._source.label(self._indices[index])

    def image(self, index: int, draw: int = 0) -> Image:
        return self._source.image(self._indices[index], draw)

    def name(self, index: int) -> str:
        return self._source.name(self._indices[index])


def packed(preset: Preset, data: str, folder: Path) -> str:
    """Pack the preset's part of `data` into two files in `folder`, unless they exist; return their `--data` value."""
    from normfree.data.sources.open import open_source
    from normfree.data.sources.packed import pack

    files = {part: folder / f"{part}.packed" for part in ("train", "val")}
    source_file = folder / "data.txt"  # the data that the files were made from
    if not source_file.exists():
        split = open_source(data)
        counts = {"train": preset.train_images, "val": preset.val_images}
        for part, path in files.items():
            pack(BalancedSubset(getattr(split, part), counts[part]), path, size=32)
        source_file.write_text(data + "\n", encoding="utf-8")
    packed_data = source_file.read_text(encoding="utf-8").strip()
    if packed_data != data:
        given = f"{folder} has cells trained on {packed_data}, not on {data}"
        raise ValueError(problem(given, allowed="one data set for each preset", fix=f"move {folder} away"))
    return f"packed:{files['train']},val={files['val']}"


def run_cell(preset: Preset, cell: Cell, *, data: str, folder: Path) -> int:
    """Train a cell in `folder`/NAME until it ends or receives a signal, and write cell.json there.

    A run whose gradients or outputs are no longer finite has diverged. This is a result, with the accuracy of guessing,
    and the cell is not repeated.

    Returns:
        The exit code.
    """
    import torch
    from rich.console import Console

    from normfree.data.sources.open import open_source
    from normfree.training.loop import train
    from normfree.training.stop import StoppedBySignal
    from normfree.training.trainer import DivergedError

    keep_freed_memory()
    out, start = folder / cell.name, time.process_time()
    before = read_cell(out)
    outcome: dict[str, Any] = {"status": "done"}
    code = 0
    try:
        result = train(config_of(preset, cell, data), out, console=Console(quiet=True))
        outcome["top1"] = result.weights.top1
    except StoppedBySignal as stopped:
        code, outcome = stopped.exit_code, {"status": "stopped"}
    except ValueError as error:
        if not isinstance(error, DivergedError) and "not finite" not in str(error):
            raise
        outcome = {"status": "diverged", "top1": 100 / len(open_source(data).classes), "message": str(error)}
    outcome["cpu_seconds"] = round(time.process_time() - start + before.get("cpu_seconds", 0.0), 1)
    outcome["threads"] = torch.get_num_threads()
    (out / "cell.json").write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    return code


def read_cell(out: Path) -> dict[str, Any]:
    """Return the content of a cell's cell.json; empty if there is none."""
    path = out / "cell.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_rows(folder: Path, wanted: Iterable[Cell]) -> list[dict[str, Any]]:
    """Return a row for every finished or diverged cell: the cell, its outcome, steps and mean clipped fraction."""
    from normfree.diagnose.metrics_file import read_metrics

    rows = []
    for cell in wanted:
        outcome = read_cell(folder / cell.name)
        if outcome.get("status") not in ("done", "diverged"):
            continue
        lines = read_metrics(folder / cell.name / "metrics.jsonl")
        clipped = [line["clipped"] for line in lines if "clipped" in line]
        rows.append(
            asdict(cell)
            | {"clipped": round(statistics.fmean(clipped), 4) if clipped else 0.0}
            | {"steps": max((line["step"] for line in lines), default=0)}
            | {key: value for key, value in outcome.items() if key != "message"}
        )
    return rows


def run_cells(wanted: Sequence[Cell], *, preset: str, data: str, runs: Path, jobs: int) -> None:
    """Run the unfinished cells, `jobs` at a time, each in its own process with one thread.

    Raises:
        KeyboardInterrupt: a signal was received; the running cells have been saved.
        ValueError: a cell failed for another reason than divergence.
    """
    folder, running = runs / preset, set[subprocess.Popen[bytes]]()
    left = [c for c in wanted if read_cell(folder / c.name).get("status") not in ("done", "diverged")]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} cells are finished, {len(left)} to run in {folder}/",
        flush=True,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def work(cell: Cell) -> None:
        args = ["--preset", preset, "--data", data, "--runs", str(runs), "--cell", json.dumps(asdict(cell))]
        # A new session, so that Ctrl-C reaches only this process, which then signals each cell once to save its state.
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.batch_size", *args], env=environment, start_new_session=True
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
        if code:
            raise ValueError(
                f"cell {cell.name} ended with exit code {code}; see {folder / cell.name}/log.txt"
            )
        outcome = read_cell(folder / cell.name)
        seconds = outcome["cpu_seconds"]
        print(f"{cell.name}: {outcome['status']}, top-1 {outcome['top1']:.2f} %, {seconds:.0f} s", flush=True)

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, cell) for cell in left]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise


def probe_cells(preset: Preset) -> list[Cell]:
    """Return the runs that determine the preset's rate (both networks at the middle batch size) and λ.

    They include, with seed 0, the λ of the largest batch size at the smaller ones.
    """
    middle = preset.batches[len(preset.batches) // 2]
    rates = [
        cell(preset, arm, batch=middle, seed=PROBE_SEED, lr=lr)
        for lr in preset.probe_lrs
        for arm in ("bn", "nf")
    ]
    tried = [
        cell(preset, "nf_agc", batch=batch, seed=PROBE_SEED, clipping=clipping)
        for batch, clippings in preset.probes.items()
        for clipping in clippings
    ]
    smallest = preset.clippings[-1]
    constant = [
        cell(preset, "nf_agc", batch=batch, seed=0, clipping=smallest)
        for batch, clipping in zip(preset.batches, preset.clippings, strict=True)
        if clipping != smallest and preset.probes
    ]
    return rates + tried + constant


def machine() -> str:
    """Return the number of cores and the name of the CPU, or the name of the GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def found(name: str, *, runs: Path, data: str) -> dict[str, Any]:
    """Return everything known about a preset's cells: the content of batch_size.json, from which the page is made."""
    import torch

    from normfree.data.sources.packed import PackedSource

    preset, variant = PRESETS[name], VARIANTS[PRESETS[name].model]
    shown = "FOLDER" if Path(data).exists() else data  # a local path is meaningless on other machines
    files = Path(PackedSource(runs / name / "train.packed", check=False).name(0)).suffix
    command = "python -m experiments.batch_size" + (f" --preset {name}" if name != "cpu" else "")
    others = [other for other in ("cpu", "gpu") if other != name and not (runs / other).exists()]
    return {
        "name": name, "command": command + (f" --data {shown}" if data != preset.data else ""),
        "data": f"{files} files of {shown}" if files else shown, "machine": machine(), "torch": str(torch.__version__),
        "remark": f"{preset.note} Not yet run: preset {' and '.join(others)}." if others else preset.note,
        "preset": asdict(preset),
        "network": {"depths": variant.depths, "widths": variant.widths, "skip_gain": variant.skip_gain},
        "total": len(cells(preset)),
        "cells": read_rows(runs / name, cells(preset)), "probe": read_rows(runs / name, probe_cells(preset)),
    }  # fmt: skip


def main() -> None:
    """Run the cells that are missing, and write the page."""
    VARIANTS.update(EXTRA_VARIANTS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", default="", help="any value of normfree's --data; default: the preset's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="cells that run at the same time, one thread each"
    )
    parser.add_argument("--probe", action="store_true", help="run the cells that determine rate and λ")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder for the cells' run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for table, plot and JSON")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    data, folder = arguments.data or preset.data, arguments.runs / arguments.preset
    if arguments.cell:
        packed_data = packed(preset, data, folder)
        sys.exit(run_cell(preset, Cell(**json.loads(arguments.cell)), data=packed_data, folder=folder))
    try:
        packed(preset, data, folder)
        wanted = probe_cells(preset) if arguments.probe else cells(preset)
        run_cells(wanted, preset=arguments.preset, data=data, runs=arguments.runs, jobs=arguments.jobs)
    except KeyboardInterrupt:
        sys.exit("stopped; run the same command again to continue")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(write(found(arguments.preset, runs=arguments.runs, data=data), arguments.results))


if __name__ == "__main__":
    main()
