"""WebDataset tar shards as a source with random access: a table of byte ranges, and one read per image."""

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
from normfree.data.sources.shell import PREFIX, fetch, pipe_commands
from normfree.data.sources.storage import StoredFile, expand, read_sibling
from normfree.data.sources.tar_index import TarIndex, index_of
from normfree.data.subset import make_split
from normfree.data.transforms.decode import MAX_PIXELS, ImageError
from normfree.suggest import number_of, problem

_NAMES_BYTES = 10_000_000  # of a file of class names; 100,000 names take 3 MB
_THREADS = 8  # shards that are indexed at a time; remote ones spend most of the time waiting


class ShardSource(EncodedSource):
    """The images of tar shards, in the order of shards and members.

    `shards` lists (file, index, stamp). `image` reads the bytes of one member and decodes them, and raises `ImageError`
    if a local shard has changed since it was indexed.
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
        self._files = [file for file, _, _ in shards]
        self._stamps = [stamp for _, _, stamp in shards]
        self._first = np.cumsum([0, *(len(index.offsets) for _, index, _ in shards)])
        self._offsets = np.concatenate([index.offsets for _, index, _ in shards])
        self._sizes = np.concatenate([index.sizes for _, index, _ in shards])
        self._labels = np.concatenate([index.labels for _, index, _ in shards])
        # One byte string, because a million Python strings would be copied page by page into every worker.
        encoded = [name.encode("utf-8") for _, index, _ in shards for name in index.names]
        self._names, self._ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])
        super().__init__(background=background, max_pixels=max_pixels)

    def __len__(self) -> int:
        return len(self._offsets)

    def label(self, index: int) -> int:
        """Return the class of member `index`, from the table."""
        return int(self._labels[index])

    def data(self, index: int) -> bytes:
        """Return the bytes of member `index`."""
        shard = self._shard(index)
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            return self._files[shard].read(offset, size, stamp=self._stamps[shard])
        except OSError as error:
            raise ImageError(self.name(index), f"cannot be read: {error.strerror or error}") from error

    def name(self, index: int) -> str:
        """Return SHARD/MEMBER of sample `index`."""
        member = self._names[self._ends[index] : self._ends[index + 1]].decode("utf-8")
        return f"{self._files[self._shard(index)].shown}/{member}"

    def ident(self, index: int) -> str:
        """Return the name without the folder or store, which is unchanged when the shards are copied elsewhere."""
        shard = self._files[self._shard(index)].shown
        return self.name(index).removeprefix(shard[: shard.rfind("/") + 1])

    def kept(self) -> list[str]:
        """Return a note on the disk space of the output of shell commands, if there are any."""
        sizes = [stamp[0] for file, stamp in zip(self._files, self._stamps, strict=True) if file.label]
        where = os.path.dirname(self._files[0].url)
        fetched = f"fetched into {where}: {number_of(len(sizes), 'shard')}, {sum(sizes):,} bytes"
        return [fetched] if sizes else []

    def _shard(self, index: int) -> int:
        """Return the index of the shard of a sample."""
        return int(np.searchsorted(self._first, index, side="right")) - 1


def open_shards(
    pattern: str, *, classes: Sequence[str] | None = None, cache: Path | None = None, pipes: bool = False
) -> ShardSource:
    """Return the source of all shards that `pattern` names.

    The shards are uncompressed tars of KEY.jpg (or another image suffix) with KEY.cls, or KEY.json with "label"; labels
    are whole numbers from 0. Each shard is indexed once, in one pass, for which a remote shard is read once from end to
    end. Afterwards each image is one ranged read, so shuffling, parts per process and exact resume work as for a
    folder. The output of "pipe:COMMAND" has no offsets, so it is kept as a complete file next to the indices (`fetch`).

    Args:
        pattern: Path, or URL that fsspec opens (s3://, gs://, https://, ...; extra `remote`), with {000..127}, {a,b}
            and, if files can be listed, *; or "pipe:COMMAND", also with braces.
        classes: Class names. By default the lines of classes.txt or the list in classes.json next to the first shard,
            else the numbers.
        cache: Folder of the indices, by default in the user's cache folder. They are keyed by URL, size and date.
        pipes: Allow commands to run. If False, as it should be for text that the user did not type, only output that
            was fetched before is used.

    Raises:
        ValueError: A shard cannot be used; the message names shard and member.
    """
    if pattern == "-":
        raise ValueError(
            problem(
                "'-' is a stream without random access, so no run could resume exactly",
                allowed="tar files on disk, URLs, or pipe:COMMAND, whose output is kept in a file",
                fix="name one of these",
            )
        )
    parts = pipe_commands(pattern) if pattern.startswith(PREFIX) else expand(pattern)

    def open_shard(part: str | StoredFile) -> tuple[StoredFile, TarIndex, tuple[int, str]]:
        if isinstance(part, str):
            part = fetch(part, run=pipes, folder=None if cache is None else cache / "pipes")
        return part, *index_of(part, cache=cache)

    with ThreadPoolExecutor(min(_THREADS, len(parts))) as pool:
        shards = list(pool.map(open_shard, parts))
    highest = max(int(index.labels.max()) for _, index, _ in shards)
    names = _class_names(shards[0][0]) if classes is None else tuple(classes)
    if names is None:
        names = number_classes(highest + 1)
    if highest >= len(names):
        file, index, _ = next(s for s in shards if int(s[1].labels.max()) == highest)
        member = index.names[int(index.labels.argmax())]
        raise ValueError(
            problem(
                f"{file.shown} has the class number {highest} at {member!r}, but there are {len(names)} class names",
                allowed=f"0 to {len(names) - 1}",
                fix="complete the list of classes",
            )
        )
    if len(names) < 2:
        raise ValueError(
            problem(
                f"{pattern!r} holds one class", allowed="two or more", fix="add shards with other classes"
            )
        )
    return ShardSource(shards, classes=names)


def split_shards(
    pattern: str,
    val: str | None,
    *,
    test: str | None = None,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    pipes: bool = False,
) -> Split:
    """Return the split of shards: `val` and `test` are the patterns of their shards; without them, hashes divide.

    If classes are numbers, both parts get the larger number of classes.

    Raises:
        ValueError: As for `open_shards`, or the two parts have different class names.
    """
    train = open_shards(pattern, pipes=pipes)
    held: dict[str, ShardSource] = {}
    for part, other in (("val", val), ("test", test)):
        if other is not None:
            held[part] = open_shards(other, pipes=pipes)
            _match_classes(train, held[part], pattern, other)
    for source in held.values():
        source.classes = train.classes
    split = make_split(
        pattern, train, held.get("val"), test=held.get("test"), val_fraction=val_fraction, test_fraction=test_fraction,
        seed=seed, ident=train.ident,
    )  # fmt: skip
    kept = [note for source in (train, *held.values()) for note in source.kept()]
    return replace(split, notes=(*split.notes, *kept))


def _match_classes(train: ShardSource, held: ShardSource, pattern: str, other: str) -> None:
    """Give `train` the larger number of classes if the classes of both are numbers.

    Raises:
        ValueError: The class names differ.
    """
    if held.classes == train.classes:
        return
    longer = max(train.classes, held.classes, key=len)
    if any(
        source.classes != longer[: len(source.classes)] for source in (train, held)
    ) or longer != number_classes(len(longer)):
        raise ValueError(
            problem(
                f"{pattern} and {other} have different class names",
                allowed="the same classes.txt next to both",
                fix="copy one of them",
            )
        )
    train.classes = longer


def _class_names(shard: StoredFile) -> tuple[str, ...] | None:
    """Return the class names in the file next to a shard, or None if there is no such file."""
    for file in ("classes.txt", "classes.json"):
        data = read_sibling(shard, file, limit=_NAMES_BYTES)
        if data is None:
            continue
        names = _listed(data, json_list=file == "classes.json")
        if names is None or len(set(names)) != len(names) or len(names) < 2:
            raise ValueError(
                problem(
                    f"the {file} next to {shard.shown} is no list of classes",
                    allowed="two different names or more, one per line (classes.txt) or as a JSON list of strings "
                    "(classes.json)",
                    fix="write it again, or delete it",
                )
            )
        return tuple(names)
    return None


def _listed(data: bytes, *, json_list: bool) -> list[str] | None:
    """Return the names in a file of class names, or None if it is malformed."""
    try:
        text = data.decode("utf-8-sig")
        names = json.loads(text) if json_list else [line.strip() for line in text.rstrip().split("\n")]
    except (ValueError, RecursionError):
        return None
    sound = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    return names if sound else None
