"""Scores of an evaluation: accuracy, precision, recall, F1, confusion matrix and calibration.

Shapes: K classes, N images. All rates are percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from normfree.files import read_model
from normfree.multilabel_scores import MultiLabelScores
from normfree.uncertainty import Interval, accuracy_digits, accuracy_text, wilson_interval

_RESULTS_BYTES = 64_000_000  # of a results.json; the confusion matrix of 1,000 classes takes 8 MB
# Top-5 accuracy is shown above this number of classes; chance is then below one half.
TOP5_ABOVE = 10
# Bins of the calibration error: Guo et al. 2017 (arXiv 1706.04599), section 5.
BINS = 15


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class.

    Attributes:
        images: images of the class.
        predicted: images that were given the class.
        precision: percent of `predicted` that are of the class; None if nothing was given it.
        recall: percent of `images` that were given the class; None if there are none.
        f1: harmonic mean of the two, 0 if both are 0; None for a class without images.
    """

    images: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


class SavedScores(BaseModel):
    """Scores of one evaluation in a results.json, as far as they are shown later; other entries are kept too."""

    model_config = ConfigDict(extra="allow", frozen=True)
    top1: float = Field(ge=0, le=100)
    top5: float
    loss: float
    images: int = Field(ge=1)
    per_class_top1: dict[str, float]
    confusion: list[list[int]] = []


class _Results(BaseModel):
    """A results.json."""

    model_config = ConfigDict(extra="allow", frozen=True)
    weights: SavedScores
    average: SavedScores
    steps: int


def read_results(path: Path) -> dict[str, Any]:
    """Return the results.json of a run.

    Raises:
        ValueError: it cannot be read, or lacks scores.
    """
    return read_model(path, _Results, limit=_RESULTS_BYTES, fix="restore it, or train again").model_dump()


def shown_top1(scores: Mapping[str, Any]) -> str:
    """Return the text of top-1 and its interval for scores of a results.json, which has `top1` and `images`.

    >>> shown_top1({"top1": 75.0, "images": 100})
    '75.0 (65.7 to 82.5)'
    """
    return accuracy_text(round(scores["top1"] / 100 * scores["images"]), scores["images"])


@dataclass(frozen=True)
class Evaluation:
    """Scores of a network on a source.

    Attributes:
        top1: percent of images whose most probable class is correct.
        top5: percent of images whose correct class is among the five most probable.
        loss: mean cross entropy in nats.
        count: number of images N.
        classes: the class names.
        labels: true classes, int64 N, in the order of the source.
        predictions: most probable classes, int64 N.
        losses: cross entropy of each image in nats, float64 N.
        confidences: probability of the most probable class, from 0 to 1, float64 N; None if it was not computed.
        several: scores of independent classes, if images have several; then an image counts as correct if its most
            probable class is one of its classes, and `labels` has that class, or its first one.
    """

    top1: float
    top5: float
    loss: float
    count: int
    classes: tuple[str, ...]
    labels: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)
    losses: Tensor = field(repr=False)
    confidences: Tensor | None = field(default=None, repr=False)
    several: MultiLabelScores | None = field(default=None, repr=False, kw_only=True)

    def confusion(self) -> Tensor:
        """Return the confusion matrix, counts K x K: row = true class, column = predicted class."""
        size = len(self.classes)
        return torch.bincount(self.labels * size + self.predictions, minlength=size * size).view(size, size)

    def per_class(self) -> dict[str, float]:
        """Return the top-1 accuracy in percent of each class that has images."""
        return {name: one.recall for name, one in self.class_scores().items() if one.recall is not None}

    def class_scores(self) -> dict[str, ClassScores]:
        """Return precision, recall and F1 of each class."""
        table = self.confusion()
        found = {}
        for i, name in enumerate(self.classes):
            right, images, predicted = int(table[i, i]), int(table[i].sum()), int(table[:, i].sum())
            precision = 100.0 * right / predicted if predicted else None
            recall = 100.0 * right / images if images else None
            f1 = 200.0 * right / (images + predicted) if images else None
            found[name] = ClassScores(images, predicted, precision, recall, f1)
        return found

    @property
    def hits(self) -> int:
        """The number of images whose most probable class is correct."""
        return round(self.top1 / 100 * self.count)

    @property
    def top1_interval(self) -> Interval:
        """The 95 % Wilson interval of `top1`, in percent."""
        return Interval(*(100 * end for end in wilson_interval(self.hits, self.count)))

    def top1_text(self) -> str:
        """Return top-1 in percent with its interval, in as many digits as the number of images supports."""
        return accuracy_text(self.hits, self.count)

    def top5_text(self) -> str:
        """Return top-5 in percent; "" if there are too few classes for it to mean something."""
        return f"{self.top5:.{accuracy_digits(self.count)}f}" if len(self.classes) > TOP5_ABOVE else ""

    @property
    def majority(self) -> float:
        """The percentage of images of the largest class: the top-1 of a network that always answers it."""
        return 100.0 * int(torch.bincount(self.labels).max()) / self.count

    @property
    def balanced_top1(self) -> float:
        """The mean recall of the classes that have images, in percent."""
        return fmean(self.per_class().values())

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that have images, in percent."""
        return fmean(one.f1 for one in self.class_scores().values() if one.f1 is not None)

    def calibration_error(self, bins: int = BINS) -> float:
        """Return the expected calibration error in percent.

        It is the mean over images of the difference between accuracy and mean confidence, in bins of equal width of the
        confidence.

        Source: Guo et al. 2017 (arXiv 1706.04599), equation 3.
        """
        assert self.confidences is not None
        right = (self.predictions == self.labels).double()
        number = (self.confidences * bins).ceil().long().clamp(1, bins) - 1
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, right - self.confidences)
        return 100.0 * float(sums.abs().sum()) / self.count
