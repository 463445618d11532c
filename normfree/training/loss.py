"""The loss of a batch for each value of the config's `objective`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from normfree.training.choices import OBJECTIVES, parse_choice

# Takes logits B K and targets B K; returns the sum over the images, so that micro-batches add up to their batch.
BatchLoss = Callable[[Tensor, Tensor], Tensor]


def batch_loss(objective: str) -> BatchLoss:
    """Return the loss that a value of `objective` names."""
    choice = parse_choice(objective, OBJECTIVES)
    if choice.name == "classify":
        return cross_entropy
    threshold, total = choice["threshold"], choice["sum"]
    return lambda logits, targets: binary_cross_entropy(logits, targets, threshold=threshold, total=total)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the softmax cross entropy with soft targets, summed over the images."""
    return F.cross_entropy(logits, targets, reduction="sum")


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, threshold: float = 0.0, total: bool = False
) -> Tensor:
    """Return the binary cross entropy of each class, averaged over the classes and summed over the images.

    Args:
        logits: B K.
        targets: B K in [0, 1].
        threshold: above 0, targets above it become 1 and the others 0.
        total: sum over the classes too.

    Source: Wightman et al. 2021 (arXiv 2110.00476); timm's `BinaryCrossEntropy`.
    """
    if threshold > 0.0:
        targets = (targets > threshold).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss if total else loss / logits.shape[1]
