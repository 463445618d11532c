"""Hugging Face datasets as sources: Arrow rows with random access, whose images `load_image` decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from normfree.data.encoded import EncodedSource
from normfree.data.source import Split
from normfree.data.sources.huggingface_stream import HuggingFaceStreamSource
from normfree.data.sources.huggingface_table import (
    Table,
    choose_split,
    class_names,
    is_streaming,
    open_splits,
    read_table,
)
from normfree.data.subset import make_split
from normfree.data.transforms.decode import MAX_PIXELS, ImageError
from normfree.suggest import problem

VAL_SPLITS = ("validation", "val", "valid")  # the first one found is used
TEST_SPLIT = "test"


class HuggingFaceSource(EncodedSource):
    """The rows of a `datasets.Dataset`; sample i is row i.

    Args:
        rows: The data set.
        image: Column with encoded images.
        labels: Class numbers, int64 N.
        classes: Class names.
        prefix: FOLDER_OR_NAME/SPLIT, for names.
        background: Color 0 to 255 under transparent pixels.
        max_pixels: Largest width times height that is decoded.
    """

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
        """Return the class of row `index`."""
        return int(self._labels[index])

    def data(self, index: int) -> str | bytes:
        """Return the path or the bytes in row `index`."""
        cell = self._rows[int(index)][self._image]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise ImageError(self.name(index), "the row has no image")
        data: str | bytes = cell["path"] if cell["bytes"] is None else cell["bytes"]
        return data

    def name(self, index: int) -> str:
        """Return FOLDER_OR_NAME/SPLIT/ROW."""
        return f"{self._prefix}/{index}"


def split_huggingface(
    target: str,
    options: Mapping[str, str],
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    download: bool = False,
) -> Split:
    """Return the split of a folder (parquet or arrow files, or the output of `save_to_disk`) or of a set on the hub.

    Labels are class numbers from 0, or strings, whose sorted values become the classes. Nothing is downloaded from the
    hub unless `download` is True or the option `streaming` is "yes". A stream needs a validation split.

    Args:
        target: Folder, or name on the hub.
        options: `split` to train on (default "train"); `val` to validate on (default: validation, val or valid if there
            is one, else a part of `split` chosen by hash; for a stream, also test); `test` to score at the end
            (default: test); the columns `image` and `label` (default: one of the usual name, else the only one of the
            right type); for the hub `subset` and `revision`; `streaming` to read rows in order as they are needed, with
            `buffer` of them shuffled with each other.
        val_fraction: Fraction for validation if there is no validation split.
        test_fraction: Fraction for the test if there is no test split. A stream has none then.
        seed: Seed of these splits.
        download: Allow a download from the hub.

    Raises:
        ValueError: A split, column or label is missing or malformed.
    """
    stream = is_streaming(options)
    splits = open_splits(target, options, download=download)
    train_name = options.get(
        "split", "train" if "train" in splits or len(splits) != 1 else next(iter(splits))
    )
    val_name = options.get("val") or next((n for n in VAL_SPLITS if n in splits and n != train_name), None)
    test_name = options.get("test") or (TEST_SPLIT if TEST_SPLIT in splits else None)
    if test_name in (train_name, val_name):
        test_name = None
    if stream and val_name is None:
        val_name, test_name = test_name, None
    if stream and val_name is None:
        raise ValueError(
            problem(
                f"'hf:{target}' has no split to validate on, and a stream cannot be divided",
                allowed="a second split, or a set without streaming",
                fix="leave out streaming",
            )
        )
    named = {"split": train_name, "val": val_name, "test": test_name}
    names = {option: name for option, name in named.items() if name is not None}
    rows = {option: choose_split(splits, name, target, option) for option, name in names.items()}
    tables = {option: read_table(rows[option], name, options, target) for option, name in names.items()}
    classes = class_names([table.labels for table in tables.values()], tables["split"].names, target)
    sources = {
        option: _source(table, classes, f"{target}/{names[option]}") for option, table in tables.items()
    }
    train = sources["split"]
    split = make_split(
        f"{target} ({', '.join(names.values())})", train, sources.get("val"), test=sources.get("test"),
        val_fraction=val_fraction, test_fraction=0.0 if stream else test_fraction, seed=seed, ident=str,
    )  # fmt: skip
    if not isinstance(train, HuggingFaceStreamSource):
        return split
    return replace(split, files=False, notes=(*split.notes, *_stream_notes(train, tables["split"])))


def open_labeled_huggingface(
    target: str, options: Mapping[str, str], *, download: bool = False, part: str = "val"
) -> HuggingFaceSource | HuggingFaceStreamSource:
    """Return the rows to evaluate a network on: those of the option `part`, else of `split`, else of a held-out split.

    Raises:
        ValueError: As for `split_huggingface`.
    """
    splits = open_splits(target, options, download=download)
    held = (TEST_SPLIT, *VAL_SPLITS) if part == "test" else (*VAL_SPLITS, TEST_SPLIT)
    usual = next((n for n in held if n in splits), next(iter(splits)))
    name = options.get(part) or options.get("val") or options.get("split") or usual
    rows = choose_split(splits, name, target, "val" if "val" in options else "split")
    table = read_table(rows, name, options, target)
    return _source(table, class_names([table.labels], table.names, target), f"{target}/{name}")


def _source(
    table: Table, classes: tuple[str, ...], prefix: str
) -> HuggingFaceSource | HuggingFaceStreamSource:
    """Return the source of a table, with labels as class numbers."""
    labels = table.labels
    if isinstance(labels[0], str):
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[value] for value in labels]
    found = np.asarray(labels, dtype=np.int64)
    if not table.counts:
        return HuggingFaceSource(table.rows, image=table.image, labels=found, classes=classes, prefix=prefix)
    return HuggingFaceStreamSource(
        table.rows,
        image=table.image,
        labels=found,
        counts=table.counts,
        classes=classes,
        prefix=prefix,
        buffer=table.buffer,
    )


def _stream_notes(source: HuggingFaceStreamSource, table: Table) -> list[str]:
    """Return notes on how a stream is shuffled, with a warning if it is sorted by class."""
    notes = [
        f"read as a stream: {len(table.counts)} files in a new order each epoch, and {table.buffer} images shuffled "
        "with each other; a resumed run reads its files again up to its position"
    ]
    mean, shuffled = source.evenness()
    if mean < shuffled / 2:
        notes.append(
            f"the stream is sorted: {table.buffer} images in a row hold {mean:.1f} classes on average, {shuffled:.1f} "
            "if they were shuffled; networks train badly on sorted data. Raise buffer=, or leave out streaming"
        )
    return notes
