"""Signal propagation plots of the first paper for seven networks, with the predictions.

    python -m experiments.signal_propagation [--size 224] [--batch 16]

Gaussian noise of unit variance passes through networks with random weights: batch norm before and after ReLU,
NF-ResNet-50 with and without weight standardization (skip gains of 1), NFNet-F0 unchanged and with strided shortcuts,
and torchvision's ResNet-50. Takes one thread, about a minute and 1.5 GB. Writes
experiments/results/signal_propagation.md and two plots in docs/. [A] is arXiv 2101.08692.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from normfree import WSConv2d, create_model, signal_propagation
from normfree.diagnose.network_figures import draw_signal
from normfree.diagnose.propagation import PredictedSignal, SignalReport
from normfree.models.activations import GAINS
from normfree.models.net import Block

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "experiments" / "results" / "signal_propagation.md"
PLOTS = {"norm": ROOT / "docs" / "spp_batch_norm.png", "free": ROOT / "docs" / "spp_normalizer_free.png"}


def relu_first() -> nn.Module:
    """Return ResNet-50 with batch norm between ReLU and convolution, and weights of variance 1 / fan-in to match."""
    net = create_model("resnet50")
    for block in net.modules():
        if isinstance(block, Block):
            block.act = nn.Identity()
            for name in ("norm0", "norm1", "norm2"):
                block.set_submodule(name, nn.Sequential(nn.ReLU(), block.get_submodule(name)))
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    return net


def unstandardized() -> nn.Module:
    """Return NF-ResNet-50 with plain He-normal weights and no γ, the starting point of [A].

    Weights have variance 2 / fan-in, except in the stem, whose input has passed no ReLU: 1 / fan-in.
    """
    net = create_model("nf_resnet50", skip_gain=1.0)
    for name, conv in net.named_modules():
        if isinstance(conv, WSConv2d):
            stem = name.startswith("stem")
            nn.init.normal_(conv.weight, std=((1 if stem else 2) / conv.weight[0].numel()) ** 0.5)
            beta = 1.0 if stem else conv.input_scale / GAINS["relu"]
            conv.shared_weight = conv.weight.detach() * beta  # used in place of the standardized weight
    return net


def torchvision_resnet50() -> nn.Module:
    """Return torchvision's ResNet-50 with random weights."""
    from torchvision.models import resnet50

    return resnet50(weights=None)


def no_prediction(_k: int) -> None:
    """Return None: there is no prediction for block k."""


# Name -> (network, prediction for block k of a stage; None: as in the report).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], PredictedSignal | None] | None]] = {
    "ResNet-50, BN-ReLU-conv": (lambda: create_model("resnet50"), None),
    "ResNet-50, ReLU-BN-conv": (relu_first, lambda k: PredictedSignal(0.0, k + 1.0, 1.0)),
    "NF-ResNet-50": (lambda: create_model("nf_resnet50", skip_gain=1.0), None),
    "NF-ResNet-50 without weight standardization": (unstandardized, no_prediction),
    "NFNet-F0": (lambda: create_model("nfnet_f0", skip_gain=1.0), None),
    "NFNet-F0, strided shortcuts": (
        lambda: create_model("nfnet_f0", skip_gain=1.0, shortcut="strided"),
        None,
    ),
    "torchvision's resnet50": (torchvision_resnet50, no_prediction),
}


def measure(name: str, *, size: int, batch: int) -> SignalReport:
    """Return the report of one network, with its predictions."""
    make, predict = NETWORKS[name]
    torch.manual_seed(0)
    net = make()
    report = signal_propagation(net, torch.randn(batch, 3, size, size))
    if predict is None:
        return report
    return replace(report, blocks=tuple(replace(b, predicted=predict(b.index)) for b in report.blocks))


def table(name: str, report: SignalReport) -> list[str]:
    """Return measured and predicted values of each stage's last block, and the largest deviation of any variance."""
    lines = [
        f"## {name}", "",
        "| stage | blocks | variance after the last | branch variance, mean | squared mean after the last | cosine |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for stage in report.stages:
        last = stage[-1]
        branch = sum(b.branch_variance or math.nan for b in stage) / len(stage)
        p = last.predicted
        cells = (
            [f"{last.variance:.3f}", f"{branch:.3f}", f"{last.squared_mean:.3f}"] if p is None else
            [f"{last.variance:.3f} ({p.variance:.3f})", f"{branch:.3f} ({p.branch_variance:.3f})",
             f"{last.squared_mean:.3f} ({p.squared_mean:.3f})"]
        )  # fmt: skip
        lines.append(f"| {last.stage} | {len(stage)} | {' | '.join(cells)} | {last.cosine:.3f} |")
    off = [abs(b.variance / b.predicted.variance - 1) for b in report.blocks if b.predicted]
    if off:
        lines += ["", f"Largest deviation of a block's variance from the prediction: {100 * max(off):.1f} %."]
    return [*lines, ""]


def main() -> None:
    """Measure all networks, and write the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reports = {}
    for name in NETWORKS:
        start = time.monotonic()
        reports[name] = measure(name, size=arguments.size, batch=arguments.batch)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    lines = [
        "# Signal propagation at initialization",
        "",
        f"`python -m experiments.signal_propagation --size {arguments.size} --batch {arguments.batch}`: "
        f"{arguments.batch} images of N(0, 1) at {arguments.size} px, random weights of seed 0, "
        "predictions in parentheses.",
        "",
    ]
    for name, report in reports.items():
        lines += table(name, report)
    RESULT.write_text("\n".join(lines), encoding="utf-8")
    for kind, path in PLOTS.items():
        draw_signal({n: r for n, r in reports.items() if n.startswith("NF") == (kind == "free")}, path)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
