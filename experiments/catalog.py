"""All experiments that `python -m experiments.run` knows, in three sizes.

`cpu` is for two cores and five to six hours in total, `gpu` for one GPU, `tiny` for the tests. The sweeps are written
for `cpu`; the other two sizes change their numbers by one rule for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from experiments.cells import Experiment
from experiments.clipping_sweeps import batch_size, clipped_layers, clipping_factor, optimizers, skip_gain
from experiments.contrastive import Contrastive
from experiments.demo_seeds import DemoSeeds
from experiments.latency import Latency
from experiments.network_sweeps import (
    architecture,
    depth,
    one_class_batches,
    regularization,
    small_batches,
    transfer,
)
from experiments.privacy import Privacy
from experiments.sweep import Arm, Images, Sweep
from normfree.suggest import unknown

PRESETS = ("cpu", "gpu", "tiny")
SWEEPS: dict[str, Callable[[], Sweep]] = {
    function.__name__: function
    for function in (
        batch_size,
        clipping_factor,
        clipped_layers,
        skip_gain,
        optimizers,
        small_batches,
        depth,
        architecture,
        regularization,
        transfer,
        one_class_batches,
    )
}
OTHERS: dict[str, Callable[[str], Experiment]] = {
    "contrastive": Contrastive,
    "latency": Latency,
    "demo_seeds": DemoSeeds,
    "privacy": Privacy,
}
NAMES = (*SWEEPS, *OTHERS)
# `demo_seeds` and `privacy` are about recipes, not about a claim of the papers; `privacy` also needs Opacus.
DEFAULT = tuple(name for name in NAMES if name not in ("demo_seeds", "privacy"))
BATCHES_AS_PUBLISHED = (
    "batch_size",
    "clipping_factor",
    "clipped_layers",
    "skip_gain",
)  # 8 times as large on a GPU
GPU_IMAGES = Images(train=45_000, choice=5_000, test=10_000)
TINY_IMAGES = Images(train=20, choice=10, test=20, size=16)
DATA = {"cpu": "cifar10", "gpu": "cifar10", "tiny": "synthetic:classes=10,size=16,train=60,val=40"}


def experiment(name: str, preset: str) -> Experiment:
    """Return an experiment in one size.

    Raises:
        ValueError: the name is unknown.
    """
    if name in OTHERS:
        return OTHERS[name](preset)
    if name not in SWEEPS:
        raise ValueError(unknown("experiment", name, NAMES))
    sweep = SWEEPS[name]()
    return {"cpu": lambda: sweep, "gpu": lambda: for_gpu(sweep), "tiny": lambda: tiny(sweep)}[preset]()


def resized(sweep: Sweep, change: Callable[[str, Any], Any]) -> Sweep:
    """Return a sweep in which `change` maps each setting, given by its name and value, to another value."""

    def changed(changes: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: changed(value) if key == "fields" else change(key, value) for key, value in changes.items()
        }

    arms = {
        name: Arm(changes=changed(arm.changes), candidates=[changed(c) for c in arm.candidates])
        for name, arm in sweep.arms.items()
    }
    pretraining = sweep.pretraining and replace(sweep.pretraining, changes=changed(sweep.pretraining.changes))
    return replace(
        sweep,
        base=replace(sweep.base, **changed(vars(sweep.base))),
        arms=arms,
        pretraining=pretraining,
        points={label: changed(changes) for label, changes in sweep.points.items()},
    )


def for_gpu(sweep: Sweep) -> Sweep:
    """Return a sweep on all images of CIFAR-10, with a larger network, six times the epochs and five seeds."""
    larger_batches = sweep.name in BATCHES_AS_PUBLISHED

    def change(key: str, value: Any) -> Any:
        if key == "base":
            return {"thin": "mini"}.get(value, value)
        if key == "images":
            return value * GPU_IMAGES.train // sweep.images.train
        if key == "batch" and larger_batches:
            return 8 * value
        if key == "rate" and larger_batches:
            return value / 4  # the network is larger, and the rate is that of 256 images
        return 6 * value if key == "epochs" else value

    return replace(resized(sweep, change), images=GPU_IMAGES, seeds=5)


def tiny(sweep: Sweep) -> Sweep:
    """Return a sweep that takes seconds: two points, one seed, two candidates in `batch_size` and one elsewhere, 40
    images of 16 px, one epoch."""

    def change(key: str, value: Any) -> Any:
        smaller: dict[str, Callable[[Any], Any]] = {
            "base": lambda v: {"thin": "tiny", "f0": "tiny_f0"}.get(v, v),
            "images": lambda v: TINY_IMAGES.train,
            "epochs": lambda v: 1.0,
            "batch": lambda v: min(20, max(4, v // 128 * 4)),
            "size": lambda v: v // 2,
            "sizes": lambda v: tuple(side // 2 for side in v),
            "devices": lambda v: min(v, 2),
            "depths": lambda v: tuple(min(depth, 2) for depth in v),
        }
        return smaller.get(key, lambda v: v)(value)

    small = resized(sweep, change)
    labels = list(small.points)
    kept = labels if len(labels) < 2 else [labels[0], labels[-1]]
    at = small.choose_at if small.choose_at is None or small.choose_at in kept else kept[0]
    tried = 2 if sweep.name == "batch_size" else 1
    arms = {
        name: Arm(changes=arm.changes, candidates=arm.candidates[:tried]) for name, arm in small.arms.items()
    }
    return replace(
        small,
        images=TINY_IMAGES,
        seeds=1,
        arms=arms,
        choose_at=at,
        points={label: small.points[label] for label in kept},
    )
