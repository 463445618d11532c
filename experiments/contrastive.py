"""What batch statistics leak in contrastive learning: SimCLR on virtual devices, with batch norm and without.

    python -m experiments.run --only contrastive --data cifar10/

A batch of 256 images is spread over 32 virtual devices; both views of an image are on one device. A network with
batch norm and statistics per device can recognize the other view by the statistics that they share, instead of by its
content. Arms: `nf`, the normalizer-free network with AGC; `bn_device`, its batch-norm twin with statistics per
device; `bn_shuffled`, the same with the second views distributed over the devices at random (the remedy of MoCo,
arXiv 1911.05722, section 3.3); `bn_global`, with statistics of the whole batch (synchronized batch norm).

Each arm has its own learning rate, chosen by the linear probe on V. The report scores the networks on the test
images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from experiments.candidates import tried_rows
from experiments.cells import Cell, Result, Results, Setup, computed_once
from experiments.checkpoint import StateFile
from experiments.choices import Changes, Choices, settings_of
from experiments.contrastive_page import ARMS, draw, findings, page
from experiments.networks import build, on_devices_, variant_for
from experiments.pages import facts, write
from experiments.parts import open_part, packed_parts
from normfree import SGD, NonFiniteGradientError, clip_grad_, nt_xent, parameter_groups
from normfree.data.loader import Batch, train_batches
from normfree.data.seeds import key, permutation
from normfree.data.source import Source
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import train_transform
from normfree.device import run_device
from normfree.embeddings import embed_source, knn_probabilities, linear_probe
from normfree.files import atomic_write
from normfree.models.net import Net
from normfree.optim.schedule import warmup_cosine
from normfree.preprocessing import Preprocessing
from normfree.training.allocator import keep_freed_memory
from normfree.training.projection import project_
from normfree.training.stop import stop_signals


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the experiment. `rates` are tried for each arm."""

    base: str = "thin"
    image_size: int = 32
    train: int = 8_000
    choice: int = 2_000
    test: int = 5_000
    batch: int = 256
    devices: int = 32
    epochs: float = 8
    temperature: float = 0.2
    dim: int = 64
    clipping: float = 0.08
    rates: tuple[float, ...] = (0.03, 0.1, 0.3, 0.9, 2.7)
    seeds: int = 3


SIZES = {
    "cpu": Size(),
    "gpu": Size(
        base="mini", train=45_000, choice=5_000, test=10_000, batch=1024, epochs=200, dim=128, seeds=5
    ),
    "tiny": Size(
        base="tiny",
        image_size=16,
        train=40,
        choice=10,
        test=20,
        batch=8,
        devices=4,
        epochs=1,
        rates=(0.1,),
        seeds=1,
    ),
}


def method_of(arm: str) -> str:
    """Return the method of an arm's network."""
    return "nf" if arm == "nf" else "batch"


def network(size: Size, arm: str, seed: int) -> Net:
    """Return the network of an arm with its projection; equal seeds give all arms the same convolutions."""
    net = build(size.base, method_of(arm), classes=0, seed=seed)
    project_(net, size.dim)
    if arm in ("bn_device", "bn_shuffled"):
        on_devices_(net, size.devices)
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


