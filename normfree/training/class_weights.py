"""Class weights in the loss, for data in which some classes are rare.

The weight of an image is (images of its class) ** -power, times a constant that makes the mean over the training images
1. So the loss keeps its scale, an untrained network has the same loss as without weights, and learning rate and
clipping threshold keep their meaning. With power 1 all classes have the same total weight, as if the images of rare
classes were repeated until all classes were equally large; with power 0.5 the ratios of total weights are the square
roots of those of the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.data.source import Source
from normfree.scores import Evaluation


def class_weights(source: Source, power: float) -> Tensor | None:
    """Return the weight of an image of each class, float32 K, or None for power 0.

    A class without images has weight 0, which is never used.
    """
    if power == 0:
        return None
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    counts = torch.bincount(labels, minlength=len(source.classes)).double()
    weights = torch.where(counts > 0, counts.clamp(min=1).pow(-power), 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def weigh(targets: Tensor, weights: Tensor, *, label_smoothing: float) -> Tensor:
    """Multiply soft targets by the weights of their classes, then smooth them, which keeps the sum of each row.

    Cross entropy is linear in its targets. So the row Σ share · weight · label of a mixed image gives the weighted sum
    of the losses for each of its labels, and the loss of a batch stays a sum over images.

    Args:
        targets: B K before smoothing. Rows sum to 1: one label, or the two labels of a mixed image by their shares.
        weights: K.
    """
    weighed = targets * weights
    return weighed * (1 - label_smoothing) + weighed.mean(dim=1, keepdim=True) * label_smoothing


def weighted_top1(evaluation: Evaluation, weights: Tensor | None) -> float:
    """Return top-1 in percent with images weighted by class; plain top-1 without weights.

    With weights of power 1 it is the mean of top-1 over classes, if classes are as frequent as in the training data.
    """
    if weights is None:
        return evaluation.top1
    counts = weights.double()[evaluation.labels]
    right = evaluation.predictions == evaluation.labels
    return 100.0 * float(counts[right].sum() / counts.sum())
