"""One training of a classifier, described by `Settings`: what almost all experiments do in a cell.

The loop is made of the public functions of normfree, so that networks, optimizers and clipping rules that the package
does not have can take part. The recipe is that of the NFNet paper, at the size of CIFAR-10: Nesterov momentum 0.9, a
learning rate proportional to the batch size with warm-up and cosine, label smoothing 0.1, flips and random crops.

A training that is stopped by a signal continues from `state.pt` of its folder with the same bits: order, augmentation
and dropout are functions of seed and step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.cells import Result, Setup
from experiments.checkpoint import StateFile
from experiments.clipping_rules import Lars, clip_layers_
from experiments.networks import build, on_devices_
from normfree import (
    SAM,
    SGD,
    Ema,
    NonFiniteGradientError,
    adaptive_clip_grad_,
    clip_grad_,
    evaluate,
    parameter_groups,
    signal_propagation,
    standardized_once,
)
from normfree.data.loader import Batch, eval_batches, train_batches
from normfree.data.seeds import key
from normfree.data.source import Source
from normfree.data.subset import Subset, spread_indices
from normfree.data.transforms.mixing import mix
from normfree.data.transforms.normalize import normalize
from normfree.data.transforms.train import train_transform
from normfree.device import run_device
from normfree.diagnose.gradients import ratio_quantiles
from normfree.files import atomic_write
from normfree.inference import NotFiniteLogitsError
from normfree.models.net import Net
from normfree.optim.sam import STRIDE
from normfree.optim.schedule import warmup_cosine
from normfree.optim.torch_optimizers import TorchOptimizer, make_optimizer
from normfree.preprocessing import Preprocessing
from normfree.suggest import unknown
from normfree.training.allocator import keep_freed_memory
from normfree.training.stop import stop_signals

CLIPS = ("off", "agc", "tensor", "layer", "norm")
TIMED = 3  # steps whose CPU time is measured after the training
NOISE = 16  # images of Gaussian noise for signal propagation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a training, except its seed and the images.

    Attributes:
        base: name of the small variant, a key of `BASES`.
        method: what replaces batch norm, one of `METHODS`.
        fields: changes of the variant.
        images: size of T.
        epochs: length.
        batch: images in a batch.
        rate: peak learning rate at a batch of 256.
        scaled: whether the rate is proportional to the batch size; if not, it is used as given.
        clip: off, agc (unit-wise), tensor (AGC of whole tensors), layer (AGC of whole layers) or norm (global norm).
        clipping: λ, or the largest norm.
        unclipped: patterns of the parameters that are not clipped.
        optimizer: sgd, lars, muon or another one of torch.
        trust: of LARS.
        decay: weight decay.
        sam: radius of SAM; 0: none.
        average: decay of the averaged weights; 0: none.
        mixup, cutmix, randaugment, smoothing: augmentation.
        size: side of training images in pixels.
        sizes: sides of test images; empty: `size`.
        devices: virtual devices with statistics of their own, for batch norm.
        sorted_batches: order each batch by class, so that a device has few classes.
        signal: also measure signal propagation before and after the training.
    """

    base: str = "thin"
    method: str = "nf"
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: int = 8000
    epochs: float = 10.0
    batch: int = 128
    rate: float = 0.4
    scaled: bool = True
    clip: str = "off"
    clipping: float = 0.08
    unclipped: tuple[str, ...] = ("head.weight",)
    optimizer: str = "sgd"
    trust: float = 0.001
    decay: float = 1e-4
    sam: float = 0.0
    average: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: str = "off"
    smoothing: float = 0.1
    size: int = 32
    sizes: tuple[int, ...] = ()
    devices: int = 1
    sorted_batches: bool = False
    signal: bool = False

    def __post_init__(self) -> None:
        if self.clip not in CLIPS:
            raise ValueError(unknown("clip", self.clip, CLIPS))

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """Return settings with some values replaced; `fields` are merged.

        Raises:
            ValueError: a name is unknown.
        """
        names = [f.name for f in fields(self)]
        for name in changes:
            if name not in names:
                raise ValueError(unknown("setting", name, names))
        merged = {**changes, "fields": {**self.fields, **changes.get("fields", {})}}
        return replace(self, **{k: tuple(v) if isinstance(v, list) else v for k, v in merged.items()})

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return max(1, round(self.epochs * self.images / self.batch))

    @property
    def warmup(self) -> float:
        """The fraction of the training in which the rate rises: one epoch, at most a tenth in a short training."""
        return 1 / self.epochs if self.epochs > 2 else 0.1

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return self.rate * self.batch / 256 if self.scaled else self.rate


