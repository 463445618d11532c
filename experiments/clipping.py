"""Which λ? A sweep of adaptive gradient clipping, and what the samples of a run recommend.

    python -m experiments.clipping [--seeds 2] [--epochs 5]

A small NF-ResNet on the demo's emoji at 16 px, two batch sizes, no augmentation but flips, at rates where clipping has
work to do; about six minutes on one core. Every tenth step `ratio_quantiles` samples the ratios of gradient to weight
before clipping, and `recommended_clipping` makes a λ of them. Does it lie where the sweep is best? Writes
experiments/results/clipping.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from normfree import SGD, adaptive_clip_grad_, create_model, parameter_groups
from normfree.data.sources.open import open_source
from normfree.diagnose.gradients import ratio_quantiles, recommended_clipping

SIZE = 16
#: batch size -> peak rate; the published rule, 0.1 · batch / 256, would be 0.003 and 0.025
RATES = {8: 0.1, 64: 0.4}
CLIPPINGS = (0.0025, 0.01, 0.04, 0.16, 0.64)
#: A mean loss in nats that no guessing of nine classes has
DIVERGED = 10.0
RESULT = Path(__file__).parent / "results" / "clipping.md"

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """Mean loss of the last epoch, top-1 in percent, mean share of units clipped, and what its samples recommend."""

    loss: float
    top1: float
    clipped: float
    recommended: float


def pictures(source) -> tuple[Tensor, Tensor]:
    """Images N 3 S S in [-1, 1] and labels N."""
    shape = (SIZE, SIZE)
    arrays = [np.asarray(source.image(i).resize(shape, Image.Resampling.BOX)) for i in range(len(source))]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([source.label(i) for i in range(len(source))])


def rate(step: int, steps: int, warmup: int) -> float:
    """Warm-up and cosine, from 0 to 1 to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(data: Data, *, batch_size: int, clipping: float, epochs: int, seed: int) -> Run:
    (x, y), (x_val, y_val) = data
    torch.manual_seed(seed)
    net = create_model("nf_resnet_nano", num_classes=int(y.max()) + 1)
    groups = parameter_groups(net, weight_decay=5e-5, clipping=clipping)
    optimizer = SGD(groups, RATES[batch_size], momentum=0.9)
    each = len(x) // batch_size
    steps = epochs * each
    losses, shares, samples = [], [], []
    for step in range(steps):
        if step % each == 0:
            order, losses = torch.randperm(len(x)), []
        picked = order[step % each * batch_size :][:batch_size]
        images = torch.where(torch.rand(batch_size, 1, 1, 1) < 0.5, x[picked].flip(3), x[picked])
        optimizer.set_lr(RATES[batch_size] * rate(step, steps, steps // 10))
        loss = F.cross_entropy(net(images), y[picked], label_smoothing=0.1)
        loss.backward()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            samples.append(ratio_quantiles(optimizer.param_groups))
        shares.append(float(adaptive_clip_grad_(optimizer.param_groups)))
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        top1 = 100 * float((net(x_val).argmax(1) == y_val).float().mean())
    return Run(statistics.mean(losses), top1, statistics.mean(shares), recommended_clipping(samples))


def row(clipping: float, runs: list[Run]) -> str:
    """A line of the table: means over the seeds, without those that diverged."""
    sound = [r for r in runs if r.loss < DIVERGED]
    lost = f", {len(runs) - len(sound)} of {len(runs)} diverged" if len(sound) < len(runs) else ""
    if not sound:
        return f"| {clipping:g}{lost} | | | | |"
    clipped, loss, top1, recommended = (
        statistics.mean(getattr(r, what) for r in sound)
        for what in ("clipped", "loss", "top1", "recommended")
    )
    return f"| {clipping:g}{lost} | {100 * clipped:.1f} % | {loss:.3f} | {top1:.1f} | {recommended:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split = open_source("emoji")
    data = pictures(split.train), pictures(split.val)
    lines = [
        "# λ: what a sweep finds, and what the samples of a run recommend",
        "",
        f"`python -m experiments.clipping --seeds {arguments.seeds} --epochs {arguments.epochs}`: nf_resnet_nano on "
        f"{len(data[0][0])} emoji at {SIZE} px, {len(data[1][0])} to validate, mean of {arguments.seeds} seeds. The "
        "binomial standard error of one top-1 is about 2.5 points. Means leave out runs that "
        "diverged. The last column is what each run's own samples "
        "recommend (`recommended_clipping`).",
        "",
    ]
    for batch_size, peak in RATES.items():
        lines += [
            f"## Batch size {batch_size}, peak rate {peak}", "",
            "| λ | units clipped, mean over the run | training loss, last epoch | top-1 % | recommended λ |",
            "|---|---|---|---|---|",
        ]  # fmt: skip
        for clipping in CLIPPINGS:
            runs = [
                train(data, batch_size=batch_size, clipping=clipping, epochs=arguments.epochs, seed=seed)
                for seed in range(arguments.seeds)
            ]
            lines.append(row(clipping, runs))
            print(lines[-1], flush=True)
        lines.append("")
    RESULT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
