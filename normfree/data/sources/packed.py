"""Small pictures in one file: decoded, resized, and mapped into memory, so that reading one costs a copy."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from normfree.data.source import Source, Split
from normfree.data.subset import make_split

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "normfree.packed.1"
MAX_SIDE = 1024  # px; larger pictures are smaller as JPEG than as pixels
_CHUNK = 1 << 24  # bytes per update of the hash
_ALLOWED = "a file that normfree.data.sources.packed.pack wrote"


def pack(
    source: Source,
    path: str | os.PathLike[str],
    *,
    size: int,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write every picture of `source`, `size` x `size`, to one file; open it as "packed:FILE".

    A picture of another size is resized straight to the square (bicubic, antialiased, aspect not kept, as in the
    evaluation crop "squash"); one of the right size is stored as it is. Of a sample that owns several pictures
    the canonical one is stored. The file is in the safetensors format: "images" uint8 N `size` `size` 3, "labels"
    int64 N, "names" uint8 (a JSON list), and in its metadata the class names and a sha256 of all bytes of the
    tensors. It takes N x `size`^2 x 3 bytes (CIFAR-10: 150 MB). Pictures pass through one by one, so memory stays
    small; the file appears under its name only when it is complete. `progress(done, total)` is called after each
    picture.

    Raises `ValueError` for an empty source and a `size` outside 1 to 1024, `ImageError` for a picture that cannot
    be read.
    """
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"size={size}. Allowed: 1 to {MAX_SIDE} pixels. Fix: size=64")
    count = len(source)
    if count == 0:
        raise ValueError("a source without samples. Allowed: at least one. Fix: check the path of the data")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    labels = np.array([source.label(i) for i in range(count)], dtype="<i8").tobytes()
    names = json.dumps([source.name(i) for i in range(count)]).encode("ascii")
    lengths = {"images": count * size * size * 3, "labels": len(labels), "names": len(names)}
    shapes = {"images": [count, size, size, 3], "labels": [count], "names": [len(names)]}
    blank = _header(source.classes, lengths, shapes, "0" * 64)
    handle, work = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
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
        os.chmod(work, 0o644)  # mkstemp's files are for their owner alone
        os.replace(work, target)
    except BaseException:
        os.unlink(work)
        raise
    return target


def _pixels(image: Image, size: int) -> bytes:
    from PIL.Image import Resampling

    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Resampling.BICUBIC)
    return image.tobytes()


def _header(
    classes: tuple[str, ...], lengths: dict[str, int], shapes: dict[str, list[int]], digest: str
) -> bytes:
    # safetensors: the length of the header (8 bytes, little-endian), the header (JSON), the tensors. Written here,
    # as the library would need all pictures in memory.
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
    """The pictures of a packed file, mapped into memory: workers and processes of one machine share its pages.

    With `check` (the default) the sha256 is compared once, at about a gigabyte per second. Raises `ValueError`
    for a file that is no packed one, is cut short, or does not have the bytes that were written.
    """

    def __init__(self, path: str | os.PathLike[str], *, check: bool = True) -> None:
        self._path = os.fspath(path)
        try:
            with open(self._path, "rb") as file:
                start, header = _read_header(file, self._path)
                if check and _digest(file, start) != header["__metadata__"]["sha256"]:
                    raise ValueError(f"{self._path} is damaged: its sha256 differs. {_again()}")
                file.seek(start + header["labels"]["data_offsets"][0])
                self._labels = np.frombuffer(file.read(8 * header["labels"]["shape"][0]), dtype="<i8")
                self._names: list[str] = json.loads(file.read(header["names"]["shape"][0]))
        except OSError as error:
            raise ValueError(
                f"{self._path} cannot be read: {error.strerror or error}. Allowed: {_ALLOWED}. Fix: check the path"
            ) from None
        self.classes = tuple(json.loads(header["__metadata__"]["classes"]))
        self._start, self._shape = start, tuple(header["images"]["shape"])
        self._images = self._map()

    @property
    def size(self) -> int:
        """The side of the pictures in pixels."""
        return int(self._shape[1])

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """The class of sample `index`."""
        return int(self._labels[index])

    def image(self, index: int, draw: int = 0) -> Image:
        """Picture `index`, `size` x `size`; `draw` changes nothing."""
        from PIL import Image

        return Image.fromarray(np.array(self._images[index]))

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """The same as an array, a view of the file."""
        return np.asarray(self._images[index])

    def name(self, index: int) -> str:
        """What the packed source called sample `index`."""
        return self._names[index]

    def _map(self) -> np.ndarray:
        return np.memmap(self._path, dtype=np.uint8, mode="r", offset=self._start, shape=self._shape)

    def __getstate__(self) -> dict[str, Any]:  # a pickled map would carry its pixels
        return {key: value for key, value in self.__dict__.items() if key != "_images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._images = self._map()


def split_packed(path: str, val: str | None, *, val_fraction: float, seed: int) -> Split:
    """The split of packed files; without `val`, a part of `path` is chosen by hash. Raises as `PackedSource`."""
    train = PackedSource(path)
    held = PackedSource(val) if val is not None else None
    if held is not None and (held.classes != train.classes or held.size != train.size):
        raise ValueError(
            f"{path} and {val} differ in classes or size ({train.size} and {held.size} px). Allowed: both packed "
            "alike. Fix: pack one of them again"
        )
    return make_split(path, train, held, val_fraction=val_fraction, seed=seed, image_size=train.size)


def _read_header(file: BinaryIO, path: str) -> tuple[int, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as parsed:  # checks lengths, types and bounds
            metadata = parsed.metadata() or {}
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise
        raise ValueError(f"{path} is no packed file, or cut short ({error}). {_again()}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file of another kind. {_again()}")
    (length,) = struct.unpack("<Q", file.read(8))
    return 8 + length, json.loads(file.read(length))


def _digest(file: BinaryIO, start: int) -> str:
    digest = hashlib.sha256()
    file.seek(start)
    while data := file.read(_CHUNK):
        digest.update(data)
    return digest.hexdigest()


def _again() -> str:
    return f"Allowed: {_ALLOWED}. Fix: pack it again"
