"""WebDataset tar shards as a source with random access: a table of byte ranges, one read per picture."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from normfree.data.encoded import EncodedSource, number_classes
from normfree.data.source import Split
from normfree.data.sources.shell import PREFIX, commands, fetched
from normfree.data.sources.storage import StoredFile, beside, expand
from normfree.data.sources.tar_index import TarIndex, index_of
from normfree.data.subset import make_split
from normfree.data.transforms.decode import MAX_PIXELS, ImageError

_THREADS = 8  # shards that are indexed at a time; a remote one mostly waits


class ShardSource(EncodedSource):
    """The pictures of tar shards. Sample i is a (shard, offset, size); order is that of shards and members.

    `shards` holds (place, index, stamp) of each; `image` reads the bytes of one member and decodes them, and
    raises `ImageError` when a local shard changed since it was indexed.
    """

    def __init__(
        self,
        shards: Sequence[tuple[StoredFile, TarIndex, tuple[int, str]]],
        *,
        classes: Sequence[str],
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.classes = tuple(classes)
        self._places = [place for place, _, _ in shards]
        self._stamps = [stamp for _, _, stamp in shards]
        self._first = np.cumsum([0, *(len(index.offsets) for _, index, _ in shards)])
        self._offsets = np.concatenate([index.offsets for _, index, _ in shards])
        self._sizes = np.concatenate([index.sizes for _, index, _ in shards])
        self._labels = np.concatenate([index.labels for _, index, _ in shards])
        # One byte string: a million Python strings would be copied page by page into every worker.
        encoded = [name.encode("utf-8") for _, index, _ in shards for name in index.names]
        self._names, self._ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        super().__init__(background=background, max_pixels=max_pixels)

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        """The class of member `index`, from the table."""
        return int(self._labels[index])

    def data(self, index: int) -> bytes:
        """The bytes of member `index`, as they lie in the shard."""
        shard = self._shard(index)
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            return self._places[shard].read(offset, size, stamp=self._stamps[shard])
        except OSError as error:
            raise ImageError(self.name(index), f"cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        """SHARD/MEMBER of sample `index`."""
        member = self._names[self._ends[index] : self._ends[index + 1]].decode("utf-8")
        return f"{self._places[self._shard(index)].shown}/{member}"

    def ident(self, index: int) -> str:
        """The same without the folder or store: what stays when the shards are copied elsewhere."""
        shard = self._places[self._shard(index)].shown
        return self.name(index).removeprefix(shard[: shard.rfind("/") + 1])

    def kept(self) -> list[str]:
        """A note on the space that the output of commands takes, if there are any."""
        sizes = [stamp[0] for place, stamp in zip(self._places, self._stamps, strict=True) if place.label]
        where = os.path.dirname(self._places[0].url)
        return [f"{len(sizes)} shards were fetched into {where}, {sum(sizes):,} bytes"] if sizes else []

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first, index, side="right")) - 1


def open_shards(
    pattern: str, *, classes: Sequence[str] | None = None, cache: Path | None = None, pipes: bool = False
) -> ShardSource:
    """The source of all shards that `pattern` names.

    `pattern` is a path or a URL that fsspec opens (s3://, gs://, https://, ...; extra `remote`), with {000..127},
    {a,b} and, where files can be listed, * in it. The shards are plain tars of KEY.jpg (or another image suffix)
    beside KEY.cls, or KEY.json with "label"; labels are whole numbers from 0. Class names are `classes`, else the
    lines of classes.txt or the list of classes.json beside the first shard, else the numbers.

    Each shard is indexed once, in one pass; the index is kept in the user's cache folder (or `cache`), keyed by
    size and date. A remote shard is thereby read once from end to end. Afterwards a picture is one ranged read,
    so shuffling, parts per process and exact resume are those of a folder.

    "pipe:COMMAND" is what a shell command writes (`pipes.fetched`), with braces too: a pipe has no offsets, so its
    output is kept as a file beside the indices, whole. With `pipes` missing files are fetched; without, as is right
    for a word that was not typed by the user, they are refused. Raises `ValueError` for shards that cannot be used,
    naming shard and member.
    """
    if pattern == "-":
        raise ValueError(
            "'-' is a stream, in which nothing can be found again, so no run could resume exactly. Allowed: tar files "
            "on disk, URLs, or pipe:COMMAND, which is kept in a file. Fix: name one of these"
        )
    words = commands(pattern) if pattern.startswith(PREFIX) else expand(pattern)

    def look(word: str | StoredFile) -> tuple[StoredFile, TarIndex, tuple[int, str]]:
        place = word
        if isinstance(place, str):
            place = fetched(place, run=pipes, folder=None if cache is None else cache / "pipes")
        return place, *index_of(place, cache=cache)

    with ThreadPoolExecutor(min(_THREADS, len(words))) as pool:
        shards = list(pool.map(look, words))
    highest = max(int(index.labels.max()) for _, index, _ in shards)
    names = _class_names(shards[0][0]) if classes is None else tuple(classes)
    if names is None:
        names = number_classes(highest + 1)
    if highest >= len(names):
        place, index, _ = next(s for s in shards if int(s[1].labels.max()) == highest)
        member = index.names[int(index.labels.argmax())]
        raise ValueError(
            f"{place.shown} has the class number {highest} at {member!r}, but there are {len(names)} class names. "
            f"Allowed: 0 to {len(names) - 1}. Fix: complete the list of classes"
        )
    if len(names) < 2:
        raise ValueError(
            f"{pattern!r} holds one class. Allowed: two or more. Fix: add shards with other classes"
        )
    return ShardSource(shards, classes=names)


def split_shards(
    pattern: str, val: str | None, *, val_fraction: float, seed: int, pipes: bool = False
) -> Split:
    """The split of shards: `val` is the pattern of the validation shards; without one, a part is chosen by hash.

    Where classes are numbers, both parts get as many as the larger one has. Raises as `open_shards`.
    """
    train = open_shards(pattern, pipes=pipes)
    if val is None:
        split = make_split(pattern, train, None, val_fraction=val_fraction, seed=seed, ident=train.ident)
        return replace(split, notes=(*split.notes, *train.kept()))
    held = open_shards(val, pipes=pipes)
    if held.classes != train.classes:
        longer = max(train.classes, held.classes, key=len)
        if any(
            source.classes != longer[: len(source.classes)] for source in (train, held)
        ) or longer != number_classes(len(longer)):
            raise ValueError(
                f"{pattern} and {val} have different class names. Allowed: the same classes.txt beside both. "
                "Fix: copy one of them"
            )
        train.classes = held.classes = longer
    split = make_split(pattern, train, held, val_fraction=val_fraction, seed=seed)
    return replace(split, notes=(*split.notes, *train.kept(), *held.kept()))


def _class_names(place: StoredFile) -> tuple[str, ...] | None:
    for file in ("classes.txt", "classes.json"):
        data = beside(place, file)
        if data is None:
            continue
        names = _listed(data, json_list=file == "classes.json")
        if names is None or len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(
                f"the {file} beside {place.shown} is no list of classes. Allowed: two different names or more, one per "
                f"line (classes.txt) or as a JSON list of strings (classes.json). Fix: write it again, or delete it"
            )
        return tuple(names)
    return None


def _listed(data: bytes, *, json_list: bool) -> list[str] | None:
    try:
        text = data.decode("utf-8-sig")
        names = json.loads(text) if json_list else [line.strip() for line in text.rstrip().split("\n")]
    except ValueError:
        return None
    sound = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return names if sound else None
