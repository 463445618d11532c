"""Measurement of the training and prediction time of a variant on this machine, and of the machine's utilization.

A training step is all of `Trainer.step`: forward, backward, clipping, weight decay, momentum and weight average. Data
loading is not included.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfree.data.loader import Batch
from normfree.deploy.fold import fold
from normfree.models.cost import count
from normfree.models.variants import variant_of
from normfree.suggest import problem
from normfree.training.config import AugmentConfig, Config, InputConfig
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

# Multiply-accumulates of a training step relative to inference: forward, and backward for inputs and for weights.
BACKWARD = 3
_CLASSES = 1000
# Side of the matrices whose product measures the speed of the machine.
_PROBE = 2048


@dataclass(frozen=True)
class Speed:
    """Times of a variant.

    Attributes:
        train_s: Median seconds of one training step.
        predict_s: Median seconds of one prediction of a batch.
        folded_s: The same for the folded network.
        flops: Floating-point operations per second of a large matrix product in the same precision.
        peak_bytes: Largest memory use of a step (on a CPU: of the process since its start; 0 on Windows).
    """

    name: str
    batch_size: int
    image_size: int
    device: str
    train_s: float
    predict_s: float
    folded_s: float
    flops: float
    peak_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the inference of one image of `image_size`."""
        return count(variant_of(self.name), image_size=self.image_size).macs

    def share(self, seconds: float, *, passes: int = 1) -> float:
        """Return the fraction of `seconds` in which a batch could be multiplied at the rate `flops`."""
        return 2 * passes * self.macs * self.batch_size / self.flops / seconds


def measure(
    name: str,
    *,
    batch_size: int = 8,
    image_size: int = 0,
    device: str = "auto",
    precision: str = "float32",
    compiled: bool = False,
    rounds: int = 5,
) -> Speed:
    """Measure the variant `name` with random weights and random images.

    Training, prediction and folded prediction alternate, `rounds` times after one warm-up round, so that a machine that
    slows down affects all of them.

    Args:
        name: Name of a variant.
        batch_size: Images per batch.
        image_size: Side of the images in pixels; 0 is the training size of the variant.
        device: "auto" is the first GPU, else the CPU.
        precision: "float32" or "bfloat16".
        compiled: Whether to use torch.compile.
        rounds: Number of measurements of which the median is taken.

    Raises:
        ValueError: The name or a value is not allowed.
    """
    for option, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(problem(f"{option}={value}", allowed="1 or more"))
    size = image_size or variant_of(name).train_size
    resolved = resolve(
        Config.model_validate(
            {
                "data": "synthetic", "model": name, "device": device, "precision": precision, "compile": compiled,
                "input": InputConfig(batch_size=batch_size, image_size=size), "augment": AugmentConfig(mixup=0.2, cutmix=1.0),  # noqa: E501
            }
        )
    )  # fmt: skip
    trainer = Trainer(resolved, num_classes=_CLASSES, samples=batch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch_size, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(_CLASSES, (batch_size,), generator=generator)
    batch = Batch(images, labels, torch.arange(batch_size), ("",) * batch_size, step=0, epoch=0)
    inputs, _ = trainer.prepare(batch, 0)
    plain = fold(trainer.net).to(trainer.device)
    arms: dict[str, Callable[[], object]] = {
        "train": lambda: trainer.step(batch, 0),
        "predict": lambda: _predict(trainer.net, inputs),
        "folded": lambda: _predict(plain, inputs),
    }
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds + 1):
        for arm, run in arms.items():
            took = _timed(run, trainer.device)
            if turn:
                seconds[arm].append(took)
    best = {arm: statistics.median(values) for arm, values in seconds.items()}
    return Speed(name, batch_size, size, str(trainer.device), best["train"], best["predict"], best["folded"],
                 matmul_rate(trainer.device, precision), _peak(trainer.device))  # fmt: skip


def matmul_rate(device: torch.device, precision: str = "float32", *, rounds: int = 5) -> float:
    """Return the floating-point operations per second of a large square matrix product, the best of `rounds`."""
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    side = _PROBE if device.type == "cpu" else 4 * _PROBE
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    best = min(_timed(lambda: a @ b, device) for _ in range(rounds + 1))
    return 2 * side**3 / best


@torch.inference_mode()
def _predict(net: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of `images` in evaluation mode."""
    logits: Tensor = net.eval()(images)
    return logits


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call of `run`, until the device has finished."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak(device: torch.device) -> int:
    """Return the largest memory use in bytes, or 0 if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
