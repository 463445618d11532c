"""Published accuracy against the time of a training step on this machine: figure 1 of [B], arXiv 2102.06171.

    python -m experiments.run --only latency

A cell is one network in a process of its own, with all cores: images of noise at the published training size, forward
pass, cross entropy, backward pass, AGC for the normalizer-free networks, and SGD. Seeds are repetitions. The
accuracies are those of the papers, and were not measured here.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from experiments.cells import Cell, Result, Results, Setup
from experiments.pages import facts, markdown, verdict_lines, write
from experiments.verdicts import FAILS, HOLDS, UNDECIDED, Finding, spread
from normfree import SGD, adaptive_clip_grad_, create_model, parameter_groups
from normfree.device import run_device
from normfree.models.variants import VARIANTS
from normfree.training.allocator import keep_freed_memory
from normfree.uncertainty import mean_interval

STEPS = 3  # timed, after one that is not


@dataclass(frozen=True)
class Timed:
    """A network with its training size in pixels, the batch that is timed, and its published top-1 with the source."""

    px: int
    batch: int
    top1: float
    source: str


_TABLE, _FIGURE = "[B] table 3", "[B] figure 2a at batch 256, read off the figure"
NETWORKS: dict[str, Timed] = {
    "nfnet_f0": Timed(192, 8, 83.6, _TABLE),
    "bn_nfnet_f0": Timed(192, 8, 83.4, "[B] table 2"),
    "nfnet_f1": Timed(224, 4, 84.7, _TABLE),
    "nf_resnet50": Timed(224, 8, 76.6, _FIGURE),
    "torchvision resnet50": Timed(224, 8, 76.9, _FIGURE),
    "torchvision efficientnet_b0": Timed(224, 8, 77.1, _TABLE),
    "torchvision efficientnet_b3": Timed(300, 4, 81.6, _TABLE),
    "torchvision efficientnet_b7": Timed(600, 1, 84.7, _TABLE),
}
TINY = {
    "nf_resnet_nano": Timed(32, 2, math.nan, "none"),
    "torchvision resnet18": Timed(32, 2, math.nan, "none"),
}
PAIR = (
    "nfnet_f1",
    "torchvision efficientnet_b7",
)  # of equal published accuracy; [B]: 8.7 times as fast on TPUs
WITH_BN = ("nfnet_f0", "bn_nfnet_f0")
# Seconds of a cell on two cores of an AMD EPYC, from one step of each.
ESTIMATED = {"nfnet_f0": 16, "nfnet_f1": 25, "torchvision efficientnet_b7": 45}


class Latency:
    """The experiment; see `experiments.cells.Experiment`."""

    name, title, alone = "latency", "Published accuracy against training time on this machine", True

    def __init__(self, preset: str) -> None:
        self.networks = TINY if preset == "tiny" else NETWORKS
        self.seeds, self.factor = (2 if preset == "tiny" else 3), (8 if preset == "gpu" else 1)

    def cells(self, done: Results) -> list[Cell]:
        """Return all cells; nothing is chosen."""
        return self.all_cells()

    def all_cells(self) -> list[Cell]:
        """Return a cell for each network and repetition, so that the networks alternate."""
        return [
            Cell.of(self.name, name, seed=seed, settings={"px": one.px, "batch": one.batch * self.factor})
            for seed in range(self.seeds)
            for name, one in self.networks.items()
        ]

    def minutes(self, cell: Cell) -> float:
        """Return an estimate in minutes of all cores."""
        return ESTIMATED.get(cell.arm, 12) / 60

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Time steps; the result has the median of seconds for each image."""
        keep_freed_memory()
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(cell.seed)
        device, px, batch = run_device(setup.device), cell.options["px"], cell.options["batch"]
        ours = cell.arm in VARIANTS
        clips = ours and VARIANTS[cell.arm].norm == "none"
        name = cell.arm.removeprefix("torchvision ")
        net: nn.Module = create_model(name, stochdepth_rate=0.0) if ours else torchvision_model(name)
        net = net.to(device).to(memory_format=torch.channels_last).train()
        optimizer = SGD(parameter_groups(net, weight_decay=2e-5, clipping=0.01), 0.01)
        images = torch.randn(batch, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)
        labels = torch.arange(batch, device=device)
        took = []
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            F.cross_entropy(net(images), labels).backward()
            if clips:
                adaptive_clip_grad_(optimizer.param_groups, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append((time.perf_counter() - start) / batch)
        parameters = sum(p.numel() for p in net.parameters())
        return {"status": "done", "seconds_per_image": median(took[1:]), "parameters": parameters}

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Write page and JSON."""
        if len(done) < len(self.all_cells()):
            return f"{self.title}: {len(done)} of {len(self.all_cells())} cells are finished.\n"
        cells = [
            {"arm": cell.arm, "seed": cell.seed, **cell.options, **result} for cell, result in done.items()
        ]
        found = {
            **facts(self, setup, done),
            "cells": cells,
            "cores": os.cpu_count(),
            "findings": [finding.as_json() for finding in findings(cells)],
        }
        return write(found, self.page(found), results)

    def page(self, found: Mapping[str, Any]) -> str:
        """Return the page, from what the JSON holds."""
        times = _times(found["cells"])
        base = times.get(PAIR[0])
        rows = []
        for name, one in self.networks.items():
            own = [cell for cell in found["cells"] if cell["arm"] == name]
            against = f"{fmean(times[name]) / fmean(base):.2f}" if base else "–"
            rows.append(
                [
                    name,
                    str(one.px),
                    str(own[0]["batch"]),
                    f"{own[0]['parameters'] / 1e6:.1f} M",
                    spread([1000 * t for t in times[name]]),
                    against,
                    f"{one.top1:g} ({one.source})",
                ]
            )
        head = [
            "network",
            "px",
            "batch",
            "parameters",
            "ms per image, this machine",
            "relative to F1",
            "top-1 %, published",
        ]
        lines = [
            f"# {self.title}",
            "",
            "A training step on noise at the published training size, without stochastic depth, with this package's "
            "kernels for its own networks and PyTorch's for the others. Batches fit in 24 GB, so EfficientNet-B7 has "
            "one image and NFNet-F1 four. The accuracies are those of the papers; "
            f"nothing of them was measured here. Mean ± standard deviation of {self.seeds} processes, "
            f"{found['cores']} cores each.",
            "",
            *verdict_lines(found),
            "",
            *markdown(head, rows),
            "",
            "The rule: " + " ".join((findings.__doc__ or "").split()),
            "",
            f"`{found['command']}` on {found['machine']}; torch {found['torch']}.",
        ]
        return "\n".join(lines) + "\n"


def torchvision_model(name: str) -> nn.Module:
    """Return a network of torchvision with random weights."""
    import torchvision

    # As of our networks, no block is skipped: ours save the time of a skipped block, torchvision's do not.
    options = {"stochastic_depth_prob": 0.0} if name.startswith("efficientnet") else {}
    net: nn.Module = torchvision.models.get_model(name, **options)
    return net


def _times(cells: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the seconds for each image by network, in the order of the seeds."""
    found: dict[str, list[float]] = {}
    for cell in sorted(cells, key=lambda one: one["seed"]):
        found.setdefault(cell["arm"], []).append(cell["seconds_per_image"])
    return found


def findings(cells: list[dict[str, Any]]) -> list[Finding]:
    """NFNet-F1 is faster than EfficientNet-B7, of equal published accuracy, and NFNet-F0 than its batch-norm twin, if
    the 95 % interval of the logarithm of the ratio of their times, paired by repetition, lies above 0."""
    found = []
    for claim, pair, published in (("f1-b7", PAIR, "8.7"), ("bn-time", WITH_BN, "1.16 to 1.63")):
        ours, theirs = ({c["seed"]: c["seconds_per_image"] for c in cells if c["arm"] == arm} for arm in pair)
        if ours.keys() != theirs.keys() or len(ours) < 2:
            continue
        logs = [math.log(theirs[seed] / own) for seed, own in ours.items()]
        interval = mean_interval(logs)
        ratio, (low, high) = math.exp(fmean(logs)), (math.exp(end) for end in interval)
        verdict = UNDECIDED if 0 in interval else HOLDS if interval.low > 0 else FAILS
        shown = f"{pair[1]} takes {ratio:.2f} ({low:.2f} to {high:.2f}) times as long as {pair[0]}"
        kernels = " (in it, this package's kernels)" if claim == "f1-b7" else ""
        found.append(Finding(claim, verdict, f"{shown}{kernels}; the paper: {published} on TPUs"))
    return found
