"""Weights of classes in the loss, for data in which some classes are rare.

The weight of an image is 1 / (images of its class) to a power, times a constant that makes the mean over the training
images 1. So the loss keeps its scale, a network that knows nothing has the same loss as without weights, and learning
rate and clipping keep their meaning. Power 1 lets every class count alike, as if the images of rare classes were
repeated until all classes were equally large; power 0.5 goes half of the way on a logarithmic scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normfree.data.source import Source
from normfree.inference import Evaluation


def class_weights(source: Source, power: float) -> Tensor | None:
    """float32 K: the weight of an image of each class of `source`, or None for power 0. A class without images has 0:
    nothing can ask for it."""
    if power == 0:
        return None
    labels = torch.tensor([source.label(i) for i in range(len(source))])
    counts = torch.bincount(labels, minlength=len(source.classes)).double()
    weights = torch.where(counts > 0, counts.clamp(min=1).pow(-power), 0.0)
    return (weights * counts.sum() / (weights * counts).sum()).float()


def weigh(targets: Tensor, weights: Tensor, *, label_smoothing: float) -> Tensor:
    """Soft targets B K of which every label counts by its weight; then smoothed, which keeps each row's sum.

    targets: B K before smoothing, rows that sum to 1: one label, or the two of a mixed image by their shares. Cross
    entropy is linear in its targets, so a row Σ share · weight · label is the mixed image's loss for each of its
    labels, each as that label's image would count alone. The loss of a batch stays a sum over images.
    """
    weighed = targets * weights
    return weighed * (1 - label_smoothing) + weighed.mean(dim=1, keepdim=True) * label_smoothing


def score(evaluation: Evaluation, weights: Tensor | None) -> float:
    """Percent correct where an image counts by the weight of its class: top-1 without weights, and with those of
    power 1 the mean over classes, if the classes are as frequent in both sources."""
    if weights is None:
        return evaluation.top1
    counts = weights.double()[evaluation.labels]
    right = evaluation.predictions == evaluation.labels
    return 100.0 * float(counts[right].sum() / counts.sum())
