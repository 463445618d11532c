"""What a run on images with several classes checks, reports and is judged by."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normfree.data.multilabel import as_multilabel, targets_of
from normfree.data.source import Split
from normfree.scores import Evaluation
from normfree.suggest import problem
from normfree.training.choices import uses_sigmoid
from normfree.training.class_weights import weighted_top1
from normfree.training.config import Config


def check_labels(split: Split, config: Config) -> None:
    """Check that the objective and the patience of a run suit its data.

    Raises:
        ValueError: images have several classes and the objective learns one for each image, or there is a patience
            without images that are held out.
    """
    if config.patience and not split.held_out:
        given = f"patience={config.patience} with input.val_fraction=0, which holds out no images to choose a step by"
        raise ValueError(problem(given, fix="--patience 0"))
    if as_multilabel(split.train) is not None and not uses_sigmoid(config.objective):
        given = f"{_several_classes(split)}, and objective={config.objective!r} learns one for each image"
        raise ValueError(problem(given, allowed="objective='bce'", fix="--objective bce"))


def _several_classes(split: Split) -> str:
    """Return the first training image without exactly one class, with its classes, or that there may be such images."""
    for index in range(len(split.train)):
        classes = targets_of(split.train, [index])[0].nonzero()[:, 0].tolist()
        if len(classes) != 1:
            names = ", ".join(repr(split.classes[k]) for k in classes)
            has = f"has the classes {names}" if names else "has no class"
            return f"{split.train.name(index)} {has}"
    return "images may have several classes"


def deciding_score(average: Evaluation, class_weights: Tensor | None) -> float:
    """Return the score of the averaged weights that chooses the best step: mAP for images with several classes, else
    top-1."""
    if average.several is not None:
        return average.several.mean_average_precision
    return weighted_top1(average, class_weights)


def logged_scores(weights: Evaluation, average: Evaluation) -> dict[str, float]:
    """Return mAP and F1 for metrics.jsonl if images have several classes, else nothing."""
    found = {}
    for prefix, one in (("", weights.several), ("ema_", average.several)):
        if one is not None:
            found[f"{prefix}map"] = one.mean_average_precision
            found[f"{prefix}micro_f1"] = one.micro_f1
    return found


def scores_text(evaluation: Evaluation) -> str:
    """Return mAP and F1 of an evaluation as text; "" if images have one class each."""
    one = evaluation.several
    if one is None:
        return ""
    return f"mAP {one.mean_average_precision:.2f} %, F1 at 0.5: micro {one.micro_f1:.2f} %, macro {one.macro_f1:.2f} %"


def saved_scores(evaluation: Evaluation) -> dict[str, Any]:
    """Return mAP, F1 and the average precision of each class for results.json; empty if images have one class each."""
    return {} if evaluation.several is None else vars(evaluation.several)
