"""Seconds of training on CIFAR-10 in device memory until 94 % accuracy on the test set. Not yet measured.

A normalizer-free network with adaptive gradient clipping, and its batch-norm twin with the same recipe. The time
includes training steps only, not the evaluation after each epoch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Bench, Case
from benchmarks.networks import FORMATS
from benchmarks.summary import Comparison, spread, timing
from benchmarks.update_arms import our_update
from normfree import create_model, open_source
from normfree.data.source import ArraySource, Source
from normfree.models.net import Net
from normfree.models.shared_weights import standardized_once
from normfree.optim.schedule import schedule_multiplier
from normfree.optim.sgd import SGD

TARGET = 0.94
NAMES = ("resnet_mini", "nf_resnet_mini")  # the baseline first
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training set


@dataclass(frozen=True)
class Recipe:
    """Settings of SGD and AGC. A run that misses the target within `epochs` counts as failed; `shift` is in pixels."""

    batch_size: int = 512
    lr: float = 0.4
    clipping: float = 0.05
    weight_decay: float = 5e-4
    epochs: int = 30
    warmup: float = 0.15
    shift: int = 4
    smoothing: float = 0.1
    average: float = 0.99


@dataclass(frozen=True)
class Images:
    """Images N 3 32 32, normalized, and labels N, on the device."""

    images: Tensor
    labels: Tensor


def case(data: Path | None) -> Case:
    """Return the case; `data` is the folder with cifar-10-batches-py."""
    return Case("CIFAR-10 to 94 %", ("cifar10",), partial(measure, data))


def measure(data: Path | None, bench: Bench) -> Iterator[Comparison]:
    """Train both networks with one seed after another until the time is up.

    Missing data, and networks that stay below the target, are recorded in `bench.skipped`.
    """
    if data is None:
        bench.skipped.append("CIFAR-10 to 94 %: no data; pass its folder with --data FOLDER")
        return
    train, test = load(data, bench.device)
    runs: dict[str, list[float]] = {name: [] for name in NAMES}
    longest = 0.0
    for seed in range(bench.rounds + 1):  # the first is not counted
        if bench.left() < longest:
            break
        start = bench.clock()
        for name in random.Random(seed).sample(NAMES, len(NAMES)):
            seconds, accuracy = race(bench, name, train, test, Recipe(), seed)
            if accuracy < TARGET:
                bench.skipped.append(
                    f"{name}, seed {seed}: {100 * accuracy:.2f} % after {Recipe().epochs} epochs"
                )
            if seed:
                runs[name].append(seconds if accuracy >= TARGET else float("nan"))
        longest = max(longest, bench.clock() - start)
    yield from _comparison(runs)


def _comparison(runs: dict[str, list[float]]) -> Iterator[Comparison]:
    """Compare the seeds with which both networks reached the target, if there are at least two."""
    both = [pair for pair in zip(*runs.values(), strict=False) if all(s == s for s in pair)]
    if len(both) < 2:
        return
    rng, columns = random.Random(0), list(zip(*both, strict=True))
    timings = tuple(timing(name, own, columns[0], rng) for name, own in zip(runs, columns, strict=True))
    # The noise is the deviation of single seeds from the median of all.
    noise = spread([value / median(columns[0]) for value in columns[0]], rng)
    yield Comparison("CIFAR-10 to 94 %", NAMES[0], timings, noise, len(both), unit="s")


def load(data: Path, device: torch.device) -> tuple[Images, Images]:
    """Return training and test images.

    Raises:
        ValueError: the folder does not have CIFAR-10.
    """
    split = open_source(f"cifar10:root={data}")
    return _on(split.train, device), _on(split.val, device)


def _on(source: Source, device: torch.device) -> Images:
    """Return all images of a source, normalized, on the device."""
    assert isinstance(source, ArraySource)
    pixels = torch.stack([torch.from_numpy(source.pixels(i)) for i in range(len(source))])
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    images = pixels.to(device).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
    images = ((images - mean) / std).contiguous(memory_format=FORMATS["NHWC"])
    return Images(images, labels.to(device))


def race(
    bench: Bench, name: str, train: Images, test: Images, recipe: Recipe, seed: int
) -> tuple[float, float]:
    """Train one network; return seconds of training until the target or the end, and the accuracy at that time."""
    torch.manual_seed(seed)
    classes = int(train.labels.max()) + 1
    net = create_model(name, num_classes=classes, stochdepth_rate=0.0).to(bench.device)
    net = net.to(memory_format=FORMATS["NHWC"]).train()
    assert isinstance(net, Net)
    update = our_update(
        net, lr=recipe.lr, decay=recipe.average, clipping=recipe.clipping, weight_decay=recipe.weight_decay
    )
    optimizer = update.optimizer
    assert isinstance(optimizer, SGD)
    steps, spent, accuracy = len(train.labels) // recipe.batch_size, 0.0, 0.0
    for epoch in range(recipe.epochs):
        bench.wait()
        start = bench.clock()
        order = torch.randperm(len(train.labels), device=bench.device)
        for step in range(steps):
            progress = (epoch * steps + step) / (recipe.epochs * steps)
            optimizer.set_lr(
                recipe.lr * schedule_multiplier("warmup_cosine", progress, warmup=recipe.warmup, final=0.0)
            )
            picked = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            train_step(net, shifted(train.images[picked], recipe.shift), train.labels[picked], recipe)
            update.step()
        bench.wait()
        spent += bench.clock() - start
        accuracy = score(update.average, test)
        if accuracy >= TARGET:
            break
    return spent, accuracy


def shifted(images: Tensor, most: int) -> Tensor:
    """Shift each image by up to `most` pixels, with reflection at the border, and flip it with probability 1/2."""
    count, _, height, width = images.shape
    padded = F.pad(images, [most] * 4, mode="reflect")
    top, left = (torch.randint(2 * most + 1, (count, 1), device=images.device) for _ in range(2))
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    mirrored = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    each = torch.arange(count, device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def train_step(net: Net, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
    """Compute the gradients of one batch."""
    net.zero_grad(set_to_none=True)
    with standardized_once(net):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            logits = net(images)
        F.cross_entropy(logits.float(), labels, label_smoothing=recipe.smoothing).backward()


@torch.inference_mode()
def score(net: torch.nn.Module, test: Images) -> float:
    """Return the accuracy on the test set, from 0 to 1."""
    net.eval()
    parts = zip(test.images.split(1000), test.labels.split(1000), strict=True)
    right = sum((net(images).argmax(dim=1) == labels).sum() for images, labels in parts)
    return float(right) / len(test.labels)
