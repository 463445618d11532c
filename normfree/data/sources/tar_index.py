"""Index of a tar file: one pass over its headers finds the byte range of each image, and a cache keeps the result.

A tar is treated as a list of named byte ranges. Nothing is extracted: member names are labels, never paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from normfree.data.encoded import MAX_CLASSES
from normfree.data.sources.storage import StoredFile
from normfree.data.transforms.decode import MAX_BYTES, suffixes
from normfree.files import atomic_write
from normfree.suggest import printable, problem

INDEX_VERSION = 1  # a cached index of another version is not used
MAX_HEADER = 1 << 20  # bytes of a label or of a long name; a header may claim gigabytes
_BLOCK = 512  # POSIX ustar
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FORM = "pairs of KEY.jpg (or .png, .webp, ...) and KEY.cls or KEY.json, uncompressed"


@dataclass(frozen=True)
class TarIndex:
    """The N samples of a shard in the order of their images.

    Attributes:
        offsets: First byte of each image, int64 N.
        sizes: Bytes of each image, int64 N.
        labels: Class numbers, int64 N.
        names: N member names, with unprintable characters escaped.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


def index_of(stored: StoredFile, *, cache: Path | None = None) -> tuple[TarIndex, tuple[int, str]]:
    """Return the index of a tar file, and the stamp of the file that was indexed.

    The index is read from the folder `cache` (default: `cache_folder()`), where files are named after the shard's URL,
    size and version, or it is made in one pass and stored there. A cache that cannot be read or written is ignored.

    Raises:
        ValueError: The shard cannot be used; the message names shard and member.
    """
    try:
        stamp = stored.stamp()
    except FileNotFoundError:
        raise ValueError(
            problem(f"{stored.shown}: no such shard", allowed=_FORM, fix="check the path")
        ) from None
    except OSError as error:
        raise ValueError(
            problem(f"{stored.shown} cannot be read: {error}", allowed=_FORM, fix="check the path")
        ) from None
    url = stored.url if stored.remote else os.path.abspath(stored.url)
    identity = "\n".join([str(INDEX_VERSION), url, *map(str, stamp)])
    name = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + ".npz"
    path = (cache or cache_folder()) / name
    found = _load(path)
    if found is None:
        try:
            with stored.open() as file:
                found = index_tar(file, name=stored.shown, size=stamp[0])
        except OSError as error:
            raise ValueError(
                problem(f"{stored.shown} cannot be read: {error}", allowed=_FORM, fix="check the store")
            ) from None
        _save(path, found)
    return found, stamp


def cache_folder() -> Path:
    """Return the folder of the indices: normfree/shards in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "normfree" / "shards"


def _load(path: Path) -> TarIndex | None:
    """Return a cached index, or None if there is none that can be used."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = bytes(arrays["names"]).decode("utf-8").split("\n")
            offsets, sizes, labels = (
                np.asarray(arrays[k], dtype=np.int64) for k in ("offsets", "sizes", "labels")
            )
    except Exception:  # missing, truncated or damaged: the index is made again
        return None
    if not len(offsets) == len(sizes) == len(labels) == len(names):
        return None
    return TarIndex(offsets, sizes, labels, tuple(names))


def _save(path: Path, index: TarIndex) -> None:
    """Store an index in the cache, if the disk permits."""
    names = np.frombuffer("\n".join(index.names).encode("utf-8"), dtype=np.uint8)

    def write(work: Path) -> None:
        with work.open("wb") as file:
            np.savez(file, offsets=index.offsets, sizes=index.sizes, labels=index.labels, names=names)

    with contextlib.suppress(OSError):  # with a full or read-only disk, the next start indexes again
        atomic_write(path, write)