class Training:
    """Network, optimizer and average of a training, and what one step does to them."""

    def __init__(
        self,
        settings: Settings,
        *,
        classes: int,
        seed: int,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.settings, self.seed, self.classes, self.device = settings, seed, classes, device
        net = build(settings.base, settings.method, classes=classes, seed=seed, fields=settings.fields)
        if settings.devices > 1:
            on_devices_(net, settings.devices)
        if weights is not None:  # with a new classifier
            own = net.state_dict()
            net.load_state_dict({k: own[k] if k.startswith("head.") else v for k, v in weights.items()})
        self.net: Net = net.to(device).to(memory_format=torch.channels_last).train()
        self.average = Ema(self.net, decay=settings.average) if settings.average else None
        clipped = settings.clip in ("agc", "tensor", "layer")
        groups = parameter_groups(
            self.net, weight_decay=settings.decay, clipping=settings.clipping if clipped else 0.0, classifier="head",
            unclipped=settings.unclipped if clipped else (),
        )  # fmt: skip
        self.optimizer: SGD | TorchOptimizer
        if settings.optimizer == "lars":
            self.optimizer = Lars(groups, settings.peak, trust=settings.trust)
        else:
            self.optimizer = make_optimizer(groups, settings.peak, name=settings.optimizer)
        self.sam = SAM(self.net.parameters(), rho=settings.sam) if settings.sam else None
        self.losses: list[float] = []
        self.clipped: list[float] = []
        self.ratios: list[dict[str, list[float]]] = []

    def step(self, batch: Batch) -> None:
        """Take one step.

        Raises:
            NonFiniteGradientError: loss or gradient is not finite; the weights are unchanged.
        """
        s = self.settings
        images, targets = self.inputs(batch)
        self.optimizer.set_lr(s.peak * warmup_cosine(batch.step / s.steps, warmup=s.warmup))
        if self.sam is not None:
            self._backward(images[::STRIDE], targets[::STRIDE], batch.step)
            with self.sam.perturbed():
                loss = self._backward(images, targets, batch.step)
        else:
            loss = self._backward(images, targets, batch.step)
        if batch.step % max(1, s.steps // 20) == 0 and s.clip == "agc":
            self.ratios.append(ratio_quantiles(self.optimizer.param_groups))
        self.clipped.append(self.clip_())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.net)
        self.losses.append(loss)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return normalized, mixed images and soft targets on the device."""
        s = self.settings
        images, labels = normalize(batch.images.to(self.device)), batch.labels.to(self.device)
        if s.sorted_batches:
            order = labels.argsort(stable=True)
            images, labels = images[order], labels[order]
        return mix(
            images.contiguous(memory_format=torch.channels_last), labels, num_classes=self.classes, mixup=s.mixup,
            cutmix=s.cutmix, label_smoothing=s.smoothing,
            generator=torch.Generator().manual_seed(key(self.seed, "mix", batch.step)),
        )  # fmt: skip

    def _backward(self, images: Tensor, targets: Tensor, step: int) -> float:
        """Add the gradients of the mean loss and return it."""
        torch.manual_seed(key(self.seed, "step", step))  # dropout and stochastic depth
        with standardized_once(self.net):
            loss = F.cross_entropy(self.net(images), targets)
            loss.backward()
        return float(loss.detach())

    def clip_(self) -> float:
        """Clip the gradients; return the fraction of units that was clipped."""
        s, groups = self.settings, self.optimizer.param_groups
        if s.clip == "layer":
            clip_grad_(groups, mode="off", clipping=s.clipping)  # raises if a gradient is not finite
            return float(clip_layers_(groups, clipping=s.clipping))
        if s.clip in ("agc", "tensor"):
            return float(
                adaptive_clip_grad_(groups, s.clipping, unit="tensor" if s.clip == "tensor" else "filter")
            )
        return float(clip_grad_(groups, mode=s.clip, clipping=s.clipping))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.named_state(), "losses": self.losses,
                "clipped": self.clipped, "ratios": self.ratios,
                "average": self.average.state_dict() if self.average else None}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_named_state(state["optimizer"])
        self.losses, self.clipped, self.ratios = (
            list(state["losses"]),
            list(state["clipped"]),
            list(state["ratios"]),
        )
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def train(
    settings: Settings,
    source: Source,
    *,
    seed: int,
    folder: Path,
    setup: Setup,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[Net, Result]:
    """Train a network on a source, or continue in `folder`; return it and what is known without scoring it.

    Raises:
        StoppedBySignal: a signal arrived; the state was saved.
    """
    keep_freed_memory()
    device = run_device(setup.device)
    training = Training(settings, classes=len(source.classes), seed=seed, device=device, weights=weights)
    found: Result = {"status": "done"}
    if settings.signal:
        found["signal_before"] = signal(training.net, settings, device)
    saved = StateFile(folder, device)
    if saved.state is not None:
        training.restore(saved.state)
    transform = train_transform(image_size=settings.size, crop_min=0.5, randaugment=settings.randaugment)
    batches = train_batches(source, transform, batch_size=settings.batch, seed=seed, num_steps=settings.steps,
                            start_step=saved.step, workers=setup.workers)  # fmt: skip
    with stop_signals() as stop, stop.deferred(), contextlib.closing(batches):
        try:
            for batch in batches:
                saved.keep(batch.step, training, stop)
                training.step(batch)
        except NonFiniteGradientError:
            found["status"] = "diverged"
    last = training.losses[-max(1, settings.steps // 10) :]
    found |= {"steps": len(training.losses), "train_loss": fmean(last) if last else math.nan,
              "clipped": fmean(training.clipped) if training.clipped else 0.0,
              "cpu_seconds": saved.cpu_seconds}  # fmt: skip
    if training.ratios:
        found["ratios"] = training.ratios
    if found["status"] == "done":
        if training.average is not None:
            save_weights(training.average.module, folder / "average.pt")
            training.average = None
        if settings.signal:
            found["signal_after"] = signal(training.net, settings, device)
        found["step_ms"] = step_ms(training, source)
    saved.remove()
    return training.net, found


def step_ms(training: Training, source: Source) -> float:
    """Return the median CPU time of a step in milliseconds, without loading, on a batch of one image size.

    The CPU time of this process does not depend on what else the machine does. The network is changed.
    """
    s = training.settings
    transform = train_transform(image_size=s.size, crop_min=0.5)
    batch = next(iter(train_batches(source, transform, batch_size=s.batch, seed=training.seed, num_steps=1)))
    state = {name: value.clone() for name, value in training.net.state_dict().items()}
    took, kept = [], (list(training.losses), list(training.clipped), list(training.ratios))
    try:
        for _ in range(TIMED):
            start = time.process_time()
            training.step(batch)
            took.append(1000 * (time.process_time() - start))
    except NonFiniteGradientError:
        pass
    training.net.load_state_dict(state)
    training.losses, training.clipped, training.ratios = kept
    return median(took) if took else math.nan


def signal(net: Net, settings: Settings, device: torch.device) -> dict[str, list[float]]:
    """Return variance, squared mean and cosine after the last block of each stage, for images of Gaussian noise."""
    noise = torch.randn(NOISE, 3, settings.size, settings.size, generator=torch.Generator().manual_seed(0))
    report = signal_propagation(net, noise.to(device))
    last = [stage[-1] for stage in report.stages]
    return {name: [getattr(block, name) for block in last] for name in ("variance", "squared_mean", "cosine")}


def hits_of(net: torch.nn.Module, source: Source, *, size: int, device: str) -> dict[str, Any]:
    """Return the number of correct answers, of images, and the mean loss of a network; no answer counts as correct if
    the logits are not finite."""
    try:
        found = evaluate(
            net,
            source,
            preprocessing=Preprocessing(image_size=size, crop="squash"),
            batch_size=500,
            device=device,
        )
    except NotFiniteLogitsError:
        return {"hits": 0, "count": len(source), "loss": math.inf}
    return {"hits": found.hits, "count": found.count, "loss": found.loss}


def accuracy_on_trained(net: Net, source: Source, settings: Settings, device: str) -> float:
    """Return top-1 in percent on up to 2,000 of the training images, without augmentation."""
    part = Subset(source, spread_indices(len(source), 2000))
    found = hits_of(net, part, size=settings.size, device=device)
    return 100 * found["hits"] / found["count"]


def training_inputs(source: Source, settings: Settings) -> Iterator[Tensor]:
    """Yield up to 2,000 of the training images as inputs, 100 at a time, without augmentation."""
    part = Subset(source, spread_indices(len(source), 2000))
    transform = Preprocessing(image_size=settings.size, crop="squash").transform()
    for batch in eval_batches(part, transform, batch_size=100):
        yield normalize(batch.images)


def save_weights(net: torch.nn.Module, path: Path) -> None:
    """Write the weights of a network to a file that `load_network` reads."""
    atomic_write(path, lambda target: torch.save(net.state_dict(), target))


def load_network(settings: Settings, path: Path, *, classes: int) -> Net:
    """Return the network of a finished cell from its file of weights."""
    net = build(settings.base, settings.method, classes=classes, seed=0, fields=settings.fields)
    if settings.devices > 1:
        on_devices_(net, settings.devices)
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()
