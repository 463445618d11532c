"""Which λ? A sweep of adaptive gradient clipping, compared with the recommendation from samples of a run.

    python -m experiments.clipping [--seeds 2] [--epochs 5]

A small NF-ResNet on the demo's emoji at 16 px, two batch sizes, no augmentation except flips, at rates high enough for
clipping to matter; takes about six minutes on one core. Every tenth step `ratio_quantiles` samples the ratios of
gradient to weight norm before clipping, and `recommended_clipping` computes a λ from the samples. The page shows
whether it agrees with the best λ of the sweep. Writes experiments/results/clipping.md.
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

from normfree import SGD, adaptive_clip_grad_, create_model, open_source, parameter_groups
from normfree.data.source import Source
from normfree.diagnose.gradients import ratio_quantiles, recommended_clipping

SIZE = 16
# Batch size -> peak rate. The published rule, 0.1 · batch / 256, would give 0.003 and 0.025.
RATES = {8: 0.1, 64: 0.4}
CLIPPINGS = (0.0025, 0.01, 0.04, 0.16, 0.64)
# A mean loss in nats above that of guessing one of nine classes.
DIVERGED = 10.0
RESULT = Path(__file__).parent / "results" / "clipping.md"

Data = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Run:
    """Mean loss of the last epoch, top-1 in percent, mean fraction of units clipped, and the recommended λ."""

    loss: float
    top1: float
    clipped: float
    recommended: float


def load_images(source: Source) -> tuple[Tensor, Tensor]:
    """Return images N 3 S S in [-1, 1] and labels N."""
    shape = (SIZE, SIZE)
    arrays = [np.asarray(source.image(i).resize(shape, Image.Resampling.BOX)) for i in range(len(source))]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([source.label(i) for i in range(len(source))])


def rate(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the peak rate: linear warm-up from 0 to 1, then a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def train(data: Data, *, batch_size: int, clipping: float, epochs: int, seed: int) -> Run:
    """Train one network from random weights and evaluate it."""
    (x, y), (x_val, y_val) = data
    torch.manual_seed(seed)
    net = create_model("nf_resnet_nano", num_classes=int(y.max()) + 1)
    groups = parameter_groups(net, weight_decay=5e-5, clipping=clipping)
    optimizer = SGD(groups, RATES[batch_size], momentum=0.9)
    each = len(x) // batch_size
    steps = epochs * each
    losses, fractions, samples = [], [], []
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
        fractions.append(float(adaptive_clip_grad_(optimizer.param_groups)))
        optimizer.step()
        optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        top1 = 100 * float((net(x_val).argmax(1) == y_val).float().mean())
    return Run(statistics.mean(losses), top1, statistics.mean(fractions), recommended_clipping(samples))


def table_line(clipping: float, runs: list[Run]) -> str:
    """Return a line of the table: means over the seeds that did not diverge."""
    converged = [r for r in runs if r.loss < DIVERGED]
    lost = f", {len(runs) - len(converged)} of {len(runs)} diverged" if len(converged) < len(runs) else ""
    if not converged:
        return f"| {clipping:g}{lost} | | | | |"
    clipped, loss, top1, recommended = (
        statistics.mean(getattr(r, field) for r in converged)
        for field in ("clipped", "loss", "top1", "recommended")
    )
    return f"| {clipping:g}{lost} | {100 * clipped:.1f} % | {loss:.3f} | {top1:.1f} | {recommended:.3f} |"


def main() -> None:
    """Run the sweep and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split = open_source("emoji")
    data = load_images(split.train), load_images(split.val)
    lines = [
        "# λ: best value of a sweep, and recommendation from samples of a run",
        "",
        f"`python -m experiments.clipping --seeds {arguments.seeds} --epochs {arguments.epochs}`: nf_resnet_nano on "
        f"{len(data[0][0])} emoji at {SIZE} px, {len(data[1][0])} for validation, mean of {arguments.seeds} "
        "seeds. The binomial standard error of one top-1 is about 2.5 points. Means exclude runs that diverged. The "
        "last column is the λ recommended by each run's own samples (`recommended_clipping`).",
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
            lines.append(table_line(clipping, runs))
            print(lines[-1], flush=True)
        lines.append("")
    RESULT.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
