"""Images listed in a table or text file: CSV with paths and labels, and lists of files."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normfree.data.source import Source, Split
from normfree.data.sources.folders import DEFAULT_LIMITS, FolderSource, ImageLimits, part_of
from normfree.data.sources.nested import NestedSource
from normfree.data.subset import check_fractions, make_split
from normfree.data.transforms.decode import suffixes
from normfree.files import UnreadableFileError, read_csv, read_text
from normfree.suggest import did_you_mean, number_of, problem, some_names

# Usual names of columns, in lower case.
_IMAGE = (
    "image",
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "image_path",
    "img",
    "image_id",
    "imageid",
    "id",
)
_LABEL = (
    "label",
    "class",
    "category",
    "target",
    "species",
    "breed",
    "diagnosis",
    "label_name",
    "class_name",
)
_PART = ("split", "part", "subset", "partition", "fold", "set")
# Folders next to a table that usually hold its images; the table's own name is tried too.
_FOLDERS = ("", "images", "train", "img", "data")
_BYTES = 1_000_000_000  # of a table; 14 million lines of 70 characters
_SEVERAL = "|;"  # characters between the labels of one image
# Columns that may hold several labels: there, commas separate them too. Names of classes may have commas.
_LABELS = ("labels", "tags", "classes", "categories")
_SEPARATORS = {"comma": ",", "space": " "}
TABLES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class ListedImage:
    """One line of a table: the path as written, the labels, and the part ("train", "val", "test" or "")."""

    path: str
    labels: tuple[str, ...]
    part: str = ""


def open_listed(
    path: Path, options: Mapping[str, str], *, val_fraction: float, test_fraction: float = 0.0, seed: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Split:  # fmt: skip
    """Return the split of a table or list of files.

    A table (.csv, .tsv) has a column of paths and a column of classes, or a column of 0 and 1 for each class. Usual
    names of columns are found; the options `image` and `label` name others. Several labels of an image are separated by
    "|" or ";", in a column such as "labels" or "tags" by commas too, or by the option `separator`. A column such as
    "split" with "train", "val" and "test" states the parts. A list (.txt) has "PATH CLASS" or "PATH" in each line;
    without a class, it is the name of the folder. Paths are relative to the option `root`, else to the folder of the
    file or to a usual folder next to it, and may lack the suffix of the image.

    Args:
        path: The file.
        options: `image`, `label`, `separator` ("comma", "space" or a text), `root`, and `val` and `test`, files of the
            same kind.
        val_fraction: Fraction of each class for validation, without a part for it.
        test_fraction: Fraction of each class for the test, without a part for it.
        seed: Seed of these choices.
        limits: How the images are decoded.

    Raises:
        ValueError: A column or an image is missing, or a part has classes of its own.
    """
    check_fractions(val_fraction, test_fraction)
    lines = {"train": [line for line in read_lines(path, options) if line.part in ("", "train")]}
    if not lines["train"]:
        raise ValueError(problem(f"{path} lists no images to train on", fix="check its column of parts"))
    for part in ("val", "test"):
        lines[part] = [line for line in read_lines(path, options) if line.part == part]
        if part in options:
            lines[part] = read_lines(Path(options[part]).expanduser(), options)
    classes = _classes(path, lines["train"])
    sources: dict[str, Source] = {}
    for part, listed in lines.items():
        if listed:
            where = Path(options.get(part, path)).expanduser() if part != "train" else path
            sources[part] = _source(where, listed, classes, options, limits)
    train = sources["train"]
    split = make_split(
        str(path), train, sources.get("val"), test=sources.get("test"), val_fraction=val_fraction,
        test_fraction=test_fraction, seed=seed, ident=train.name if "root" in options else None,
        fix="list more images, or name a list of validation images with ,val=...",
    )  # fmt: skip
    return replace(split, image_size=None)


def open_labeled_listed(
    path: Path, options: Mapping[str, str], *, limits: ImageLimits = DEFAULT_LIMITS, part: str = "val"
) -> Source:
    """Return the listed images to evaluate a network on: those of a held-out part if there is one, else all."""
    other = "test" if part == "val" else "val"
    for name in (part, other):
        if name in options:
            path = Path(options[name]).expanduser()
            break
    lines = read_lines(path, options)
    for name in (part, other):
        if any(line.part == name for line in lines):
            lines = [line for line in lines if line.part == name]
            break
    return _source(path, lines, _classes(path, lines, least=1), options, limits)


def find_roboflow(root: Path) -> Path | None:
    """Return the table of a Roboflow export for classification (train/_classes.csv), or None."""
    tables = sorted(root.glob("*/_classes.csv"))
    return next((table for table in tables if (part_of(table.parent.name) or ("", 0))[0] == "train"), None)


def roboflow_options(table: Path) -> dict[str, str]:
    """Return the options of `open_listed` for a Roboflow export: the tables of its other parts."""
    found = {}
    for other in sorted(table.parent.parent.glob("*/_classes.csv")):
        stated = part_of(other.parent.name)
        if stated and stated[0] != "train":
            found[stated[0]] = str(other)
    return found


# --- reading ----------------------------------------------------------------------------------------------------


def read_lines(path: Path, options: Mapping[str, str] | None = None) -> list[ListedImage]:
    """Return the lines of a table or list of files.

    Raises:
        ValueError: The file cannot be read, or has no columns of images and classes.
    """
    options = options or {}
    try:
        text = read_text(path, limit=_BYTES).removeprefix("\ufeff")
        if path.suffix.lower() == ".txt":
            return [_list_line(line, path) for line in text.splitlines() if line.strip()]
        dialect = csv.excel_tab if path.suffix.lower() == ".tsv" else _dialect(text)
        table = read_csv(path, limit=_BYTES, dialect=dialect)
    except UnreadableFileError as error:
        raise ValueError(problem(str(error), allowed="a text file in UTF-8")) from None
    rows = [row for row in table if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise ValueError(
            problem(
                f"{path} has {number_of(len(rows), 'line')}",
                allowed="a line of names, then one for each image",
            )
        )
    return _table_lines(path, rows, options)


def _dialect(text: str) -> type[csv.Dialect]:
    """Return the dialect of a table: commas, or semicolons if the first line has no comma."""
    first = text.partition("\n")[0]

    class Semicolons(csv.excel):
        delimiter = ";"

    return Semicolons if "," not in first and ";" in first else csv.excel


def _list_line(line: str, path: Path) -> ListedImage:
    """Return one line of a list of files, "PATH CLASS" or "PATH"."""
    line = line.strip()
    if _is_image(line):
        folder = Path(line).parent.name
        if not folder:
            raise ValueError(
                problem(f"{path} has the line {line!r}, without a class", allowed="PATH CLASS, or CLASS/FILE")
            )
        return ListedImage(line, (folder,))
    for gap in ("\t", ",", " "):
        name, _, label = line.rpartition(gap)
        if _is_image(name.strip()):
            return ListedImage(name.strip(), _labels(label))
    raise ValueError(
        problem(f"{path} has the line {line!r}", allowed="PATH CLASS, where PATH ends as an image does")
    )


def _table_lines(path: Path, rows: list[list[str]], options: Mapping[str, str]) -> list[ListedImage]:
    """Return the lines of a table with a line of column names, or of one that begins with an image."""
    if _is_image(rows[0][0]) and not options.keys() & {"image", "label"}:
        return [ListedImage(row[0].strip(), _labels(row[1])) for row in rows if len(row) > 1]
    header, body = [cell.strip() for cell in rows[0]], rows[1:]
    image = _column(path, header, options, "image", _IMAGE)
    if image is None:  # a column whose cells end as images do
        image = next((i for i, cell in enumerate(body[0]) if _is_image(cell)), None)
    if image is None:
        raise ValueError(_missing(path, header, "image"))
    part = next((i for i, name in enumerate(header) if name.lower() in _PART and _has_parts(body, i)), None)
    rest = [i for i in range(len(header)) if i not in (image, part)]
    label = _column(path, header, options, "label", (*_LABEL, *_LABELS))
    if label is None and len(rest) == 1:
        label = rest[0]
    separators = _SEVERAL
    if "separator" in options:
        separators = _SEPARATORS.get(options["separator"], options["separator"]) or _SEVERAL
    elif label is not None and header[label].lower() in _LABELS:
        separators += ","
    hot = [] if label is not None else [i for i in rest if _is_hot(body, i)]
    if label is None and len(hot) < 2:
        raise ValueError(_missing(path, header, "label"))
    found = []
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(
                problem(
                    f"line {number} of {path} has {len(row)} cells", allowed=f"{len(header)}, as its first"
                )
            )
        labels = (
            _labels(row[label], separators)
            if label is not None
            else tuple(header[i] for i in hot if float(row[i]) > 0.5)
        )
        stated = part_of(row[part]) if part is not None else None
        found.append(ListedImage(row[image].strip(), labels, stated[0] if stated else ""))
    return found


def _column(
    path: Path, header: Sequence[str], options: Mapping[str, str], option: str, usual: Sequence[str]
) -> int | None:
    """Return the index of the column that an option names, or of the first usual one; None if there is none."""
    if option in options:
        if options[option] not in header:
            given = f"{path} has no column {options[option]!r}"
            raise ValueError(
                problem(given, allowed=some_names(header)) + did_you_mean(options[option], header)
            )
        return list(header).index(options[option])
    lower = [name.lower() for name in header]
    return next((lower.index(name) for name in usual if name in lower), None)


def _missing(path: Path, header: Sequence[str], option: str) -> str:
    """Return the error message for a table without a column of images or classes."""
    what = "paths of images" if option == "image" else "classes"
    return problem(
        f"{path} has the columns {some_names(header)}, and none is known as that of the {what}",
        allowed=f"a column {' or '.join((_IMAGE if option == 'image' else _LABEL)[:3])}",
        fix=f"csv:{path},{option}=COLUMN",
    )


def _has_parts(body: Sequence[Sequence[str]], column: int) -> bool:
    """Return True if the cells of a column name parts."""
    return all(len(row) > column and (not row[column].strip() or part_of(row[column])) for row in body)


def _is_hot(body: Sequence[Sequence[str]], column: int) -> bool:
    """Return True if all cells of a column are 0 or 1."""
    return all(len(row) > column and row[column].strip() in ("0", "1", "0.0", "1.0") for row in body)


def _labels(cell: str, separators: str = _SEVERAL) -> tuple[str, ...]:
    """Return the labels in a cell, each once; each character of `separators` separates them."""
    for mark in separators:
        cell = cell.replace(mark, separators[0])
    return tuple(dict.fromkeys(part.strip() for part in cell.split(separators[0]) if part.strip()))


def _is_image(text: str) -> bool:
    """Return True if a string ends as the name of an image does."""
    return os.path.splitext(text.strip())[1].lower() in suffixes()


# --- sources ----------------------------------------------------------------------------------------------------


def _classes(path: Path, lines: Sequence[ListedImage], *, least: int = 2) -> tuple[str, ...]:
    """Return the sorted classes; numbers are sorted as numbers."""
    names = {label for line in lines for label in line.labels}
    if len(names) < least:
        raise ValueError(problem(f"{path} has {number_of(len(names), 'class')}", allowed=f"{least} or more"))
    return tuple(
        sorted(names, key=lambda name: (len(name), name) if all(n.isdecimal() for n in names) else (0, name))
    )


def _source(
    path: Path,
    lines: Sequence[ListedImage],
    classes: Sequence[str],
    options: Mapping[str, str],
    limits: ImageLimits,
) -> FolderSource:
    """Return the source of listed images."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({label for line in lines for label in line.labels if label not in numbers})
    if unknown:
        given = f"{path} has classes that are not in the training list: {some_names(unknown)}"
        raise ValueError(problem(given, allowed=some_names(classes)))
    root, files = _found(path, [line.path for line in lines], options)
    pairs = zip(files, lines, strict=True)
    if any(len(line.labels) != 1 for line in lines):
        several = [(file, tuple(numbers[label] for label in line.labels)) for file, line in pairs]
        return NestedSource(
            root, several, classes=classes, max_pixels=limits.max_pixels, pixel_range=limits.pixel_range
        )
    samples = [(file, numbers[line.labels[0]]) for file, line in pairs]
    return FolderSource(
        root, samples, classes=classes, max_pixels=limits.max_pixels, pixel_range=limits.pixel_range
    )


def _found(path: Path, names: Sequence[str], options: Mapping[str, str]) -> tuple[Path, list[str]]:
    """Return the folder to which the listed paths are relative, and the paths with their suffixes.

    Raises:
        ValueError: The first image is in none of the folders.
    """
    given = [Path(options["root"]).expanduser()] if "root" in options else []
    folders = given or [path.parent / name for name in (*_FOLDERS, path.stem)]
    first = names[0]
    for root in folders:
        for suffix in ("", *(sorted(suffixes()) if not _is_image(first) else ())):
            if (root / f"{first}{suffix}").is_file():
                return root, [name if _is_image(name) else f"{name}{suffix}" for name in names]
    raise ValueError(
        problem(
            f"{path} lists {first!r}, which is not in {', '.join(str(folder) for folder in folders[:3])}",
            allowed="paths relative to the table or to the option root",
            fix=f"csv:{path},root=FOLDER",
        )
    )
