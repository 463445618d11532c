"""Hugging Face datasets read as a stream, possibly over a network, without a local copy, and shuffled in blocks."""

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

BUFFER = 1000  # images that are shuffled with each other; also the default of `datasets`
TEAM = 16  # files that are read side by side, so that their images mix in a batch
_THREADS = 8  # files that are read at a time; remote ones spend most of the time waiting

_Piece = tuple[int, int]  # index of the file, index of the piece in it


class HuggingFaceStreamSource(EncodedSource):
    """The rows of a `datasets.IterableDataset`, in the order of the stream; a `StreamedSource`.

    `image` can return any row, but access is fast only in the order of `order`, by `read`: files are divided into
    pieces of `buffer` / 16 rows (larger pieces if there are fewer files), and a piece is read from its first row on.
    About twice `buffer` encoded images are kept in memory.

    Args:
        rows: The data set.
        image: Column with encoded images.
        labels: Class numbers, int64 N, from an earlier pass.
        counts: Number of rows of each file (each shard of the stream), from an earlier pass.
        classes: Class names.
        prefix: FOLDER_OR_NAME/SPLIT, for names.
        buffer: Images that are shuffled with each other.
        background: Color 0 to 255 under transparent pixels.
        max_pixels: Largest width times height that is decoded.
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
        self._open: dict[int, tuple[int, Iterator[Any]]] = {}  # file -> index of the next piece, its rows
        self._held: dict[int, Any] = {}
        # At interpreter exit, parquet files that are still open raise errors about unloaded modules.
        weakref.finalize(self, _close, self._open)
        super().__init__(background=background, max_pixels=max_pixels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": OrderedDict(), "_open": {}}  # open files cannot be pickled

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Return the class of row `index`."""
        return int(self._labels[index])

    def name(self, index: int) -> str:
        """Return FOLDER_OR_NAME/SPLIT/ROW."""
        return f"{self._prefix}/{index}"

    def data(self, index: int) -> str | bytes:
        """Return the path or the bytes in row `index`, from the data passed to `hold`, else from the stream."""
        found = self._held[index] if index in self._held else self.read([index])[index]
        if found is None:
            raise ImageError(self.name(index), "the row has no image")
        data: str | bytes = found
        return data

    def order(self, seed: int, cycle: int) -> np.ndarray:
        """Return the permutation of the indices used in this cycle, a function of the arguments only.

        Files come in a new order in each cycle, 16 at a time. One piece of each makes a block of `buffer` images, which
        is shuffled. So two images of one file that are further apart than a piece are never in the same block.
        """
        files = permutation(len(self._first) - 1, seed, "files", cycle)
        blocks = []
        for start in range(0, len(files), self._team):
            team = files[start : start + self._team]
            pieces = max(-(-int(self._first[f + 1] - self._first[f]) // self._length) for f in team)
            for number in range(pieces):
                rows = np.concatenate([self._rows_of(int(f), number) for f in team])
                blocks.append(rows[permutation(len(rows), seed, "order", cycle, start, number)])
        return np.concatenate(blocks)

    def read(self, indices: Sequence[int]) -> dict[int, str | bytes | None]:
        """Return the paths or bytes of these rows.

        This is fast if it continues after the last call; else the files are read again from their beginning.

        Raises:
            ImageError: The stream breaks off.
        """
        wanted = OrderedDict((self._piece(i), None) for i in indices)
        for piece in wanted.keys() & self._pieces.keys():
            self._pieces.move_to_end(piece)
        missing = [piece for piece in wanted if piece not in self._pieces]
        if missing:
            with ThreadPoolExecutor(min(_THREADS, len(missing))) as pool:
                # the pieces of a file come from one iterator, so one thread reads them
                by_file = [list(group) for _, group in itertools.groupby(sorted(missing), lambda p: p[0])]
                for found in pool.map(lambda group: [(p, self._load(*p)) for p in group], by_file):
                    self._pieces.update(found)
        while len(self._pieces) > max(2 * self._team, len(wanted)):
            self._pieces.popitem(last=False)
        return {i: self._pieces[self._piece(i)][self._offset(i)] for i in indices}

    def hold(self, data: dict[int, str | bytes | None]) -> None:
        """Keep the result of `read`, possibly from another process, in place of what was kept before."""
        self._held = data

    def evenness(self) -> tuple[float, float]:
        """Return the mean number of classes in a block of cycle 0 of seed 0, and the number if all data were shuffled.

        The first is far below the second if files are sorted by class.
        """
        size = self._team * self._length
        if len(self) <= size:
            return float(len(set(self._labels))), float(len(set(self._labels)))
        labels = self._labels[self.order(0, 0)]
        blocks = [labels[i : i + size] for i in range(0, len(labels) - size + 1, size)]
        share = np.bincount(self._labels) / len(self)
        return float(np.mean([len(np.unique(b)) for b in blocks])), float(np.sum(1 - (1 - share) ** size))

    def _piece(self, index: int) -> _Piece:
        """Return the piece of a row."""
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, (index - int(self._first[file])) // self._length

    def _offset(self, index: int) -> int:
        """Return the position of a row in its piece."""
        return (index - int(self._first[self._piece(index)[0]])) % self._length

    def _rows_of(self, file: int, number: int) -> np.ndarray:
        """Return the rows of a piece."""
        start = int(self._first[file]) + number * self._length
        return np.arange(start, max(start, min(start + self._length, int(self._first[file + 1]))))

    def _load(self, file: int, number: int) -> list[Any]:
        """Read a piece from the iterator of its file, or from a new one."""
        rows = self._rows_of(file, number)
        following, stream = self._open.get(file, (-1, iter(())))
        try:
            if following != number:
                part = self._rows.shard(num_shards=len(self._first) - 1, index=file)
                stream = iter(part.skip(number * self._length) if number else part)
            found = [_encoded(row[self._image]) for row in itertools.islice(stream, len(rows))]
        except Exception as error:  # of `datasets`, the network, Arrow or the hub
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ImageError(self.name(int(rows[0])), f"the stream broke off: {first}") from error
        if len(found) < len(rows):
            reason = "the stream has ended: it is shorter than when its rows were counted"
            raise ImageError(self.name(int(rows[len(found)])), reason)
        self._open[file] = number + 1, stream
        if rows[-1] + 1 == self._first[file + 1]:
            _close({file: self._open.pop(file)})
        return found


def _close(streams: dict[int, tuple[int, Any]]) -> None:
    """Close iterators."""
    for _, stream in streams.values():
        with contextlib.suppress(Exception):  # a thread may still read it
            stream.close()


def _encoded(cell: Any) -> str | bytes | None:
    """Return the bytes or the local path in a cell of the image column, or None; remote files are read."""
    if isinstance(cell, bytes) or cell is None:
        return cell
    data: bytes | str | None = cell["path"] or None if cell["bytes"] is None else cell["bytes"]
    if isinstance(data, str) and "://" in data:
        file = StoredFile(data)
        return file.read(0, file.stamp()[0])
    return data


def labels_of(rows: Any, label: str) -> list[list[Any]]:
    """Return the unconverted labels of an `IterableDataset`, one list for each of its files (shards)."""
    column, count = rows.select_columns([label]), rows.num_shards

    def of(file: int) -> list[Any]:
        part = column.shard(num_shards=count, index=file)
        return [value for batch in part.iter(batch_size=1000) for value in batch[label]]

    with ThreadPoolExecutor(min(_THREADS, count)) as pool:
        return list(pool.map(of, range(count)))
