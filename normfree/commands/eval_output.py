"""Files that `normfree eval` writes: the answer for each image, and the confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from normfree.files import atomic_write, atomic_write_text, csv_text, spreadsheet_cell
from normfree.suggest import number_of, printable

if TYPE_CHECKING:
    from normfree.scores import Evaluation


def write_answers(score: Evaluation, names: Sequence[str], path: Path) -> None:
    """Write path, class, predicted class, confidence, loss and whether it is right for each image."""
    assert score.confidences is not None
    rows = []
    for index, name in enumerate(names):
        label, predicted = int(score.labels[index]), int(score.predictions[index])
        rows.append(
            {
                "path": printable(name),
                "class": score.classes[label], "predicted": score.classes[predicted], "right": label == predicted,
                "confidence": round(float(score.confidences[index]), 6), "loss": round(float(score.losses[index]), 6),
            }
        )  # fmt: skip
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = csv_text([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)])
    atomic_write_text(path, text)


def write_confusion(score: Evaluation, path: Path) -> None:
    """Write the confusion matrix as a plot (.png) or a table (.csv), with a row for each true class."""
    counts = score.confusion().tolist()
    if path.suffix == ".png":
        from normfree.diagnose.run_figures import confusion_figure

        title = f"top-1 {score.top1:.1f} % on {number_of(score.count, 'image')}"
        figure = confusion_figure(counts, score.classes, title=title)
        atomic_write(path, lambda target: figure.savefig(target, dpi=120, format="png"))
        return
    names = [_cell(name) for name in score.classes]
    rows = [["class", *names], *([name, *row] for name, row in zip(names, counts, strict=True))]
    atomic_write_text(path, csv_text(rows))


def _cell(value: object) -> object:
    """Return a value for a CSV file; a text is made safe for spreadsheets."""
    return spreadsheet_cell(value) if isinstance(value, str) else value
