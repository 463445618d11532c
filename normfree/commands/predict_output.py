"""What `normfree predict` writes: predictions as text, CSV, JSON or a page, and heat maps as files."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from normfree.data.transforms.decode import suffixes
from normfree.diagnose.html_page import PageSection, image_cards, jpeg, page, table
from normfree.files import spreadsheet_cell
from normfree.suggest import number_of, printable

if TYPE_CHECKING:
    from normfree.prediction import Answer, Prediction

FORMATS = ("table", "csv", "jsonl", "json", "html")
# Smallest and largest length in pixels of the longest side of an image on the page, and of a heat map.
THUMBNAIL, HEATMAP = (1, 160), (320, 640)


class PredictionWriter(Protocol):
    """Writes predictions one by one in the order of the images, and then what has to come last."""

    def write(self, answer: Answer, heatmap: str) -> None:
        """Write a prediction; `heatmap` is the file with its heat map, or ""."""

    def close(self) -> None: ...


def writer_of(
    format: str, file: IO[str], *, classes: Sequence[str], wide: bool, title: str
) -> PredictionWriter:
    """Return the writer of a format.

    Args:
        format: one of FORMATS.
        file: where it writes.
        classes: the model's classes.
        wide: one line for each image and one column for each class, for "csv".
        title: title of the page, for "html".
    """
    if format == "html":
        return _PageWriter(file, title)
    if format == "csv":
        return _WideWriter(file, classes) if wide else _CsvWriter(file)
    return _TableWriter(file) if format == "table" else _JsonWriter(file, lines=format == "jsonl")


class _TableWriter:
    """Lines for a terminal."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, answer: Answer, heatmap: str) -> None:
        found = answer.prediction
        text = printable(found.error, one_line=True) or "   ".join(_shown(c, p) for c, p in _pairs(found))
        print(f"{printable(found.path, one_line=True)}   {text}", file=self.file, flush=True)

    def close(self) -> None:
        pass


class _CsvWriter:
    """A line for each image and class."""

    def __init__(self, file: IO[str]) -> None:
        self.rows = csv.writer(file)
        self.rows.writerow(["path", "rank", "class", "probability", "error"])

    def write(self, answer: Answer, heatmap: str) -> None:
        found = answer.prediction
        path, error = printable(found.path), printable(found.error)
        rows = [[path, str(i), c, f"{p:.6f}", ""] for i, (c, p) in enumerate(_pairs(found), start=1)]
        rows = rows or [[path, "", "", "", error]]
        self.rows.writerows([[spreadsheet_cell(cell) for cell in row] for row in rows])

    def close(self) -> None:
        pass


class _WideWriter:
    """A line for each image, with a column for each class."""

    def __init__(self, file: IO[str], classes: Sequence[str]) -> None:
        self.rows, self.classes = csv.writer(file), classes
        self.rows.writerow(["path", "class", *map(spreadsheet_cell, classes), "error"])

    def write(self, answer: Answer, heatmap: str) -> None:
        found, by_class = answer.prediction, dict(_pairs(answer.prediction))
        best = found.classes[0] if found.classes else ""
        numbers = [f"{by_class[name]:.6f}" if by_class else "" for name in self.classes]
        path, best, error = (spreadsheet_cell(printable(text)) for text in (found.path, best, found.error))
        self.rows.writerow([path, best, *numbers, error])

    def close(self) -> None:
        pass


class _JsonWriter:
    """An object for each image, one a line, or in an array."""

    def __init__(self, file: IO[str], *, lines: bool) -> None:
        self.file, self.lines, self.count = file, lines, 0

    def write(self, answer: Answer, heatmap: str) -> None:
        found = answer.prediction
        # The name of a file need not be valid UTF-8.
        entry: dict[str, Any] = {"path": printable(found.path)}
        if found.error:
            entry["error"] = printable(found.error)
        else:
            entry["top"] = [{"class": c, "probability": round(p, 6)} for c, p in _pairs(found)]
        if heatmap:
            entry["heatmap"] = heatmap
        before = "" if self.lines else ",\n" if self.count else "[\n"
        print(
            before + json.dumps(entry, ensure_ascii=False),
            end="\n" if self.lines else "",
            file=self.file,
            flush=True,
        )
        self.count += 1

    def close(self) -> None:
        if not self.lines:
            print("\n]" if self.count else "[]", file=self.file)


class _PageWriter:
    """A page with the images by predicted class, the most probable first."""

    def __init__(self, file: IO[str], title: str) -> None:
        self.file, self.title = file, title
        self.cards: dict[str, list[tuple[float, tuple[bytes, str, list[str]]]]] = {}
        self.errors: list[str] = []

    def write(self, answer: Answer, heatmap: str) -> None:
        found, image = answer.prediction, answer.heat or answer.view
        if image is None:
            self.errors.append(printable(found.error))
            return
        image = image.copy()
        image.thumbnail((THUMBNAIL[1], THUMBNAIL[1]))
        (best, probability), *others = _pairs(found)
        lines = [_shown(best, probability), *(_shown(c, p) for c, p in others), printable(found.path)]
        card = jpeg(image), f"{printable(found.path)}, predicted {best}", lines
        self.cards.setdefault(best, []).append((probability, card))

    def close(self) -> None:
        sections = []
        for name, cards in sorted(self.cards.items(), key=lambda item: (-len(item[1]), item[0])):
            cards.sort(key=lambda entry: -entry[0])
            sections.append(PageSection(f"{name}: {len(cards)}", image_cards(card for _, card in cards)))
        if self.errors:
            rows = [[error] for error in self.errors]
            sections.append(PageSection(f"Could not be read: {len(rows)}", table(["error"], rows)))
        count = sum(map(len, self.cards.values()))
        facts = (
            f"{number_of(count, 'image')} in {number_of(len(self.cards), 'class')}, the most probable first"
        )
        self.file.write(page(self.title, facts, sections))


class HeatmapFolder:
    """A folder of images with their heat maps, named after the images."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.names, self.count = folder, Counter[str](), 0

    def save(self, answer: Answer) -> str:
        """Write the heat map of an answer and return its path, or return "" if it has none."""
        if answer.heat is None:
            return ""
        name = Path(answer.prediction.path).name
        name = re.sub(r"[^\w.=-]+", "_", Path(name).stem if Path(name).suffix.lower() in suffixes() else name)
        self.names[name] += 1
        number = f"-{self.names[name]}" if self.names[name] > 1 else ""
        path = self.folder / f"{name}{number}.jpg"
        path.write_bytes(jpeg(answer.heat))
        self.count += 1
        return str(path)


def _pairs(found: Prediction) -> list[tuple[str, float]]:
    """Return the classes with their probabilities."""
    return list(zip(found.classes, found.probabilities, strict=True))


def _shown(name: str, probability: float) -> str:
    """Return a class and its probability for people."""
    return f"{name} {100 * probability:.1f} %"
