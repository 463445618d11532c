"""Cost as work grows: time and memory of a step against batch, image size and processes; the loader against workers."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, GateError, compare
from benchmarks.memory import allocated
from benchmarks.networks import batch, copied, forward_backward
from benchmarks.summary import Comparison, Timing, spread, timing
from benchmarks.update_arms import our_update
from normfree import create_model, open_source
from normfree.data.loader import train_batches
from normfree.data.source import Source
from normfree.data.transforms.train import train_transform
from normfree.models.net import Net

ABOUT = (
    "How time and memory grow. A step is forward, backward, clipping, SGD and average, of nf_resnet50 in float32; "
    "`peak MiB` is the peak of the bytes that PyTorch allocates for the forward and backward pass. Against the batch "
    "at 96 px, against the pixels of an image at batch 8; the line is fitted to relative errors, and `time / line` "
    "shows where it is left. Processes share a batch of 16 through the exchange of `torchrun`, with one thread each; "
    "the line is that of perfect sharing, and memory is the peak of the resident set of one process. The loader "
    "reads JPEG files of 500 x 375 pixels, decodes, crops to 224 px; the line divides the time without workers by "
    "their number. The gate requires that the loss of a batch is the mean of the losses of its images, and that all "
    "numbers of processes and workers give the same losses and the same batches."
)
NAME = "nf_resnet50"
BATCHES, BATCH_SIZE_PX = (1, 2, 4, 8, 16, 32), 96
SIZES, SIZE_BATCH = (64, 96, 128, 160, 192, 224), 8
PROCESSES, SHARED_BATCH = (1, 2), 16
WORKERS, LOADED_BATCHES, LOADER_BATCH, CROP = (0, 1, 2, 3, 4), 30, 32, 224
ROUNDS = 5  # of processes and loaders, which are started again in each
# Relative distance from a line that counts as leaving it: several times the usual noise.
LEAVES = 0.1
TOLERANCE = 1e-5
ROOT = Path(__file__).parents[1]


def cases(device: torch.device) -> list[Case]:
    """Return the four cases."""
    return [
        batch_case(NAME, BATCH_SIZE_PX, BATCHES),
        size_case(NAME, SIZES, SIZE_BATCH),
        process_case(NAME, BATCH_SIZE_PX, PROCESSES, SHARED_BATCH),
        loader_case(WORKERS, LOADED_BATCHES, LOADER_BATCH),
    ]


def batch_case(name: str, size: int, batches: Sequence[int]) -> Case:
    """Return the case of a growing batch."""
    points = [(size, images) for images in batches]
    title = f"{name}, step against batch, {size} px"
    return Case(title, ("batch",), partial(_steps, title, name, points, list(batches), "image"))


def size_case(name: str, sizes: Sequence[int], images: int) -> Case:
    """Return the case of growing images."""
    points = [(size, images) for size in sizes]
    title = f"{name}, step against image size, batch {images}"
    pixels = [images * size * size / 1e3 for size in sizes]
    return Case(title, ("size",), partial(_steps, title, name, points, pixels, "1000 pixels"))


def _steps(
    title: str,
    name: str,
    points: Sequence[tuple[int, int]],
    amounts: Sequence[float],
    unit: str,
    bench: Bench,
) -> Iterator[Comparison]:
    """Yield the comparison of steps at (image size, batch); the line is a function of `amounts`, in `unit`."""
    # Logits of usual size, so that the gate sees them.
    net = create_model(name, drop_rate=0.0, stochdepth_rate=0.0, skip_gain=1.0, classifier_std=0.1).train()
    assert isinstance(net, Net)
    arms = [_step(bench, net, size, images) for size, images in points]
    (found,) = compare(bench, title, arms, gradients=True)
    yield _with_line(found, amounts, unit)


def _step(bench: Bench, net: Net, size: int, images: int) -> Arm:
    """Return the arm of a step at one size."""
    own = copied(net, "NHWC", bench.device)
    assert isinstance(own, Net)
    x, y = batch(size, images, bench.device, "NHWC")
    update = our_update(own)

    def run() -> Tensor:
        loss = forward_backward(own, x, y)
        update.step()
        return loss

    return Arm(
        f"{size} px, batch {images}", run, distance=partial(mixing, copied(net, "NHWC", bench.device), x, y),
        allowed=TOLERANCE, alike=False, facts={"peak_mib": allocated(own, size, images, "NHWC") / 2**20},
    )  # fmt: skip


@torch.no_grad()
def mixing(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the relative distance of the loss of a batch from the mean of the losses of its images."""
    whole = F.cross_entropy(net(x), y)
    each = torch.stack(
        [F.cross_entropy(net(image[None]), label[None]) for image, label in zip(x, y, strict=True)]
    )
    return float((whole - each.mean()).abs() / whole)


