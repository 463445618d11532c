"""Small images in one file: decoded, resized, and mapped into memory, so that reading an image costs a copy."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from normfree.data.source import Source, Split
from normfree.data.subset import make_split
from normfree.files import atomic_write, open_regular
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "normfree.packed.1"
MAX_SIDE = 1024  # px; larger images take less space as JPEG than as pixels
_HEADER_BYTES = 10_000_000  # as much as 100,000 class names take
_CHUNK = 1 << 24  # bytes per update of the hash
_ALLOWED = "a file that normfree.data.sources.packed.pack wrote"


def pack(
    source: Source,
    path: str | os.PathLike[str],
    *,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write every image of `source`, `size` x `size`, to one file; open it as "packed:FILE".

    An image of another size is resized to the square (bicubic, antialiased, ignoring the aspect, as in the evaluation
    crop "squash"); one of the right size is stored unchanged. For a sample that owns several images the canonical one
    is stored. The file is in the safetensors format: "images" uint8 N `size` `size` 3, "labels" int64 N, "names" uint8
    (a JSON list), and in its metadata the class names and a sha256 of all bytes of the tensors. It takes
    N x `size`^2 x 3 bytes (CIFAR-10: 150 MB). Images are processed one by one, so memory use is small. The file
    appears under its name only when it is complete.

    Args:
        source: Data set.
        path: File to write.
        size: Side of the images in pixels, 1 to 1024.
        progress: Called as `progress(done, total)` after each image.

    Returns:
        The path of the file.

    Raises:
        ValueError: The source is empty, or `size` is out of range.
        ImageError: An image cannot be read.
    """
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(problem(f"size={size}", allowed=f"1 to {MAX_SIDE} pixels", fix="size=64"))
    count = len(source)
    if count == 0:
        raise ValueError(
            problem("the source has no samples", allowed="at least one", fix="check the path of the data")
        )
    labels = np.array([source.label(i) for i in range(count)], dtype="<i8").tobytes()
    names = json.dumps([source.name(i) for i in range(count)]).encode("ascii")
    lengths = {"images": count * size * size * 3, "labels": len(labels), "names": len(names)}
    shapes = {"images": [count, size, size, 3], "labels": [count], "names": [len(names)]}
    blank = _header(source.classes, lengths, shapes, "0" * 64)

    def write(work: Path) -> None:
        with work.open("wb") as file:
            file.write(blank)
            digest = hashlib.sha256()
            for index in range(count):
                pixels = _pixels(source.image(index), size)
                digest.update(pixels)
                file.write(pixels)
                if progress is not None:
                    progress(index + 1, count)
            for data in (labels, names):
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(_header(source.classes, lengths, shapes, digest.hexdigest()))
            file.flush()
            os.fsync(file.fileno())

    return atomic_write(Path(path), write)


def _pixels(image: Image, size: int) -> bytes:
    """Return the RGB pixels of an image, resized to `size` x `size`."""
    from PIL.Image import Resampling

    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Resampling.BICUBIC)
    return image.tobytes()


def _header(
    classes: tuple[str, ...], lengths: dict[str, int], shapes: dict[str, list[int]], digest: str
) -> bytes:
    """Return the header of a safetensors file: its length (8 bytes, little-endian) and its JSON text.

    It is written here because the library would need all images in memory.
    """
    metadata = {"format": FORMAT, "classes": json.dumps(list(classes)), "sha256": digest}
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, length in lengths.items():
        kind = "I64" if name == "labels" else "U8"
        header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [start, start + length]}
        start += length
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


class PackedSource:
    """The images of a packed file, mapped into memory: workers and processes of one machine share its pages.

    Args:
        path: File written by `pack`.
        check: Compare the sha256 once, at about a gigabyte per second.

    Raises:
        ValueError: The file is not a packed one, is truncated, or does not have the bytes that were written.
    """

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True) -> None:
        self._path = os.fspath(path)
        try:
            with open_regular(self._path) as file:
                start, header = _read_header(file, self._path)
                if check and _digest(file, start) != header["__metadata__"]["sha256"]:
                    raise ValueError(_not_packed(f"{self._path} is damaged: its sha256 differs"))
                try:
                    self.classes, self._shape = _described(header)
                    self._labels, self._names = _samples(file, start, header, len(self.classes))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    reason = f"{type(error).__name__}: {error}"
                    raise ValueError(_not_packed(f"{self._path} has other contents ({reason})")) from None
        except OSError as error:
            raise ValueError(
                problem(
                    f"{self._path} cannot be read: {error.strerror or error}",
                    allowed=_ALLOWED,
                    fix="check the path",
                )
            ) from None
        self._start = start
        self._images = self._map()

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return int(self._shape[1])

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Return the class of sample `index`."""
        return int(self._labels[index])

    def image(self, index: int, draw: int = 0) -> Image:
        """Return image `index`, `size` x `size`; `draw` has no effect."""
        from PIL import Image

        return Image.fromarray(np.array(self._images[index]))

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, a read-only view of the file."""
        return np.asarray(self._images[index])

    def name(self, index: int) -> str:
        """Return the name of sample `index` in the packed source."""
        return self._names[index]

    def _map(self) -> np.ndarray:
        """Map the images of the file into memory. They are the first tensor."""
        return np.memmap(self._path, dtype=np.uint8, mode="r", offset=self._start, shape=self._shape)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling the map would copy its pixels.
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = self._map()


