"""Scores of images with several classes: average precision and F1.

Shapes: K classes, N images. All scores are percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

# Probability from which a class counts as predicted.
THRESHOLD = 0.5


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of independent classes.

    Attributes:
        mean_average_precision: mean over the classes that have images (mAP).
        micro_f1: F1 of all decisions together.
        macro_f1: mean F1 of the classes that have images.
        average_precision: of each class that has images.
        f1: of each class that has images.
    """

    mean_average_precision: float
    micro_f1: float
    macro_f1: float
    average_precision: dict[str, float]
    f1: dict[str, float]


def multilabel_scores(
    probabilities: Tensor, targets: Tensor, classes: tuple[str, ...], *, threshold: float = THRESHOLD
) -> MultiLabelScores:
    """Return the scores of probabilities N K for targets N K of 0 and 1.

    The average precision of a class is the mean, over its images, of the precision among the images that are ranked at
    least as high: sklearn's `average_precision_score`. F1 counts the classes with at least `threshold`.

    Examples:
        >>> probabilities = torch.tensor([[0.9, 0.2], [0.6, 0.8], [0.7, 0.4]])
        >>> scores = multilabel_scores(probabilities, torch.tensor([[1, 0], [1, 1], [0, 0]]), ("cat", "dog"))
        >>> {name: round(value, 1) for name, value in scores.average_precision.items()}, round(scores.micro_f1, 1)
        ({'cat': 83.3, 'dog': 100.0}, 85.7)
    """
    p, y = probabilities.double(), targets.double()
    chosen = (p >= threshold).double()
    right, both = (chosen * y).sum(0), chosen.sum(0) + y.sum(0)
    present = [k for k in range(len(classes)) if y[:, k].any()]
    f1 = {classes[k]: 200.0 * float(right[k] / both[k]) for k in present}
    precision = {classes[k]: 100.0 * _average_precision(p[:, k], y[:, k]) for k in present}
    total = float(both.sum())
    return MultiLabelScores(
        mean_average_precision=fmean(precision.values()) if present else 0.0,
        micro_f1=200.0 * float(right.sum()) / total if total else 0.0,
        macro_f1=fmean(f1.values()) if present else 0.0,
        average_precision=precision,
        f1=f1,
    )


def _average_precision(probabilities: Tensor, targets: Tensor) -> float:
    """Return the average precision of one class; images of equal probability are ranked together."""
    at_least = (probabilities[None, :] >= probabilities[targets > 0, None]).double()
    return float(((at_least * targets).sum(1) / at_least.sum(1)).mean())
