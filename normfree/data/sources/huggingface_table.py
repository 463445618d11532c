"""Opening of Hugging Face datasets: the rows, image column and labels of a split, and the class names."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.data.encoded import MAX_CLASSES, number_classes
from normfree.data.sources.huggingface_stream import BUFFER, labels_of
from normfree.data.spec import is_yes
from normfree.suggest import did_you_mean, needs, problem

# Usual names of the columns, in order of preference.
_IMAGES = ("image", "img", "jpg", "picture")  # language: a name of others
_LABELS = ("label", "labels", "fine_label", "cls")
_LABEL_TYPES = (
    "string",
    "large_string",
    "bool",
    *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)),
)
_ALLOWED = "a folder of parquet or arrow files, or a name on the hub"


@dataclass(frozen=True)
class Table:
    """One split of a Hugging Face data set.

    Attributes:
        rows: The data set with only the column `image`, not decoded.
        image: Name of the image column.
        labels: Labels as stored: class numbers or strings.
        names: Class names of the label column's type, or None.
        counts: For a stream, the number of rows of each file, else empty.
        buffer: For a stream, the number of images that are shuffled with each other.
    """

    rows: Any
    image: str
    labels: Any
    names: tuple[str, ...] | None
    counts: tuple[int, ...] = ()
    buffer: int = BUFFER


def is_streaming(options: Mapping[str, str]) -> bool:
    """Return the option `streaming`; raise `ValueError` if `buffer` is malformed or given without it."""
    stream, size = is_yes(options, "streaming"), options.get("buffer", str(BUFFER))
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(problem(f"buffer={size}", allowed="a whole number from 1", fix=f"buffer={BUFFER}"))
    if "buffer" in options and not stream:
        raise ValueError(
            problem(
                f"buffer={size} without streaming=yes",
                allowed="both or none; without streaming the whole set is shuffled",
                fix="leave out buffer",
            )
        )
    return stream


def open_splits(target: str, options: Mapping[str, str], *, download: bool) -> dict[str, Any]:
    """Return the splits of a folder or of a data set on the hub, by name.

    Raises:
        ValueError: There is nothing to open at `target`, or it needs a download that is not allowed.
        ModuleNotFoundError: The package `datasets` is missing.
    """
    folder, stream = Path(target).expanduser(), is_streaming(options)
    local = folder.is_dir()
    if not local and (not (download or stream) or target.startswith((".", "/", "~"))):
        raise ValueError(
            problem(
                f"'hf:{target}' is no folder here",
                allowed="a folder of parquet or arrow files, or a name on the hub and permission to download",
                fix="download=yes, or check the path",
            )
        )
    with needs("hf:", install="normfree[datasets]"):
        import datasets
    saved = local and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file())
    if saved and stream:
        raise ValueError(
            problem(
                f"'hf:{target}' was written by save_to_disk, which is read in place",
                allowed="streaming=yes for parquet and other files, or for a name on the hub",
                fix="leave out streaming",
            )
        )
    try:
        found = datasets.load_from_disk(str(folder)) if saved else _load(target, options)
    except Exception as error:  # `datasets` raises its own types, OSError, ValueError and those of the hub
        raise ValueError(
            problem(
                f"'hf:{target}' cannot be opened: {_first_line(error)}",
                allowed=_ALLOWED,
                fix="check the name",
            )
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _load(target: str, options: Mapping[str, str], **more: Any) -> Any:
    """Call `datasets.load_dataset`."""
    import datasets

    folder = Path(target).expanduser()
    if is_streaming(options):
        more["streaming"] = True
    return datasets.load_dataset(
        str(folder.resolve()) if folder.is_dir() else target,
        options.get("subset"),
        revision=options.get("revision"),
        **more,
    )


def _first_line(error: Exception) -> str:
    """Return the first line of the message of an error, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def choose_split(splits: Mapping[str, Any], name: str, target: str, option: str) -> Any:
    """Return the split `name`; raise `ValueError` if it is missing or empty. `option` is the option that names it."""
    if name not in splits:
        raise ValueError(
            problem(
                f"'hf:{target}' has no split {name!r}",
                allowed=", ".join(splits),
                fix=f"choose one with {option}=SPLIT",
            )
            + did_you_mean(name, splits)
        )
    if (
        hasattr(splits[name], "__len__") and len(splits[name]) == 0
    ):  # a stream has no length; it is counted later
        raise ValueError(_empty(name, target))
    return splits[name]


def _empty(name: str, target: str) -> str:
    """Return the error message for an empty split."""
    return problem(
        f"the split {name!r} of 'hf:{target}' is empty", allowed="one row or more", fix="another split"
    )