def split_packed(
    path: str,
    val: str | None,
    *,
    test: str | None = None,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
) -> Split:
    """Return the split of packed files; without `val` or `test`, `path` is divided by hash.

    Raises:
        ValueError: As for `PackedSource`, or the files do not match.
    """
    train = PackedSource(path)
    held = {part: PackedSource(name) for part, name in (("val", val), ("test", test)) if name is not None}
    for part, source in held.items():
        if source.classes != train.classes or source.size != train.size:
            name = val if part == "val" else test
            raise ValueError(
                problem(
                    f"{path} and {name} differ in classes or size ({train.size} and {source.size} px)",
                    allowed="files of the same classes and size",
                    fix="pack one of them again",
                )
            )
    return make_split(
        path, train, held.get("val"), test=held.get("test"), val_fraction=val_fraction, test_fraction=test_fraction,
        seed=seed, image_size=train.size,
    )  # fmt: skip


def _read_header(file: BinaryIO, path: str) -> tuple[int, dict[str, Any]]:
    """Return the offset of the tensors and the parsed header."""
    from safetensors import SafetensorError, safe_open

    length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_BYTES:
        raise ValueError(_not_packed(f"{path} has a header of {length:,} bytes"))
    try:
        with safe_open(path, framework="np") as parsed:  # checks lengths, types and bounds
            metadata = parsed.metadata() or {}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise ValueError(_not_packed(f"{path} is no packed file, or truncated ({error})")) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(_not_packed(f"{path} is a safetensors file of another kind"))
    return 8 + length, json.loads(file.read(length))


def _described(header: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the class names, and the shape of all images N S S 3.

    Raises:
        ValueError, KeyError, TypeError: the header is not one that `pack` wrote.
    """
    classes = json.loads(header["__metadata__"]["classes"])
    kinds = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    shape = tuple(header["images"]["shape"])
    if kinds != {"images": "U8", "labels": "I64", "names": "U8"}:
        raise ValueError(f"tensors {kinds}")
    if (
        len(shape) != 4
        or shape[1] != shape[2]
        or shape[3] != 3
        or not 1 <= shape[1] <= MAX_SIDE
        or not shape[0]
    ):
        raise ValueError(f"images of the shape {shape}")
    if header["images"]["data_offsets"][0] != 0:
        raise ValueError("images that are not the first tensor")
    if header["labels"]["shape"] != [shape[0]] or len(header["names"]["shape"]) != 1:
        raise ValueError(f"labels or names of another number than {shape[0]}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("class names that are not a list of strings")
    return tuple(classes), shape


def _samples(
    file: BinaryIO, start: int, header: dict[str, Any], classes: int
) -> tuple[np.ndarray, list[str]]:
    """Return labels and names of the samples.

    Raises:
        ValueError: a label or name is not one that `pack` wrote.
    """
    parts = []
    for name in ("labels", "names"):
        first, end = header[name]["data_offsets"]
        file.seek(start + first)
        parts.append(file.read(end - first))
    labels, names = np.frombuffer(parts[0], dtype="<i8"), json.loads(parts[1])
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
    if not isinstance(names, list) or len(names) != len(labels) or not all(isinstance(n, str) for n in names):
        raise ValueError("names that are not one string for each image")
    return labels, names


def _digest(file: BinaryIO, start: int) -> str:
    """Return the sha256 of all bytes from `start`."""
    digest = hashlib.sha256()
    file.seek(start)
    while data := file.read(_CHUNK):
        digest.update(data)
    return digest.hexdigest()


def _not_packed(given: str) -> str:
    """Return the error message for a file that is not as `pack` wrote it."""
    return problem(given, allowed=_ALLOWED, fix="pack it again")
