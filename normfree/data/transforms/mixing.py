"""Mixup and cutmix: two images and their labels become one.

`mix` takes partners from the same batch. `FreshPairs` does as the reference code: every output mixes two images that
were read only for it, on raw pixel values, and RandAugment is applied afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from normfree.suggest import problem


# torchvision's v2.MixUp and v2.CutMix draw one lambda for a whole batch, from the global generator. The reference draws
# one per example, and a resumed run must draw the same numbers again, so mixing is implemented here.
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
    """Mix each image with another one of the batch, and the labels accordingly.

    Mixup draws lambda ~ Beta(mixup, mixup) per example and returns lambda * own + (1 - lambda) * other. Cutmix draws
    u ~ Beta(cutmix, cutmix) per example (1 is the reference's uniform). A box of sides int(sqrt(1 - u) * H),
    int(sqrt(1 - u) * W) around a uniformly drawn center, clipped at the border, keeps the own image, the other image
    fills the rest, and the label weight is the exact share of pixels. With both, the first half of the batch is mixup
    and the second half cutmix, as in the reference code. Targets are smoothed last: y * (1 - s) + s / K.

    Mixing normalized images equals normalizing mixed ones, because the weights sum to 1. All draws happen on the CPU,
    from one number of `generator`, so they are the same for every device.

    Args:
        images: Floating point, B C H W.
        labels: Class numbers, int64 B, or targets, float32 B K.
        num_classes: Number of classes K.
        generator: CPU generator.
        mixup: Parameter of the Beta distribution; 0 disables mixup.
        cutmix: Parameter of the Beta distribution; 0 disables cutmix.
        label_smoothing: Smoothing s, 0 up to but not including 1.

    Returns:
        The mixed images, and soft targets in float32, B K. With all options 0 the images are unchanged.

    Raises:
        ValueError: `images` is not floating point, or an option is out of range.
    """
    _check_mix(images, mixup=mixup, cutmix=cutmix, label_smoothing=label_smoothing)
    targets = labels if labels.ndim == 2 else one_hot(labels, num_classes).float()
    batch, _, height, width = images.shape
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    if mixup > 0 or cutmix > 0:
        first_cut = _first_cut(batch, mixup, cutmix)
        # A shift by 1 to B - 1 pairs no example with itself, and the order of the batch is random already.
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
    """Return the index in a batch where mixup ends and cutmix begins: with both, each has half (reference code)."""
    if mixup > 0 and cutmix > 0:
        return (batch_size + 1) // 2
    return 0 if cutmix > 0 else batch_size


def smooth(targets: Tensor, label_smoothing: float) -> Tensor:
    """Return y * (1 - s) + s / K for targets y (B K): the share s = `label_smoothing` is spread over all classes."""
    if label_smoothing == 0:
        return targets
    return targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]


def _boxes(count: int, height: int, width: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Draw masks, `count` 1 H W, that are 1 inside a box and 0 outside.

    Half a side is rounded down on both sides of the center, as in the reference code (dataset.py, cutmix_padding).
    """
    side = np.sqrt(1 - rng.beta(alpha, alpha, size=count))

    def inside(length: int) -> np.ndarray:
        half = (side * length).astype(np.int64) // 2
        center = rng.integers(0, length, size=count)
        positions = np.arange(length)
        return (positions >= (center - half)[:, None]) & (positions < (center + half)[:, None])

    rows, columns = inside(height), inside(width)
    return (rows[:, None, :, None] & columns[:, None, None, :]).astype(np.float32)


@dataclass(frozen=True)
class FreshPairs:
    """Rule that makes one output of two images read for it (reference code, dataset.py: `augment_before_mix=False`).

    Attributes:
        mixup: As in `mix`. With both, the first half of a batch is mixup and the second half cutmix.
        cutmix: As in `mix`.
        after: Augments the mixed image (uint8 H W C, and a generator for its draws), which is first clipped to 0 to
            255 and truncated to whole numbers. Without it the pixels remain float32.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    after: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if min(self.mixup, self.cutmix) < 0 or self.mixup == self.cutmix == 0:
            raise ValueError(
                problem(
                    f"fresh pairs with mixup={self.mixup}, cutmix={self.cutmix}",
                    allowed="0 or more, and one of them above 0",
                    fix="mixup=0.2, cutmix=1.0",
                )
            )

    def positions(self, output: int, batch_size: int) -> tuple[int, int, bool]:
        """Return the positions of the two images of output `output`, and True if they are mixed by cutmix.

        The positions are among the 2 * `batch_size` images read for a batch. If these are divided into quarters Q0 to
        Q3, the first half of the outputs is mixup of (Q0, Q1), the second half cutmix of (Q2, Q3).
        """
        first = _first_cut(batch_size, self.mixup, self.cutmix)
        if output < first:
            return output, first + output, False
        second = batch_size - first
        own = 2 * first + output - first
        return own, own + second, True

    def combine(
        self, own: Tensor, other: Tensor, *, cut: bool, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Return the mix of two images (uint8 C H W) and the share of `own` in its label, drawing from `rng`."""
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
    """Return soft targets, float32 B K: `share` (B) of the first label, the rest of the second, then smoothed."""
    weights = share.float().unsqueeze(1)
    first, second = (one_hot(x, num_classes).float() for x in (labels, partners))
    return smooth(weights * first + (1 - weights) * second, label_smoothing)


def _check_mix(images: Tensor, **options: float) -> None:
    """Raise `ValueError` for images that are not floating point and for options out of range."""
    if not images.is_floating_point():
        raise ValueError(
            problem(
                f"mix of {images.dtype} images", allowed="floating point", fix="images = normalize(images)"
            )
        )
    for option, value in options.items():
        if option != "label_smoothing" and value < 0:
            raise ValueError(problem(f"{option}={value}", allowed="0 (off) or more", fix=f"{option}=0"))
        if option == "label_smoothing" and not 0 <= value < 1:
            raise ValueError(
                problem(f"{option}={value}", allowed="0 (off) up to, not including, 1", fix=f"{option}=0.1")
            )
