"""Hugging Face datasets read forwards, over a network perhaps, without a copy: shuffled as far as a stream can be."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from normfree.data.encoded import EncodedSource
from normfree.data.seeds import permutation
from normfree.data.sources.storage import StoredFile
from normfree.data.transforms.decode import MAX_PIXELS, ImageError

BUFFER = 1000  # pictures that are shuffled with each other; the default of `datasets`, too
TEAM = 16  # files that are read side by side, so that their pictures meet in a batch
_THREADS = 8  # files that are read at a time; a remote one mostly waits

_Piece = tuple[int, int]  # file, number of the piece in it


class StreamSource(EncodedSource):
    """The rows of a `datasets.IterableDataset` with encoded pictures in `image`; i counts them in the stream's order.

    `labels` (int64 N) and `counts`, the rows of each file (of each of the stream's shards), come from an earlier pass.
    Any row can be had (`image`), but cheaply only in the order of `order`, by `read`: files are cut into pieces of
    `buffer` / 16 rows (fewer files: larger pieces), and a piece is read from its first row on. About twice `buffer`
    pictures are kept, encoded.
    """

    def __init__(
        self,
        rows: Any,
        *,
        image: str,
        labels: np.ndarray,
        counts: Sequence[int],
        classes: Sequence[str],
        prefix: str,
        buffer: int = BUFFER,
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        assert sum(counts) == len(labels)
        self.classes = tuple(classes)
        self._rows, self._image, self._labels, self._prefix = rows, image, labels, prefix
        self._first = np.cumsum([0, *counts])
        self._team = min(TEAM, len(counts))
        self._length = max(1, buffer // self._team)
        self._pieces: OrderedDict[_Piece, list[Any]] = OrderedDict()
        self._open: dict[int, tuple[int, Iterator[Any]]] = {}  # file -> number of the next piece, its rows
        self._held: dict[int, Any] = {}
        # Left to the end of the interpreter, open parquet files complain of modules that are gone.
        weakref.finalize(self, _close, self._open)
        super().__init__(background=background, max_pixels=max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": OrderedDict(), "_open": {}}  # open files do not travel

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """The class of row `index`."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """FOLDER_OR_NAME/SPLIT/ROW."""
        return f"{self._prefix}/{index}"

    def data(self, index: int) -> str | bytes:
        """The path or the bytes in row `index`, from what `hold` was given, else from the stream."""
        found = self._held[index] if index in self._held else self.read([index])[index]
        if found is None:
            raise ImageError(self.name(index), "the row has no picture")
        data: str | bytes = found
        return data

    def order(self, seed: int, turn: int) -> np.ndarray:
        """Each index once, as the loader takes them in this turn: a function of its arguments alone.

        Files come in a new order each turn, 16 at a time. One piece of each makes a block of `buffer` pictures, and
        those are shuffled. So two pictures of one file that lie further apart than a piece never meet in a block.
        """
        files = permutation(len(self._first) - 1, seed, "files", turn)
        blocks = []
        for start in range(0, len(files), self._team):
            team = files[start : start + self._team]
            pieces = max(-(-int(self._first[f + 1] - self._first[f]) // self._length) for f in team)
            for number in range(pieces):
                rows = np.concatenate([self._rows_of(int(f), number) for f in team])
                blocks.append(rows[permutation(len(rows), seed, "order", turn, start, number)])
        return np.concatenate(blocks)

    def read(self, indices: Sequence[int]) -> dict[int, str | bytes | None]:
        """What `data` needs for these rows. Fast where the last call left off; else its files are begun again.

        Raises `ImageError` when the stream breaks off.
        """
        wanted = OrderedDict((self._piece(i), None) for i in indices)
        for piece in wanted.keys() & self._pieces.keys():
            self._pieces.move_to_end(piece)
        missing = [piece for piece in wanted if piece not in self._pieces]
        if missing:
            with ThreadPoolExecutor(min(_THREADS, len(missing))) as pool:
                # a file's pieces follow each other in its one iterator
                by_file = [list(group) for _, group in itertools.groupby(sorted(missing), lambda p: p[0])]
                for found in pool.map(lambda group: [(p, self._load(*p)) for p in group], by_file):
                    self._pieces.update(found)
        while len(self._pieces) > max(2 * self._team, len(wanted)):
            self._pieces.popitem(last=False)
        return {i: self._pieces[self._piece(i)][self._offset(i)] for i in indices}

    def hold(self, data: dict[int, str | bytes | None]) -> None:
        """Keeps what `read` found elsewhere, in another process perhaps, in place of what was held before."""
        self._held = data

    def evenness(self) -> tuple[float, float]:
        """How many classes a block holds on average in turn 0 of seed 0, and how many it would if the whole set were
        shuffled: the first is far below the second where a file is sorted by class."""
        size = self._team * self._length
        if len(self) <= size:
            return float(len(set(self._labels))), float(len(set(self._labels)))
        labels = self._labels[self.order(0, 0)]
        blocks = [labels[i : i + size] for i in range(0, len(labels) - size + 1, size)]
        share = np.bincount(self._labels) / len(self)
        return float(np.mean([len(np.unique(b)) for b in blocks])), float(np.sum(1 - (1 - share) ** size))

    def _piece(self, index: int) -> _Piece:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, (index - int(self._first[file])) // self._length

    def _offset(self, index: int) -> int:
        return (index - int(self._first[self._piece(index)[0]])) % self._length

    def _rows_of(self, file: int, number: int) -> np.ndarray:
        start = int(self._first[file]) + number * self._length
        return np.arange(start, max(start, min(start + self._length, int(self._first[file + 1]))))

    def _load(self, file: int, number: int) -> list[Any]:
        rows = self._rows_of(file, number)
        following, stream = self._open.get(file, (-1, iter(())))
        try:
            if following != number:
                part = self._rows.shard(num_shards=len(self._first) - 1, index=file)
                stream = iter(part.skip(number * self._length) if number else part)
            found = [_encoded(row[self._image]) for row in itertools.islice(stream, len(rows))]
        except Exception as error:  # the library's own, those of the network, of Arrow, of the hub
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ImageError(self.name(int(rows[0])), f"the stream broke off: {first}") from error
        if len(found) < len(rows):
            reason = "the stream has ended: it is shorter than when it was counted"
            raise ImageError(self.name(int(rows[len(found)])), reason)
        self._open[file] = number + 1, stream
        if rows[-1] + 1 == self._first[file + 1]:
            _close({file: self._open.pop(file)})
        return found


def _close(streams: dict[int, tuple[int, Any]]) -> None:
    for _, stream in streams.values():
        with contextlib.suppress(Exception):  # one that a thread still reads
            stream.close()


def _encoded(cell: Any) -> str | bytes | None:
    """The bytes of a picture's cell, or its local path, or None; a path elsewhere is read."""
    if isinstance(cell, bytes) or cell is None:
        return cell
    data: bytes | str | None = cell["path"] or None if cell["bytes"] is None else cell["bytes"]
    if isinstance(data, str) and "://" in data:
        place = StoredFile(data)
        return place.read(0, place.stamp()[0])
    return data


def labels_of(rows: Any, label: str) -> list[list[Any]]:
    """The labels of an `IterableDataset`, as they are written, of each of its files (shards)."""
    column, count = rows.select_columns([label]), rows.num_shards

    def of(file: int) -> list[Any]:
        part = column.shard(num_shards=count, index=file)
        return [value for batch in part.iter(batch_size=1000) for value in batch[label]]

    with ThreadPoolExecutor(min(_THREADS, count)) as pool:
        return list(pool.map(of, range(count)))