# --- lines --------------------------------------------------------------------------------------------------------


def fitted_line(amounts: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return (fixed, slope) of the line with the least squares of relative errors."""
    columns = np.stack([1 / np.asarray(values), np.asarray(amounts) / np.asarray(values)], axis=1)
    fixed, slope = np.linalg.lstsq(columns, np.ones(len(values)), rcond=None)[0]
    return float(fixed), float(slope)


def _with_line(found: Comparison, amounts: Sequence[float], unit: str) -> Comparison:
    """Add to each arm its time relative to the fitted line, and the lines of time and memory as notes."""
    times = [t.median for t in found.timings]
    fixed, slope = fitted_line(amounts, times)
    ratios = [time / (fixed + slope * n) for time, n in zip(times, amounts, strict=True)]
    notes = [f"time: {fixed:.0f} ms + {slope:.3g} ms per {unit}; {_leaving(found.timings, ratios)}"]
    peaks = [t.facts["peak_mib"] for t in found.timings]
    fixed, slope = fitted_line(amounts, peaks)
    memory = [peak / (fixed + slope * n) for peak, n in zip(peaks, amounts, strict=True)]
    notes.append(f"memory: {fixed:.0f} MiB + {slope:.3g} MiB per {unit}; {_leaving(found.timings, memory)}")
    notes = [f"{found.case}, {note}" for note in notes]
    return _with_ratios(found, ratios, notes)


def _with_ratios(found: Comparison, ratios: Sequence[float], notes: Sequence[str]) -> Comparison:
    timings = tuple(
        replace(t, facts={**t.facts, "of_line": ratio})
        for t, ratio in zip(found.timings, ratios, strict=True)
    )
    return replace(found, timings=timings, notes=tuple(notes))


def _leaving(timings: Sequence[Timing], ratios: Sequence[float]) -> str:
    """Return which arms are off the line, as text."""
    off = [
        f"{t.arm} by {ratio - 1:+.0%}"
        for t, ratio in zip(timings, ratios, strict=True)
        if abs(ratio - 1) > LEAVES
    ]
    return (
        f"off by more than {LEAVES:.0%}: {', '.join(off)}"
        if off
        else f"nowhere off by more than {LEAVES:.0%}"
    )


# --- processes ----------------------------------------------------------------------------------------------------


def process_case(name: str, size: int, processes: Sequence[int], images: int, *, steps: int = 8) -> Case:
    """Return the case of several processes that share a batch."""
    title = f"{name}, step against processes, {size} px, batch {images} in all"
    return Case(
        title, ("processes",), partial(_processes, title, name, size, tuple(processes), images, steps)
    )


def _processes(
    title: str, name: str, size: int, processes: Sequence[int], images: int, steps: int, bench: Bench
) -> Iterator[Comparison]:
    """Yield the comparison of several numbers of processes; each visit starts all of them again."""
    peaks: dict[int, list[float]] = {count: [] for count in processes}

    def visit(count: int) -> tuple[float, Tensor]:
        found = in_processes(count, name, size, images, steps)
        peaks[count].append(found["peak_mib"])
        return found["ms"], torch.tensor(found["loss"])

    names = {count: f"{count} process{'es' * (count > 1)} of 1 thread" for count in processes}
    found = _visited(bench, title, names, visit)
    timings = [
        replace(t, facts={"peak_mib": median(peaks[count])})
        for t, count in zip(found.timings, processes, strict=True)
    ]
    ratios = [t.median * count / timings[0].median for t, count in zip(timings, processes, strict=True)]
    found = replace(found, timings=tuple(timings))
    yield _with_ratios(found, ratios, [f"{title}: {_leaving(timings, ratios)}"])


def in_processes(count: int, name: str, size: int, images: int, steps: int) -> dict[str, float]:
    """Start `count` processes of `growth_worker`; return what the first one prints."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    )
    arguments = ["-m", "benchmarks.growth_worker", name, str(size), str(images), str(steps)]
    done = subprocess.run(
        [sys.executable, *launch, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {key: float(value) for key, value in json.loads(done.stdout.strip().splitlines()[-1]).items()}


# --- loader -------------------------------------------------------------------------------------------------------


def loader_case(workers: Sequence[int], batches: int, images: int) -> Case:
    """Return the case of a growing number of workers that load `batches` of so many `images`."""
    title = f"loader against workers, {batches} batches of {images} JPEGs"
    return Case(title, ("loader",), partial(_loader, title, tuple(workers), batches, images))


def _loader(
    title: str, workers: Sequence[int], batches: int, images: int, bench: Bench
) -> Iterator[Comparison]:
    """Yield the comparison. The line is the time without workers, divided by their number."""
    from benchmarks.photographs import jpegs

    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(jpegs(2 * images)):
            path = Path(folder, str(number % 2), f"{number}.jpg")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        source = open_source(folder, val_fraction=0.0).train
        names = {count: f"{count} workers" for count in workers}
        found = _visited(bench, title, names, partial(_load, source, batches, images))
    timings = tuple(replace(t, images=batches * images) for t in found.timings)
    ratios = [t.median * max(n, 1) / timings[0].median for t, n in zip(timings, workers, strict=True)]
    yield _with_ratios(replace(found, timings=timings), ratios, [f"{title}: {_leaving(timings, ratios)}"])


def _load(source: Source, batches: int, images: int, workers: int) -> tuple[float, Tensor]:
    """Return the milliseconds of some batches after the first two, and the means of their images."""
    stream = train_batches(
        source,
        train_transform(image_size=CROP),
        batch_size=images,
        seed=0,
        num_steps=batches + 2,
        workers=workers,
    )
    with contextlib.closing(stream):
        for _ in range(2):  # starts the workers
            next(stream)
        start = time.perf_counter()
        found = [batch.images.float().mean() for batch in stream]
        return 1e3 * (time.perf_counter() - start), torch.stack(found)


def _visited(
    bench: Bench, title: str, names: Mapping[int, str], visit: Callable[[int], tuple[float, Tensor]]
) -> Comparison:
    """Return the comparison of visits that measure themselves: each key once in a round, the first one twice.

    Raises:
        GateError: the results of two visits differ.
    """
    rng, first, wanted = random.Random(0), next(iter(names)), None
    times: dict[int, list[float]] = {key: [] for key in names}
    again: list[float] = []
    for _ in range(min(bench.rounds, ROUNDS)):
        for key, kept in rng.sample([*times.items(), (first, again)], len(times) + 1):
            ms, result = visit(key)
            kept.append(ms)
            wanted = result if wanted is None else wanted
            if not torch.allclose(result, wanted, rtol=TOLERANCE):
                raise GateError(f"{title}: {names[key]} give another result; no time is reported")
        if bench.left() < 0:
            break
    timings = tuple(timing(names[key], own, times[first], rng) for key, own in times.items())
    noise = spread([a / b for a, b in zip(times[first], again, strict=True)], rng)
    return Comparison(title, names[first], timings, noise, len(again))
