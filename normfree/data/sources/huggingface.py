"""Hugging Face datasets as a source: Arrow rows with random access, decoded by `load_image` like every other file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from normfree.data.encoded import MAX_CLASSES, EncodedSource, number_classes
from normfree.data.source import Split
from normfree.data.sources.huggingface_stream import BUFFER, StreamSource, labels_of
from normfree.data.spec import is_yes
from normfree.data.subset import make_split
from normfree.data.transforms.decode import MAX_PIXELS, ImageError

VAL_SPLITS = ("validation", "val", "valid", "test")  # the first one found is taken
_IMAGES = ("image", "img", "jpg", "picture")
_LABELS = ("label", "labels", "fine_label", "cls")


class HuggingSource(EncodedSource):
    """The rows of a `datasets.Dataset` with encoded pictures in `image` and `labels` (int64 N); i is the row."""

    def __init__(
        self,
        rows: Any,
        *,
        image: str,
        labels: np.ndarray,
        classes: Sequence[str],
        prefix: str,
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.classes = tuple(classes)
        self._rows, self._image, self._labels, self._prefix = rows, image, labels, prefix
        super().__init__(background=background, max_pixels=max_pixels)

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """The class of row `index`."""
        return int(self._labels[index])

    def data(self, index: int) -> str | bytes:
        """The path or the bytes in row `index`."""
        cell = self._rows[int(index)][self._image]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ImageError(self.name(index), "the row has no picture")
        data: str | bytes = cell["path"] if cell["bytes"] is None else cell["bytes"]
        return data

    def name(self, index: int) -> str:
        """FOLDER_OR_NAME/SPLIT/ROW."""
        return f"{self._prefix}/{index}"


def split_hugging(
    target: str, options: Mapping[str, str], *, val_fraction: float, seed: int, download: bool = False
) -> Split:
    """The split of a folder (of parquet or arrow files, or what `save_to_disk` left), or of a set on the hub.

    `options`: `split` to train on ("train"), `val` to validate on (default: validation, val, valid or test if there
    is one, else a part of `split` chosen by hash), the columns `image` and `label` (default: the one picture column,
    the one class column), and for the hub `subset` and `revision`. Labels are class numbers, whole numbers from 0,
    or texts, whose sorted values become the classes. Nothing comes from the hub unless `download` is True or
    `streaming` is "yes". Then rows are read forwards while they are needed (`StreamSource`), `buffer` of them are
    shuffled with each other, and a validation split must be there. Raises `ValueError` for what is not there.
    """
    stream = _streaming(options)
    parts = _open(target, options, download=download)
    train_name = options.get("split", "train" if "train" in parts or len(parts) != 1 else next(iter(parts)))
    val_name = options.get("val") or next((n for n in VAL_SPLITS if n in parts and n != train_name), None)
    if stream and val_name is None:
        raise ValueError(
            f"'hf:{target}' has no split to validate on, and a stream cannot be divided. Allowed: a second split, or "
            "a set without streaming. Fix: leave out streaming"
        )
    names = [train_name] if val_name is None else [train_name, val_name]
    rows = [_part(parts, name, target, option) for name, option in zip(names, ("split", "val"), strict=False)]
    tables = [_table(part, name, options, target) for part, name in zip(rows, names, strict=True)]
    classes = _classes([table.labels for table in tables], tables[0].names, target)
    sources = [_source(table, classes, f"{target}/{name}") for table, name in zip(tables, names, strict=True)]
    what = f"{target} ({', '.join(names)})"
    held = sources[1] if len(sources) > 1 else None
    split = make_split(what, sources[0], held, val_fraction=val_fraction, seed=seed, ident=str)
    if not isinstance(sources[0], StreamSource):
        return split
    return replace(split, files=False, notes=(*split.notes, *_stream_notes(sources[0], tables[0])))


def labelled_hugging(
    target: str, options: Mapping[str, str], *, download: bool = False
) -> HuggingSource | StreamSource:
    """The rows to score a network on: those of the option `val`, else of `split`, else of a validation split.

    Raises as `split_hugging`.
    """
    parts = _open(target, options, download=download)
    usual = next((n for n in VAL_SPLITS if n in parts), next(iter(parts)))
    name = options.get("val") or options.get("split") or usual
    table = _table(_part(parts, name, target, "val" if "val" in options else "split"), name, options, target)
    return _source(table, _classes([table.labels], table.names, target), f"{target}/{name}")


def _streaming(options: Mapping[str, str]) -> bool:
    stream, size = is_yes(options, "streaming"), options.get("buffer", str(BUFFER))
    if not size.isdecimal() or int(size) < 1:
        raise ValueError(f"buffer={size}. Allowed: a whole number from 1. Fix: buffer={BUFFER}")
    if "buffer" in options and not stream:
        raise ValueError(
            f"buffer={size} without streaming=yes. Allowed: both, as else the whole set is shuffled. "
            "Fix: leave out buffer"
        )
    return stream


def _open(target: str, options: Mapping[str, str], *, download: bool) -> dict[str, Any]:
    folder, stream = Path(target).expanduser(), _streaming(options)
    local = folder.is_dir()
    if not local and (not (download or stream) or target.startswith((".", "/", "~"))):
        raise ValueError(
            f"'hf:{target}' is no folder here. Allowed: a folder of parquet or arrow files, or a name on the hub and a "
            "download when told to. Fix: download=yes, or check the path"
        )
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError("hf: needs datasets: pip install 'normfree[datasets]'") from None
    saved = local and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file())
    if saved and stream:
        raise ValueError(
            f"'hf:{target}' was left by save_to_disk, which is read in place. Allowed: streaming=yes for parquet and "
            "other files, or for a name on the hub. Fix: leave out streaming"
        )
    try:
        found = datasets.load_from_disk(str(folder)) if saved else _load(target, options)
    except Exception as error:  # the library raises its own errors, OSError, ValueError and those of the hub
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"'hf:{target}' cannot be opened: {first}. Allowed: a folder of parquet or arrow files, or a name on "
            "the hub. Fix: check the name"
        ) from error
    return {"train": found} if isinstance(found, datasets.Dataset) else dict(found)


def _load(target: str, options: Mapping[str, str], **more: Any) -> Any:
    import datasets

    folder = Path(target).expanduser()
    if _streaming(options):
        more["streaming"] = True
    return datasets.load_dataset(
        str(folder.resolve()) if folder.is_dir() else target,
        options.get("subset"),
        revision=options.get("revision"),
        **more,
    )


def _part(parts: Mapping[str, Any], name: str, target: str, option: str) -> Any:
    if name not in parts:
        raise ValueError(
            f"'hf:{target}' has no split {name!r}. Allowed: {', '.join(parts)}. "
            f"Did you mean {option}={_near(name, parts)}?"
        )
    if hasattr(parts[name], "__len__") and len(parts[name]) == 0:  # a stream has none; it is counted later
        raise ValueError(
            f"the split {name!r} of 'hf:{target}' is empty. Allowed: one row or more. Fix: another split"
        )
    return parts[name]


@dataclass(frozen=True)
class _Table:
    """A split: `rows` with the picture column `image` alone, `labels` as they are written, `names` of the label's
    feature; of a stream also the rows of each file in `counts`, and its `buffer`."""

    rows: Any
    image: str
    labels: Any
    names: tuple[str, ...] | None
    counts: tuple[int, ...] = ()
    buffer: int = BUFFER


def _table(rows: Any, name: str, options: Mapping[str, str], target: str) -> _Table:
    import datasets

    features = rows.features
    if features is None:
        raise ValueError(
            f"'hf:{target}' does not say which columns it has. Allowed: a set with features (parquet has them). "
            "Fix: leave out streaming"
        )
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = _column(features, options.get("image"), pictures, _IMAGES, "image", target)
    kinds = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    label = _column(features, options.get("label"), kinds, _LABELS, "label", target)
    picture = datasets.Image(decode=False)
    try:  # on no rows, as a stream would say it at the first one
        empty = datasets.Dataset.from_dict({image: []}, features=datasets.Features({image: features[image]}))
        empty.cast_column(image, picture)
    except Exception as error:
        raise ValueError(
            f"the column {image!r} of 'hf:{target}' holds {features[image]}, which is no picture. Allowed: encoded "
            "pictures (Image, or bytes and path). Fix: image=COLUMN"
        ) from error
    encoded = rows.select_columns([image]).cast_column(image, picture)
    kind = features[label]
    if not isinstance(kind, datasets.ClassLabel) and getattr(kind, "dtype", "") not in _LABEL_TYPES:
        raise ValueError(
            f"the column {label!r} of 'hf:{target}' holds {kind}, which is no class. Allowed: class numbers or texts. "
            "Fix: label=COLUMN"
        )
    counts: tuple[int, ...] = ()
    if _streaming(options):
        parts = _streamed_labels(rows, name, label, options, target)
        labels, counts = [value for part in parts for value in part], tuple(map(len, parts))
    else:
        encoded = encoded.with_format(None)
        labels = rows.select_columns([label]).with_format(None)[:][label]
    missing = next((i for i, value in enumerate(labels) if value is None or value in (-1, "")), None)
    if missing is not None:
        raise ValueError(
            f"row {missing} of 'hf:{target}' has no label ({label}={labels[missing]!r}). Allowed: a class in each row. "
            "Fix: choose a split with labels"
        )
    names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    return _Table(encoded, image, labels, names, counts, int(options.get("buffer", BUFFER)))


_LABEL_TYPES = (
    "string",
    "large_string",
    "bool",
    *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)),
)


def _column(
    features: Mapping[str, Any],
    asked: str | None,
    typed: Sequence[str],
    usual: Sequence[str],
    option: str,
    target: str,
) -> str:
    if asked is None:
        asked = next((name for name in usual if name in features), typed[0] if len(typed) == 1 else usual[0])
        if asked in typed or asked in features:
            return asked
    if asked not in features:
        raise ValueError(
            f"'hf:{target}' has no column {asked!r}. Allowed: {', '.join(features)}. "
            f"Did you mean {option}={_near(asked, features)}?"
        )
    return asked


def _classes(columns: Sequence[Any], names: tuple[str, ...] | None, target: str) -> tuple[str, ...]:
    if names is None and isinstance(columns[0][0], str):
        names = tuple(sorted({value for column in columns for value in column}))
    highest = -1
    if not isinstance(columns[0][0], str):
        low, highest = min(min(column) for column in columns), max(max(column) for column in columns)
        names = number_classes(min(int(highest), MAX_CLASSES) + 1) if names is None else names
        if low < 0 or highest >= len(names):
            raise ValueError(
                f"'hf:{target}' has the class number {low if low < 0 else highest}. Allowed: 0 to {len(names) - 1}. "
                "Fix: number the classes from 0"
            )
    assert names is not None
    if len(names) < 2:
        raise ValueError(f"'hf:{target}' holds one class. Allowed: two or more. Fix: another label column")
    return names


def _source(table: _Table, classes: tuple[str, ...], prefix: str) -> HuggingSource | StreamSource:
    labels = table.labels
    if isinstance(labels[0], str):
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[value] for value in labels]
    found = np.asarray(labels, dtype=np.int64)
    if not table.counts:
        return HuggingSource(table.rows, image=table.image, labels=found, classes=classes, prefix=prefix)
    return StreamSource(
        table.rows,
        image=table.image,
        labels=found,
        counts=table.counts,
        classes=classes,
        prefix=prefix,
        buffer=table.buffer,
    )


def _streamed_labels(
    rows: Any, name: str, label: str, options: Mapping[str, str], target: str
) -> list[list[Any]]:
    with contextlib.suppress(
        Exception
    ):  # parquet alone knows `columns`, and leaves the pictures where they are
        rows = _load(target, options, columns=[label])[name]
    try:
        parts = labels_of(rows, label)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the labels of 'hf:{target}' cannot be read: {first}. Allowed: files that can be read to the end. "
            "Fix: check them"
        ) from error
    if not any(parts):
        raise ValueError(
            f"the split {name!r} of 'hf:{target}' is empty. Allowed: one row or more. Fix: another split"
        )
    return parts


def _stream_notes(source: StreamSource, table: _Table) -> list[str]:
    notes = [
        f"read as a stream: {len(table.counts)} files in a new order each epoch, and {table.buffer} images shuffled "
        "with each other; a run that continues reads its files again up to its place"
    ]
    seen, even = source.evenness()
    if seen < even / 2:
        notes.append(
            f"the stream is sorted: {table.buffer} images in a row hold {seen:.1f} classes on average, {even:.1f} if "
            "they were shuffled; networks train badly so. Raise buffer=, or leave out streaming"
        )
    return notes


def _near(word: str, words: Mapping[str, Any]) -> str:
    return get_close_matches(word, list(words), n=1, cutoff=0.0)[0]
