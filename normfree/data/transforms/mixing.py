"""Mixup and cutmix: two images and their labels become one.

`mix` takes partners from the batch itself. `FreshPairs` is the reference's way: every output mixes two images that
were read for it alone, on raw pixel values, and RandAugment comes after.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot


# torchvision's v2.MixUp and v2.CutMix draw one lambda for a whole batch, from the global generator. The
# reference draws one per example, and a resumed run must draw the same numbers again: hence these few lines
# of our own.
def mix(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    generator: torch.Generator,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mixed images (floating point, B C H W) and soft targets (float32, B K) from class numbers (int64, B).

    Each example is mixed with another one of the batch. mixup: lambda ~ Beta(mixup, mixup) per example, the
    image is lambda * own + (1 - lambda) * other. cutmix: u ~ Beta(cutmix, cutmix) per example (1 is the
    reference's uniform); a box of sides int(sqrt(1 - u) * H), int(sqrt(1 - u) * W) about a uniform centre,
    clipped at the border, keeps the own image, the other one fills the rest, and the label weight is the
    exact share of pixels. With both, the first half of the batch is mixup and the second half cutmix, as in
    the reference code. Targets are smoothed last: y * (1 - s) + s / K. With everything at 0 the images come
    back as they are.

    Mixing normalised images equals normalising mixed ones, as the weights add up to 1. All draws happen on
    the CPU, from one number of `generator`, so every device gets the same ones.
    """
    _check_mix(images, mixup=mixup, cutmix=cutmix, label_smoothing=label_smoothing)
    targets = one_hot(labels, num_classes).float()
    batch, _, height, width = images.shape
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    if mixup > 0 or cutmix > 0:
        first_cut = _first_cut(batch, mixup, cutmix)
        # A shift by 1 .. B-1 pairs nobody with himself, and the order of the batch is random already.
        other = np.roll(np.arange(batch), int(rng.integers(1, batch)) if batch > 1 else 0)
        weights = np.ones((batch, 1, height, width), dtype=np.float32)
        if first_cut > 0:
            weights[:first_cut] = rng.beta(mixup, mixup, size=(first_cut, 1, 1, 1))
        if first_cut < batch:
            weights[first_cut:] = _boxes(batch - first_cut, height, width, cutmix, rng)
        share = torch.from_numpy(weights.mean(axis=(1, 2, 3), dtype=np.float64)).to(targets).unsqueeze(1)
        mask = torch.from_numpy(weights).to(images)
        partner = torch.from_numpy(other).to(images.device)
        images = torch.lerp(images[partner], images, mask)
        targets = share * targets + (1 - share) * targets[partner]
    return images, smooth(targets, label_smoothing)


def _first_cut(batch_size: int, mixup: float, cutmix: float) -> int:
    """Where in a batch mixup ends and cutmix begins: with both, each has half (released code)."""
    if mixup > 0 and cutmix > 0:
        return (batch_size + 1) // 2
    return 0 if cutmix > 0 else batch_size


def smooth(targets: Tensor, label_smoothing: float) -> Tensor:
    """Soft targets B K with `label_smoothing` of their mass spread over all classes: y * (1 - s) + s / K."""
    if label_smoothing == 0:
        return targets
    return targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]


def _boxes(count: int, height: int, width: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    # count 1 H W, 1 inside the box and 0 outside. Half a side is rounded down on both flanks of the centre,
    # as in the reference (dataset.py, cutmix_padding).
    side = np.sqrt(1 - rng.beta(alpha, alpha, size=count))

    def inside(length: int) -> np.ndarray:
        half = (side * length).astype(np.int64) // 2
        centre = rng.integers(0, length, size=count)
        places = np.arange(length)
        return (places >= (centre - half)[:, None]) & (places < (centre + half)[:, None])

    rows, columns = inside(height), inside(width)
    return (rows[:, None, :, None] & columns[:, None, None, :]).astype(np.float32)


# --- the reference's way -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreshPairs:
    """How one output is made of two images read for it (reference code, dataset.py: `augment_before_mix=False`).

    `mixup` and `cutmix` as in `mix`: with both, the first half of a batch is mixup, the second cutmix. `after`
    augments the mixed picture (uint8 H W C, and a generator for its draws), which is first cut to 0 ... 255 and to
    whole numbers; without it pixels stay as they are, float32.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    after: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or self.mixup == self.cutmix == 0:
            raise ValueError(
                f"fresh pairs with mixup={self.mixup}, cutmix={self.cutmix}. Allowed: 0 or more, and one of them "
                "above 0. Fix: mixup=0.2, cutmix=1.0"
            )

    def places(self, output: int, batch_size: int) -> tuple[int, int, bool]:
        """Of the 2 · `batch_size` images read for a batch: which two make output number `output`, and whether by
        cutmix. In quarters Q0 … Q3, the first half is mixup of (Q0, Q1), the second cutmix of (Q2, Q3)."""
        first = _first_cut(batch_size, self.mixup, self.cutmix)
        if output < first:
            return output, first + output, False
        second = batch_size - first
        own = 2 * first + output - first
        return own, own + second, True

    def combine(
        self, own: Tensor, other: Tensor, *, cut: bool, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Two pictures (uint8 C H W) and the draws -> the mixed one and the share of `own` in its label."""
        height, width = own.shape[-2:]
        if cut:
            mask = torch.from_numpy(_boxes(1, height, width, self.cutmix, rng)[0])
            share = float(mask.mean(dtype=torch.float64))
        else:
            share = float(np.float32(rng.beta(self.mixup, self.mixup)))
            mask = torch.full((1, 1, 1), share)
        mixed = mask * own.float() + (1 - mask) * other.float()
        if self.after is None:
            return mixed, share
        pixels = mixed.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        return torch.from_numpy(np.ascontiguousarray(self.after(pixels, rng).transpose(2, 0, 1))), share


def paired_targets(
    labels: Tensor, partners: Tensor, share: Tensor, *, num_classes: int, label_smoothing: float = 0.0
) -> Tensor:
    """Soft targets B K (float32) of pairs: `share` (B) of the first label, the rest of the second, then smoothed."""
    weights = share.float().unsqueeze(1)
    first, second = (one_hot(x, num_classes).float() for x in (labels, partners))
    return smooth(weights * first + (1 - weights) * second, label_smoothing)


def _check_mix(images: Tensor, **options: float) -> None:
    if not images.is_floating_point():
        raise ValueError(
            f"mix of {images.dtype} images. Allowed: floating point. Fix: images = normalize(images)"
        )
    for option, value in options.items():
        if option != "label_smoothing" and value < 0:
            raise ValueError(f"{option}={value}. Allowed: 0 (off) or more. Fix: {option}=0")
        if option == "label_smoothing" and not 0 <= value < 1:
            raise ValueError(f"{option}={value}. Allowed: 0 (off) up to, not including, 1. Fix: {option}=0.1")
