"""What batch statistics leak in contrastive learning: SimCLR on virtual devices, with batch norm and without.

    python -m experiments.contrastive [--preset cpu|gpu] [--data DATA] [--seeds N] [--jobs N]
    python -m experiments.contrastive --probe        # the runs that determine the rates

A batch of 256 images is spread over 32 virtual devices; both views of an image are on one device. A network with batch
norm and statistics per device can recognize the other view by the statistics that they share, instead of by its
content. Arms: `nf`, the normalizer-free network with AGC; `bn_device`, its batch-norm twin with statistics per device;
`bn_shuffled`, the same with the second views distributed over the devices at random (the remedy of MoCo, arXiv
1911.05722, section 3.3); `bn_global`, with statistics of the whole batch (synchronized batch norm).

Every arm trains on T images with its own learning rate, chosen on V other training images with a seed of its own, and
is scored on test images that chose nothing. A cell is one arm, rate and seed; its result is a file in
runs/contrastive/, so an interrupted experiment continues. `--rate R` gives all arms one rate instead. Writes
experiments/results/contrastive.md and .json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.batch_size import EXTRA_VARIANTS, BalancedSubset
from normfree import SGD, VARIANTS, clip_grad_, create_model, nt_xent, open_source, parameter_groups
from normfree.data.loader import train_batches
from normfree.data.seeds import key, permutation
from normfree.data.source import Source
from normfree.data.subset import Subset
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import train_transform
from normfree.device import run_device
from normfree.embeddings import embed_source, knn_probabilities, linear_probe
from normfree.files import atomic_write_text
from normfree.models.net import Net
from normfree.optim.schedule import schedule_multiplier
from normfree.preprocessing import Preprocessing
from normfree.training.allocator import keep_freed_memory
from normfree.training.projection import project_
from normfree.uncertainty import PairedComparison, compare_paired, mean_interval

RUNS, RESULTS = Path("runs/contrastive"), Path(__file__).parent / "results"
ARMS = ("nf", "bn_device", "bn_shuffled", "bn_global")
PROBE_SEED = 100  # chooses rates, and is in no table
MARGIN = 1.0  # points of linear probe that do not matter, fixed before the runs
LEAK = 0.1  # nats; a smaller leak is not called one


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of the experiment. `rates` are tried; `chosen` are those of the arms, in the order of ARMS."""

    data: str = "cifar10"
    model: str = "nf_resnet_thin"
    image_size: int = 32
    train_images: int = 8_000
    choice_images: int = 2_000
    test_images: int = 5_000
    batch: int = 256
    devices: int = 32
    epochs: float = 8
    temperature: float = 0.2
    dim: int = 64
    clipping: float = 0.08
    rates: tuple[float, ...] = (0.1, 0.3, 0.9)
    seeds: int = 3
    workers: int = 0


PRESETS = {
    "cpu": Preset(),
    "gpu": Preset(
        model="nf_resnet_mini", train_images=45_000, choice_images=5_000, test_images=10_000, batch=1024, devices=32,
        epochs=200, dim=128, seeds=5, workers=12,
    ),
    "tiny": Preset(
        data="synthetic:classes=3,size=16,train=48,val=24", image_size=16, train_images=32, choice_images=16,
        test_images=24, batch=8, devices=4, epochs=1, rates=(0.1,), seeds=1,
    ),
}  # fmt: skip