def views_of(
    size: Size, source: Source, *, seed: int, steps: int, start: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """Return batches of views: random crops, flips and SimCLR's colors for small images."""
    transform = train_transform(image_size=size.image_size, crop_min=0.2, randaugment="simclr:0.5")
    return train_batches(
        source,
        transform,
        batch_size=2 * size.batch,
        seed=seed,
        num_steps=steps,
        start_step=start,
        workers=workers,
        repeats=2,
    )


class SimCLR:
    """Network and optimizer of a training, and what one step does to them."""

    def __init__(
        self, size: Size, arm: str, *, rate: float, seed: int, steps: int, device: torch.device
    ) -> None:
        self.size, self.arm, self.rate, self.seed, self.steps, self.device = (
            size,
            arm,
            rate,
            seed,
            steps,
            device,
        )
        self.net = network(size, arm, seed).to(device).to(memory_format=torch.channels_last).train()
        groups = parameter_groups(self.net, weight_decay=1e-4, clipping=size.clipping)
        self.optimizer = SGD(groups, rate, momentum=0.9)
        self.losses: list[float] = []

    def step(self, batch: Batch) -> None:
        """Take one step; if the loss is not finite, leave the weights as they are."""
        size, views = self.size, normalize(batch.images.to(self.device))
        self.optimizer.set_lr(self.rate * warmup_cosine(batch.step / self.steps, warmup=0.1))
        shuffle = key(self.seed, "devices", batch.step) if self.arm == "bn_shuffled" else None
        loss = loss_of(self.net, views, temperature=size.temperature, shuffle=shuffle)
        self.losses.append(float(loss.detach()))
        if math.isfinite(self.losses[-1]):
            loss.backward()
            mode = "agc" if self.arm == "nf" else "off"
            clip_grad_(self.optimizer.param_groups, mode=mode, clipping=size.clipping)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.named_state(),
            "losses": self.losses,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_named_state(state["optimizer"])
        self.losses = list(state["losses"])


def train(
    size: Size, arm: str, *, rate: float, seed: int, source: Source, folder: Path, setup: Setup
) -> tuple[Net, Result]:
    """Train a network, or continue in `folder`; return it with the mean loss of its last tenth of steps.

    Raises:
        StoppedBySignal: a signal arrived; the state was saved.
    """
    device, steps = run_device(setup.device), max(2, round(size.epochs * len(source) / size.batch))
    training = SimCLR(size, arm, rate=rate, seed=seed, steps=steps, device=device)
    saved = StateFile(folder, device)
    if saved.state is not None:
        training.restore(saved.state)
    batches = views_of(size, source, seed=seed, steps=steps, start=saved.step, workers=setup.workers)
    status = "done"
    with stop_signals() as stop, stop.deferred(), contextlib.closing(batches):
        try:
            for batch in batches:
                saved.keep(batch.step, training, stop)
                training.step(batch)
                if not math.isfinite(training.losses[-1]):
                    status = "diverged"
                    break
        except NonFiniteGradientError:
            status = "diverged"
    saved.remove()
    last = fmean(training.losses[-max(1, steps // 10) :])
    return training.net, {"status": status, "train_loss": last, "cpu_seconds": saved.cpu_seconds}


@torch.no_grad()
def losses_on(net: nn.Module, size: Size, source: Source, *, device: torch.device) -> dict[str, float]:
    """Return the losses with batch statistics on unseen images: views on one device, and second views shuffled."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    found: dict[str, list[float]] = {"own": [], "shuffled": []}
    net.train()
    for batch in views_of(size, source, seed=7, steps=max(1, len(source) // size.batch)):
        views = normalize(batch.images.to(device))
        for name, shuffle in (("own", None), ("shuffled", key(7, "devices", batch.step))):
            found[name].append(float(loss_of(net, views, temperature=size.temperature, shuffle=shuffle)))
    net.load_state_dict(state)  # the running statistics
    return {name: fmean(values) for name, values in found.items()}


def scores(net: Net, size: Size, source: Source, bank: Source, *, device: torch.device) -> dict[str, float]:
    """Return losses, leak, accuracy of nearest neighbors and of a linear probe on the features, in percent."""
    held = losses_on(net, size, source, device=device)
    pre = Preprocessing(image_size=size.image_size, crop="squash")
    x, y = embed_source(net, bank, preprocessing=pre, device=device, batch_size=512)
    queries, truth = embed_source(net, source, preprocessing=pre, device=device, batch_size=512)
    knn = knn_probabilities(queries, x, y, classes=len(bank.classes)).argmax(dim=1)
    probe = linear_probe((x, y), queries, classes=len(bank.classes)).argmax(dim=1)
    return {
        "loss": held["own"],
        "loss_shuffled": held["shuffled"],
        "leak": held["shuffled"] - held["own"],
        "knn": 100 * float((knn == truth).double().mean()),
        "probe": 100 * float((probe == truth).double().mean()),
    }


class Contrastive:
    """The experiment; see `experiments.cells.Experiment`."""

    name, title, alone = "contrastive", "What batch statistics leak in contrastive learning", False

    def __init__(self, preset: str) -> None:
        self.size = SIZES[preset]

    @property
    def seeds(self) -> int:
        """How many cells there are of each row of the table."""
        return self.size.seeds

    def cell(self, arm: str, point: str, candidate: Changes, seed: int) -> Cell:
        """Return a cell."""
        settings = settings_of(self.size, candidate, variant_for(self.size.base, method_of(arm), {}))
        return Cell.of(self.name, arm, point=point, seed=seed, settings=settings)

    @property
    def choices(self) -> Choices:
        """The arms and the rates of each."""
        return Choices(
            rows=[(arm, "") for arm in ARMS],
            candidates={arm: [{"rate": rate} for rate in self.size.rates] for arm in ARMS},
            cell=self.cell,
            score="probe",
            seeds=self.seeds,
        )

    def cells(self, done: Results) -> list[Cell]:
        """Return the cells that can be run."""
        return self.choices.cells(done)

    def all_cells(self) -> list[Cell]:
        """Return as many cells as there will be."""
        return self.choices.all_cells()

    def minutes(self, cell: Cell) -> float:
        """Return an estimate, from the CPU seconds of an epoch of 8,000 images at 32 px on an AMD EPYC."""
        seconds = {"nf": 12, "bn_device": 27, "bn_shuffled": 29, "bn_global": 14}[cell.arm]
        return seconds * self.size.epochs * self.size.train / 8_000 / 60

    def _sources(self, setup: Setup) -> dict[str, Path]:
        size = self.size
        return packed_parts(setup, train=size.train, choice=size.choice, test=size.test, size=size.image_size)

    def measure(self, cell: Cell, folder: Path, setup: Setup) -> Result:
        """Train; a cell that chooses is scored on V, the others keep their weights for the report."""
        keep_freed_memory()
        files, rate = self._sources(setup), cell.options["rate"]
        bank = open_part(files, "train")
        net, found = train(
            self.size, cell.arm, rate=rate, seed=cell.seed, source=bank, folder=folder, setup=setup
        )
        if found["status"] == "done" and cell.chooses:
            device, choice = run_device(setup.device), open_part(files, "choice")
            return {**found, **scores(net, self.size, choice, bank, device=device)}
        if found["status"] == "done":
            atomic_write(folder / "weights.pt", lambda path: torch.save(net.state_dict(), path))
        return found

    def report(self, done: Results, setup: Setup, results: Path) -> str:
        """Score the networks on the test images, unless that was done, and write page and JSON."""
        if len(done) < len(self.all_cells()):
            return f"{self.title}: {len(done)} cells are finished; the test images were not opened.\n"
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for cell, result in done.items():
            if not cell.chooses:
                own = {"seed": cell.seed, "rate": cell.options["rate"]}
                rows[cell.arm].append({**own, **result, **self._tested(cell, result, setup)})
        found = {
            **facts(self, setup, done),
            "size": asdict(self.size),
            "cells": rows,
            "chosen": tried_rows(self.choices, done),
        }
        return self.publish(found, results)

    def publish(self, found: Mapping[str, Any], results: Path) -> str:
        """Judge what the JSON holds, write page, plot and JSON, and return the page."""
        found = {**found, "findings": [finding.as_json() for finding in findings(found["cells"])]}
        image = f"{found['stem']}.png"
        atomic_write(results / image, lambda path: draw(found, path))
        return write(found, page(found, self.choices, image=image), results)

    def _tested(self, cell: Cell, result: Result, setup: Setup) -> Result:
        """Return the scores of a network on the test images; empty if its training diverged."""
        if result["status"] != "done":
            return {}
        folder, device = setup.folder_of(cell), run_device(setup.device)

        def compute() -> Result:
            files, net = self._sources(setup), network(self.size, cell.arm, 0)
            net.load_state_dict(torch.load(folder / "weights.pt", map_location="cpu", weights_only=True))
            images, bank = open_part(files, "test"), open_part(files, "train")
            return dict(scores(net.to(device), self.size, images, bank, device=device))

        return computed_once(folder / "test.json", compute)
