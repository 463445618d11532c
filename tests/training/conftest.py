"""What several tests of training share: a network of some hundred units, and the update kernel on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from normfree.data.loader import Batch
from normfree.models.variants import VARIANTS
from normfree.optim import fused
from normfree.optim.agc import unitwise_norm
from normfree.optim.named_gradients import ClipReport
from normfree.training import update
from normfree.training.config import AugmentConfig, Config, InputConfig, NetConfig, OptimConfig
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

SIZE, IMAGES = 16, 6


@pytest.fixture
def small_trainer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Makes trainers of one seed, whose steps draw mixing, dropout and stochastic depth; keywords are of the config."""
    row = replace(VARIANTS["nf_resnet_nano"], depths=(1, 1), widths=(8, 16), strides=(1, 2))
    monkeypatch.setitem(VARIANTS, "small", row)

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
    """The batch of a step."""

    def make(step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(256, (IMAGES, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        labels = torch.arange(IMAGES) % 3
        return Batch(images, labels, torch.arange(IMAGES), ("one.png",) * IMAGES, step=step, epoch=0)

    return make


class UpdateByTorch(fused.FusedUpdate):
    """`FusedUpdate` in plain torch: what varies comes from `numbers`, as in the kernel, whose interpreter is slow."""

    @torch.no_grad()
    def launch_(self) -> ClipReport:
        from normfree.optim.fused_triton import GROUP_NUMBERS

        shadow = dict(self.ema.module.named_parameters())
        grad_norm = torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm()
        units, over = 0, torch.zeros(())
        groups = zip(self.optimizer.param_groups, self.numbers[1:].view(-1, len(GROUP_NUMBERS)), strict=True)
        for group, numbers in groups if torch.isfinite(grad_norm) else ():
            now = dict(zip(GROUP_NUMBERS, numbers, strict=True))
            for name, p in zip(group["param_names"], group["params"], strict=True):
                norm = unitwise_norm(p.grad)
                limit = now["clipping"] * unitwise_norm(p).clamp(min=self.eps)
                clips = (now["clipping"] > 0) & (norm > limit)
                units, over = units + norm.numel() * (group["clipping"] > 0), over + clips.sum()
                gradient = p.grad * torch.where(clips, limit / norm, 1.0) + now["weight_decay"] * p
                momentum = self.optimizer.named_state()[name].mul_(now["momentum"]).add_(gradient)
                p -= now["lr"] * (gradient + now["momentum"] * momentum)
                shadow[name].lerp_(p, self.numbers[0])
        return ClipReport(over / max(1, units), units, grad_norm)


@pytest.fixture
def update_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers take a stand-in for the update kernel."""
    pytest.importorskip("triton", reason="Triton is not installed; torch's wheels for Linux bring it")
    monkeypatch.setattr(update, "UPDATE_KERNEL", True)
    monkeypatch.setattr(update, "fused_update", UpdateByTorch)


@pytest.fixture
def update_kernel(monkeypatch: pytest.MonkeyPatch, interpret: Callable[..., None]) -> None:
    """Trainers take the update kernel, on a CPU through Triton's interpreter."""
    interpret("normfree.optim.fused_triton", "unit_squares", "update")
    monkeypatch.setattr(fused, "BLOCK", 256)
    monkeypatch.setattr(update, "UPDATE_KERNEL", True)

    def anywhere(optimizer: object, **words: object) -> fused.FusedUpdate | None:
        made = fused.FusedUpdate(optimizer, **words)
        return made if made.fits() else None

    monkeypatch.setattr(update, "fused_update", anywhere)