def read_table(rows: Any, name: str, options: Mapping[str, str], target: str) -> Table:
    """Return the columns of the split `name`, whose data set is `rows`.

    Raises:
        ValueError: A column is missing or has the wrong type, or a row has no label.
    """
    import datasets

    features = rows.features
    if features is None:
        raise ValueError(
            problem(
                f"'hf:{target}' does not list its columns",
                allowed="a data set with features (parquet has them)",
                fix="leave out streaming",
            )
        )
    image_columns = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    image = _column(features, options.get("image"), image_columns, _IMAGES, "image", target)
    class_columns = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = _column(features, options.get("label"), class_columns, _LABELS, "label", target)
    encoded_image = datasets.Image(decode=False)
    try:  # on no rows, because a stream would raise only at its first row
        empty = datasets.Dataset.from_dict({image: []}, features=datasets.Features({image: features[image]}))
        empty.cast_column(image, encoded_image)
    except Exception as error:
        raise ValueError(
            problem(
                f"the column {image!r} of 'hf:{target}' holds {features[image]}, which is no image",
                allowed="encoded images (Image, or bytes and path)",
                fix="image=COLUMN",
            )
        ) from error
    encoded = rows.select_columns([image]).cast_column(image, encoded_image)
    kind = features[label]
    if not isinstance(kind, datasets.ClassLabel) and getattr(kind, "dtype", "") not in _LABEL_TYPES:
        raise ValueError(
            problem(
                f"the column {label!r} of 'hf:{target}' holds {kind}, which is no class",
                allowed="class numbers or strings",
                fix="label=COLUMN",
            )
        )
    counts: tuple[int, ...] = ()
    if is_streaming(options):
        parts = _streamed_labels(rows, name, label, options, target)
        labels, counts = [value for part in parts for value in part], tuple(map(len, parts))
    else:
        encoded = encoded.with_format(None)
        labels = rows.select_columns([label]).with_format(None)[:][label]
    missing = next((i for i, value in enumerate(labels) if value is None or value in (-1, "")), None)
    if missing is not None:
        raise ValueError(
            problem(
                f"row {missing} of 'hf:{target}' has no label ({label}={labels[missing]!r})",
                allowed="a class in each row",
                fix="choose a split with labels",
            )
        )
    names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    return Table(encoded, image, labels, names, counts, int(options.get("buffer", BUFFER)))


def _column(
    features: Mapping[str, Any],
    given: str | None,
    typed: Sequence[str],
    usual: Sequence[str],
    option: str,
    target: str,
) -> str:
    """Return the column `given`, else the one of a usual name, else the only one of the right type."""
    if given is None:
        given = next((name for name in usual if name in features), typed[0] if len(typed) == 1 else usual[0])
    if given not in features:
        raise ValueError(
            problem(
                f"'hf:{target}' has no column {given!r}",
                allowed=", ".join(features),
                fix=f"choose one with {option}=COLUMN",
            )
            + did_you_mean(given, features)
        )
    return given


def _streamed_labels(
    rows: Any, name: str, label: str, options: Mapping[str, str], target: str
) -> list[list[Any]]:
    """Return the labels of each file of a stream, in one pass over it."""
    # Only parquet supports `columns`; it then skips the images.
    with contextlib.suppress(Exception):
        rows = _load(target, options, columns=[label])[name]
    try:
        parts = labels_of(rows, label)
    except Exception as error:
        raise ValueError(
            problem(
                f"the labels of 'hf:{target}' cannot be read: {_first_line(error)}",
                allowed="files that can be read to the end",
                fix="check the files",
            )
        ) from error
    if not any(parts):
        raise ValueError(_empty(name, target))
    return parts


def class_names(columns: Sequence[Any], names: tuple[str, ...] | None, target: str) -> tuple[str, ...]:
    """Return the class names: `names` of the label type, else the sorted strings, else the numbers.

    Raises:
        ValueError: A class number is out of range, or there is only one class.
    """
    if names is None and isinstance(columns[0][0], str):
        names = tuple(sorted({value for column in columns for value in column}))
    if not isinstance(columns[0][0], str):
        low, highest = min(min(column) for column in columns), max(max(column) for column in columns)
        names = number_classes(min(int(highest), MAX_CLASSES) + 1) if names is None else names
        if low < 0 or highest >= len(names):
            raise ValueError(
                problem(
                    f"'hf:{target}' has the class number {low if low < 0 else highest}",
                    allowed=f"0 to {len(names) - 1}",
                    fix="number the classes from 0",
                )
            )
    assert names is not None
    if len(names) < 2:
        raise ValueError(
            problem(f"'hf:{target}' holds one class", allowed="two or more", fix="another label column")
        )
    return names