class VirtualBatchNorm(nn.Module):
    """Batch norm with the statistics of each of `devices` equal, consecutive parts of the batch.

    In evaluation it uses running statistics, averaged over the devices, as distributed training does.
    """

    def __init__(self, norm: nn.BatchNorm2d, devices: int) -> None:
        super().__init__()
        self.norm, self.devices = norm, devices
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).repeat(devices))

    def forward(self, x: Tensor) -> Tensor:
        g, (count, channels, height, width) = self.devices, x.shape
        if not self.training:
            mean, var = (b.view(g, channels).mean(dim=0) for b in (self.running_mean, self.running_var))
            return F.batch_norm(x, mean, var, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        parts = x.reshape(g, count // g, channels, height, width).transpose(0, 1)
        normed = F.batch_norm(
            parts.reshape(count // g, g * channels, height, width), self.running_mean, self.running_var,
            self.norm.weight.repeat(g), self.norm.bias.repeat(g), training=True, momentum=0.1, eps=self.norm.eps,
        )  # fmt: skip
        return normed.view(count // g, g, channels, height, width).transpose(0, 1).reshape(x.shape)


def network(preset: Preset, arm: str, seed: int) -> Net:
    """Return the network of an arm with its projection; equal seeds give all arms the same convolutions."""
    VARIANTS.update(EXTRA_VARIANTS)  # type: ignore[attr-defined]
    torch.manual_seed(key(seed, "init"))
    name = preset.model if arm == "nf" else preset.model.removeprefix("nf_")
    net = create_model(name, num_classes=0, skip_gain=1.0, stochdepth_rate=0.0, drop_rate=0.0)
    assert isinstance(net, Net)
    project_(net, preset.dim)
    devices = 1 if arm == "bn_global" else preset.devices
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, VirtualBatchNorm(child, devices))
    return net


def loss_of(net: nn.Module, views: Tensor, *, temperature: float, shuffle: int | None = None) -> Tensor:
    """Return NT-Xent of a batch of views; the two views of an image are neighbors, so they share a device.

    Args:
        shuffle: seed of a permutation of the second views over the devices; None leaves them with the first ones.
    """
    first, second = views[0::2], views[1::2]
    order = torch.arange(len(second))
    if shuffle is not None:
        order = torch.from_numpy(permutation(len(second), shuffle, "shuffle", 0))
    placed = torch.stack([first, second[order.to(views.device)]], dim=1).flatten(0, 1)
    embeddings = net(placed.contiguous(memory_format=torch.channels_last))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(views.device)
    return nt_xent(embeddings[0::2], embeddings[1::2][back], temperature=temperature)


def parts(preset: Preset, data: str) -> dict[str, Source]:
    """Return the sources T ("train"), V ("choice") and the test images."""
    split = open_source(data)
    both = BalancedSubset(split.train, preset.train_images + preset.choice_images)
    order = permutation(len(both), 0, "contrastive", 0)
    return {
        "train": Subset(both, sorted(order[: preset.train_images])),
        "choice": Subset(both, sorted(order[preset.train_images :])),
        "test": BalancedSubset(split.val, preset.test_images),
    }


def views_of(preset: Preset, source: Source, *, seed: int, steps: int) -> Any:
    """Return batches of views: random crops, flips and SimCLR's colors for small images."""
    transform = train_transform(image_size=preset.image_size, crop_min=0.2, randaugment="simclr:0.5")
    return train_batches(
        source, transform, batch_size=2 * preset.batch, seed=seed, num_steps=steps, workers=preset.workers, repeats=2
    )  # fmt: skip


def train(
    preset: Preset, arm: str, *, rate: float, seed: int, source: Source, device: torch.device
) -> tuple[Net, float]:
    """Train a network; return it and the mean loss of its last tenth of steps."""
    net = network(preset, arm, seed).to(device).to(memory_format=torch.channels_last).train()
    groups = parameter_groups(net, weight_decay=1e-4, clipping=preset.clipping)
    optimizer = SGD(groups, rate, momentum=0.9)
    steps = max(2, round(preset.epochs * len(source) / preset.batch))
    losses: list[float] = []
    for batch in views_of(preset, source, seed=seed, steps=steps):
        optimizer.set_lr(
            rate * schedule_multiplier("warmup_cosine", batch.step / steps, warmup=0.1, final=0.0)
        )
        shuffle = key(seed, "devices", batch.step) if arm == "bn_shuffled" else None
        loss = loss_of(
            net, normalize(batch.images.to(device)), temperature=preset.temperature, shuffle=shuffle
        )
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        clip_grad_(optimizer.param_groups, mode="agc" if arm == "nf" else "off", clipping=preset.clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net, fmean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def losses_on(net: nn.Module, preset: Preset, source: Source, *, device: torch.device) -> dict[str, float]:
    """Return the losses with batch statistics on unseen images: views on one device, and second views shuffled."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found: dict[str, list[float]] = {"own": [], "shuffled": []}
    net.train()
    for batch in views_of(preset, source, seed=7, steps=max(1, len(source) // preset.batch)):
        views = normalize(batch.images.to(device))
        for name, shuffle in (("own", None), ("shuffled", key(7, "devices", batch.step))):
            loss = loss_of(net, views, temperature=preset.temperature, shuffle=shuffle)
            found[name].append(float(loss))
    net.load_state_dict(state)  # the running statistics
    return {name: fmean(values) for name, values in found.items()}


def run(
    preset: Preset, arm: str, *, rate: float, seed: int, data: str, scored: str, device: str
) -> dict[str, Any]:
    """Train one cell and return its scores on the part `scored`."""
    begun, target, sources = time.process_time(), run_device(device), parts(preset, data)
    net, last = train(preset, arm, rate=rate, seed=seed, source=sources["train"], device=target)
    cell: dict[str, Any] = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "train_loss": last,
        "diverged": not math.isfinite(last),
    }
    if not cell["diverged"]:
        held = losses_on(net, preset, sources[scored], device=target)
        pre = Preprocessing(image_size=preset.image_size, crop="squash")
        x, y = embed_source(net, sources["train"], preprocessing=pre, device=target, batch_size=512)
        queries, truth = embed_source(net, sources[scored], preprocessing=pre, device=target, batch_size=512)
        classes = len(sources["train"].classes)
        knn = knn_probabilities(queries, x, y, classes=classes).argmax(dim=1)
        probe = linear_probe((x, y), queries, classes=classes).argmax(dim=1)
        cell |= {"loss": held["own"], "loss_shuffled": held["shuffled"], "leak": held["shuffled"] - held["own"],
                 "knn": 100 * float((knn == truth).double().mean()),
                 "probe": 100 * float((probe == truth).double().mean())}  # fmt: skip
    return {**cell, "cpu_seconds": time.process_time() - begun}


# --- the verdict, fixed before the runs -------------------------------------------------------------------


def verdict(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Apply the rule.

    "Leaks": the 95 % interval of the leak over seeds lies above 0.1 nats. "Does not leak": the mean leak is below 0.001
    nats. "Harmed" by the leak: the linear probe is behind that of `nf`, paired by seed, with a 95 % interval that
    excludes 0; "not harmed": equal within 1 point; else undecided. NF needs no exchange if it does not leak and is
    ahead of or equal to `bn_global` within 1 point.
    """
    found: dict[str, Any] = {}
    for arm, own in cells.items():
        leaks = [cell["leak"] for cell in own if not cell["diverged"]]
        interval = mean_interval(leaks) if len(leaks) > 1 else None
        leaking = interval is not None and interval.low > LEAK
        quiet = bool(leaks) and abs(fmean(leaks)) < 1e-3
        found[arm] = {"leak": "leaks" if leaking else "does not leak" if quiet else "undecided"}
        if arm != "nf":
            found[arm]["probe"] = _against_nf(own, cells["nf"])
    synchronized = found["bn_global"]["probe"]
    if synchronized is not None:
        alone = found["nf"]["leak"] == "does not leak" and synchronized.verdict in ("behind", "equal")
        found["nf"]["exchange"] = "needs no exchange" if alone else "undecided or behind bn_global"
    return found


def _against_nf(own: Sequence[Mapping[str, Any]], nf: Sequence[Mapping[str, Any]]) -> PairedComparison | None:
    """Compare the linear probes of an arm with those of `nf`; None if that needs more seeds, or a run diverged."""
    if len(own) < 2 or any(cell["diverged"] for cell in (*own, *nf)):
        return None
    return compare_paired([c["probe"] for c in own], [c["probe"] for c in nf], margin=MARGIN)


def page(preset: Preset, cells: Mapping[str, Sequence[Mapping[str, Any]]], *, command: str) -> str:
    """Return the page of results."""
    rule = " ".join((verdict.__doc__ or "").split()[3:])
    found, chance = verdict(cells), math.log(2 * preset.batch - 1)
    lines = [
        "# What batch statistics leak in contrastive learning", "",
        f"`{command}`: {preset.model} and its batch-norm twin, {preset.train_images} training images, batches of "
        f"{preset.batch} images on {preset.devices} virtual devices, {preset.epochs:g} epochs, temperature "
        f"{preset.temperature:g}, scored on {preset.test_images} test images. A loss of {chance:.3f} nats is chance; "
        f"{math.log(2 * preset.batch / preset.devices - 1):.3f} is that of a network that recognizes the device alone. "
        "The leak is the loss with second views shuffled over the devices minus the loss without, of the same network "
        f"with batch statistics. Mean ± standard deviation of {len(cells['nf'])} seeds.", "",
        f"The rule, fixed before the runs: {rule}", "",
        "| arm | rate | training loss | test loss | shuffled | leak, nats | neighbors % | linear probe % | verdict |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for arm, own in cells.items():
        good = [cell for cell in own if not cell["diverged"]]
        names = ("train_loss", "loss", "loss_shuffled", "leak", "knn", "probe")
        values = [
            _spread([cell[name] for cell in good], 1 if name in ("knn", "probe") else 3) for name in names
        ]
        judged = found[arm]["leak"]
        probe = found[arm].get("probe")
        if probe is not None:
            low, high = probe.interval
            judged += f"; probe {probe.verdict} ({probe.difference:+.1f}, {low:+.1f} to {high:+.1f})"
        judged += f"; {found[arm]['exchange']}" if "exchange" in found[arm] else ""
        if len(good) < len(own):
            judged += f"; {len(own) - len(good)} of {len(own)} diverged"
        lines.append(f"| {arm} | {own[0]['rate']:g} | " + " | ".join(values) + f" | {judged} |")
    seconds = sum(cell["cpu_seconds"] for own in cells.values() for cell in own)
    lines += ["", f"{seconds / 60:.0f} minutes of CPU time on {platform.processor() or platform.machine()}; "
              f"torch {torch.__version__}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


# --- cells ------------------------------------------------------------------------------------------------


def cell_of(task: tuple[Preset, str, float, int, str, str, str, str]) -> dict[str, Any]:
    """Return the result of a cell from its file, or run it and write the file."""
    preset, arm, rate, seed, data, scored, device, folder = task
    path = Path(folder) / f"{arm}-{rate:g}-s{seed}-{scored}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    keep_freed_memory()
    cell = run(preset, arm, rate=rate, seed=seed, data=data, scored=scored, device=device)
    atomic_write_text(path, json.dumps(cell, indent=1) + "\n")
    print(json.dumps(cell), flush=True)
    return cell


def everything(
    preset: Preset, *, data: str, folder: Path, device: str, jobs: int, probe: bool, rate: float
) -> dict[str, list[Any]]:
    """Run all cells: those that choose the rates, and unless `probe`, those of the table. Return the latter by arm.

    With `rate`, all arms have this rate, and none is chosen.
    """
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        several = pool.map if jobs > 1 else map

        def cells(wanted: Sequence[tuple[str, float, int]], scored: str) -> list[dict[str, Any]]:
            tasks = [
                (preset, arm, rate, seed, data, scored, device, str(folder)) for arm, rate, seed in wanted
            ]
            return list(several(cell_of, tasks))

        rates = dict.fromkeys(ARMS, rate)
        if not rate:
            tried = cells([(arm, r, PROBE_SEED) for arm in ARMS for r in preset.rates], "choice")
            for arm in ARMS:
                rates[arm] = max((c.get("probe", 0.0), c["rate"]) for c in tried if c["arm"] == arm)[1]
        if probe:
            return {}
        wanted = [(arm, rates[arm], seed) for seed in range(preset.seeds) for arm in ARMS]
        found = cells(wanted, "test")
    return {arm: [cell for cell in found if cell["arm"] == arm] for arm in ARMS}


def main(args: Sequence[str] | None = None) -> None:
    """Run the experiment and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--data", help="any value of normfree's --data; its validation part is the test part")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, help="in place of the preset's")
    parser.add_argument("--epochs", type=float, help="in place of the preset's")
    parser.add_argument("--rate", type=float, default=0.0, help="for all arms, in place of one for each")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the cells")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--probe", action="store_true", help="only choose the rates")
    given = parser.parse_args(args)
    preset = PRESETS[given.preset]
    changes = {k: v for k, v in (("seeds", given.seeds), ("epochs", given.epochs)) if v}
    shown = changes | ({"rate": given.rate} if given.rate else {})
    preset = replace(preset, **changes)
    folder = given.runs / f"{given.preset}-{preset.epochs:g}ep"
    folder.mkdir(parents=True, exist_ok=True)
    cells = everything(preset, data=given.data or preset.data, folder=folder, device=given.device, jobs=given.jobs,
                       probe=given.probe, rate=given.rate)  # fmt: skip
    if not cells:
        return
    name = "contrastive" if given.preset == "cpu" else f"contrastive_{given.preset}"
    command = "python -m experiments.contrastive" + (
        f" --preset {given.preset}" if given.preset != "cpu" else ""
    )
    command += "".join(f" --{k} {v:g}" for k, v in shown.items())
    text = page(preset, cells, command=command)
    given.results.mkdir(parents=True, exist_ok=True)
    atomic_write_text(given.results / f"{name}.md", text)
    summary = {"preset": asdict(preset), "cells": cells}
    atomic_write_text(given.results / f"{name}.json", json.dumps(summary, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