def index_tar(file: BinaryIO, *, name: str, size: int) -> TarIndex:
    """Index an open tar file of `size` bytes in one pass over its headers; `name` is for messages.

    The key of a member is its name up to the first dot of the last part, as in WebDataset. Hidden members, those named
    __...__, and files of other types are skipped.

    Raises:
        ValueError: The file is compressed, truncated or damaged; it has links, sparse files or devices; or a key does
            not have exactly one image and one label.
    """
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    json_labels: dict[str, int] = {}  # used if there is no .cls
    head = file.read(8)
    file.seek(0)
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            _refuse(
                name,
                f"is compressed with {kind}, so images cannot be read at an offset",
                "unpack it to a plain tar",
            )
    for member, reader in _members(file, name, size):
        shown = printable(member.name, one_line=True)
        parts = member.name.rsplit("/", 1)
        stem, dot, suffix = parts[-1].partition(".")
        if re.match(r"__[^/]*__($|/)", member.name) or not stem or not dot:
            continue
        suffix = suffix.lower()
        key = "/".join([*parts[:-1], stem])
        if "." + suffix in suffixes():
            if key in images:
                _refuse(
                    name,
                    f"has two images for one key, {images[key][2]!r} and {shown!r}",
                    "one image per key",
                )
            if member.size > MAX_BYTES:
                _refuse(name, f"has {member.size:,} bytes in {shown!r}", f"images of at most {MAX_BYTES:,}")
            images[key] = (member.offset_data, member.size, shown)
        elif suffix in ("cls", "json"):
            number = _label(reader, member, suffix, name, shown)
            if number is not None:
                store = labels if suffix == "cls" else json_labels
                if key in store:
                    _refuse(name, f"has the member {shown!r} twice", "one label per key")
                store[key] = number
    missing = next(
        (found[2] for key, found in images.items() if key not in labels and key not in json_labels), None
    )
    if missing is not None:
        _refuse(
            name, f"has no label for {missing!r}", 'add KEY.cls, or KEY.json with a whole number as "label"'
        )
    orphan = next((key for key in labels if key not in images), None)
    if orphan is not None:
        _refuse(
            name,
            f"has a label but no image for {printable(orphan, one_line=True)!r}",
            "keep both in one shard",
        )
    if not images:
        _refuse(name, "holds no images", "check the pattern")
    return TarIndex(
        offsets=np.array([offset for offset, _, _ in images.values()], dtype=np.int64),
        sizes=np.array([length for _, length, _ in images.values()], dtype=np.int64),
        labels=np.array([labels.get(key, json_labels.get(key, 0)) for key in images], dtype=np.int64),
        names=tuple(shown for _, _, shown in images.values()),
    )


def _members(file: BinaryIO, name: str, size: int) -> Any:
    """Yield (member, reader) of every regular file; raise for damage that tarfile would silently ignore."""
    capped = _Capped(file)
    last = -1
    try:
        tar = tarfile.TarFile(fileobj=capped, mode="r", encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all members in memory
            if member.size < 0 or member.offset <= last or member.offset_data + member.size > size:
                raise tarfile.ReadError("a header that points outside the file")
            last = member.offset
            if not member.isdir():
                if not member.isreg() or member.issparse():
                    _refuse(
                        name,
                        f"has {printable(member.name, one_line=True)!r}, {_kind(member)}",
                        "plain files only",
                    )
                yield member, capped
    except (_Refused, OSError):
        raise
    # tarfile's own errors, and ValueError, RecursionError and more from hostile headers.
    except Exception as error:
        position = f" after byte {last}" if last >= 0 else ""
        _refuse(name, f"is no tar, or damaged{position} ({error or type(error).__name__})", "make it again")
    _check_end(capped, name, tar.offset, size)


def _check_end(file: _Capped, name: str, offset: int, size: int) -> None:
    """Raise unless the tar ends properly at `offset`.

    tarfile stops without an error at a header that it cannot read, and at the end of a file truncated between members.
    """
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        _refuse(name, "is truncated: the empty block that closes a tar is missing", "copy or make it again")
    if block.strip(b"\0"):
        _refuse(name, f"has a damaged header at byte {offset}", "make it again")
    if size - offset > MAX_HEADER or file.read(MAX_HEADER).strip(b"\0"):
        _refuse(name, f"goes on after its end at byte {offset}", "keep joined tars as shards of their own")


class _Refused(ValueError):
    """An error raised by this module, in contrast to those of tarfile."""


def _refuse(shard: str, what: str, fix: str) -> NoReturn:
    """Raise the error for a shard that cannot be used."""
    raise _Refused(problem(f"{shard} {what}", allowed=_FORM, fix=fix)) from None


class _Capped(io.RawIOBase):
    """A file wrapper that refuses reads of more than `MAX_HEADER` bytes, which damaged headers may request."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ValueError(f"a header or label of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _label(file: _Capped, member: tarfile.TarInfo, suffix: str, name: str, shown: str) -> int | None:
    """Return the class number in a .cls or .json member, or None if a .json has no label."""
    if member.size > MAX_HEADER:
        _refuse(name, f"has {member.size} bytes in {shown!r}", "a label is one whole number")
    file.seek(member.offset_data)
    text = file.read(member.size)
    try:
        number: Any = int(text) if suffix == "cls" and re.fullmatch(rb"\s*\d{1,9}\s*", text) else None
        if suffix == "json":
            found = json.loads(text)
            if not isinstance(found, dict) or "label" not in found:
                return None  # other metadata; a .cls may hold the label
            number = found["label"]
    except (ValueError, RecursionError):
        number = None
    if type(number) is not int or not 0 <= number < MAX_CLASSES:
        _refuse(name, f"has no class number in {shown!r}", f"a whole number from 0 to {MAX_CLASSES - 1}")
    return number


def _kind(member: tarfile.TarInfo) -> str:
    """Return the type of a member for messages."""
    if member.islnk() or member.issym():
        return "a link"
    return "a sparse file" if member.issparse() else "no regular file"
