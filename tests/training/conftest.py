"""Fixtures of several tests of training: a trainer of a small network and its batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from normfree.data.loader import Batch
from normfree.models.variants import VARIANTS
from normfree.training.config import AugmentConfig, Config, InputConfig, NetConfig, OptimConfig
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

SIZE, IMAGES = 16, 6


@pytest.fixture
def small_trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Return a function that creates trainers with the same seed; its keywords are fields of the config.

    The steps draw random numbers for mixing, dropout and stochastic depth.
    """
    variant = replace(VARIANTS["nf_resnet_nano"], depths=(1, 1), widths=(8, 16), strides=(1, 2))
    monkeypatch.setitem(VARIANTS, "small", variant)

    def make(**changes: object) -> Trainer:
        values = {
            "data": "synthetic", "model": "small", "device": "cpu", "length": "20st",
            "input": InputConfig(batch_size=IMAGES, image_size=SIZE), "augment": AugmentConfig(mixup=0.2, cutmix=1.0),
            "net": NetConfig(drop_rate=0.3, stochdepth_rate=0.5),
            "optim": OptimConfig(lr=0.05, warmup="4st", ema_decay=0.9, clipping=0.02),
        }  # fmt: skip
        config = resolve(Config.model_validate(values | changes))
        return Trainer(config, num_classes=3, samples=IMAGES)

    return make


@pytest.fixture
def some_batch() -> Callable[[int], Batch]:
    """Return a function that returns the batch of a step."""

    def make(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(256, (IMAGES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        labels = torch.arange(IMAGES) % 3
        return Batch(images, labels, torch.arange(IMAGES), ("one.png",) * IMAGES, step=step, epoch=0)

    return make
