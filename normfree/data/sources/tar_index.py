"""Where the pictures lie in a tar file: one pass over its headers, kept in a cache; then any of them is one read.

A tar is taken as a list of named byte ranges. Nothing is extracted: names are labels, never paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from normfree.data.encoded import MAX_CLASSES
from normfree.data.sources.storage import StoredFile
from normfree.data.transforms.decode import SUFFIXES

INDEX_VERSION = 1  # a cached index of another version is made anew
MAX_HEADER = 1 << 20  # bytes of a label or of a long name; a header may claim gigabytes
_BLOCK = 512  # POSIX ustar
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_FORM = "pairs of KEY.jpg (or .png, .webp, ...) and KEY.cls or KEY.json, uncompressed"


@dataclass(frozen=True)
class TarIndex:
    """The N samples of a shard in the order of their pictures: bytes from `offsets` on, `sizes` long (int64 N),
    class numbers `labels` (int64 N), and `names`, N member names in which nothing unprintable is left."""

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


def index_of(place: StoredFile, *, cache: Path | None = None) -> tuple[TarIndex, tuple[int, str]]:
    """The index of a tar file, and the stamp of the file it belongs to.

    It is read from the folder `cache` (default: `cache_folder()`), where a file is named after the shard's URL,
    size and version, or made in one pass and left there. A cache that cannot be written or read is done without.
    Raises `ValueError` naming shard and member for what cannot be used.
    """
    try:
        stamp = place.stamp()
    except FileNotFoundError:
        raise ValueError(f"{place.shown}: no such shard. Allowed: {_FORM}. Fix: check the path") from None
    except OSError as error:
        raise ValueError(
            f"{place.shown} cannot be read: {error}. Allowed: {_FORM}. Fix: check the path"
        ) from None
    url = place.url if place.remote else os.path.abspath(place.url)
    words = "\n".join([str(INDEX_VERSION), url, *map(str, stamp)])
    name = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + ".npz"
    path = (cache or cache_folder()) / name
    found = _load(path)
    if found is None:
        try:
            with place.open() as file:
                found = index_tar(file, name=place.shown, size=stamp[0])
        except OSError as error:
            raise ValueError(
                f"{place.shown} cannot be read: {error}. Allowed: {_FORM}. Fix: check the store"
            ) from None
        _save(path, found)
    return found, stamp


def cache_folder() -> Path:
    """Where indices are kept: normfree/shards in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "normfree" / "shards"


def _load(path: Path) -> TarIndex | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = bytes(arrays["names"]).decode("utf-8").split("\n")
            offsets, sizes, labels = (
                np.asarray(arrays[k], dtype=np.int64) for k in ("offsets", "sizes", "labels")
            )
    except Exception:  # not there, cut short, of another time: it is made again
        return None
    if not len(offsets) == len(sizes) == len(labels) == len(names):
        return None
    return TarIndex(offsets, sizes, labels, tuple(names))


def _save(path: Path, index: TarIndex) -> None:
    names = np.frombuffer("\n".join(index.names).encode("utf-8"), dtype=np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, offsets=index.offsets, sizes=index.sizes, labels=index.labels, names=names)
            os.replace(work, path)
        except OSError:
            os.unlink(work)
            raise
    except OSError:  # a full or read-only disk costs the next start some seconds, no more
        return


def index_tar(file: BinaryIO, *, name: str, size: int) -> TarIndex:
    """One pass over the headers of an open tar file of `size` bytes; `name` is for messages.

    The key of a member is its name up to the first dot of the last part, as in WebDataset. Hidden members and
    those called __...__ are left out, as is every other file that a key may own. Raises `ValueError` for a
    compressed, truncated or damaged file, for links, sparse files and devices, for a picture without a label or
    a label without a picture, and for two of either for one key.
    """
    pictures: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, int] = {}
    asides: dict[str, int] = {}  # from .json, which gives way to .cls
    head = file.read(8)
    file.seek(0)
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            _refuse(
                name,
                f"is compressed with {kind}, so no picture can be reached directly",
                "unpack it to a plain tar",
            )
    for member, reader in _members(file, name, size):
        shown = _printable(member.name)
        parts = member.name.rsplit("/", 1)
        stem, dot, suffix = parts[-1].partition(".")
        if re.match(r"__[^/]*__($|/)", member.name) or not stem or not dot:
            continue
        suffix = suffix.lower()
        key = "/".join([*parts[:-1], stem])
        if "." + suffix in SUFFIXES:
            if key in pictures:
                _refuse(
                    name,
                    f"has two pictures for one key, {pictures[key][2]!r} and {shown!r}",
                    "one picture per key",
                )
            pictures[key] = (member.offset_data, member.size, shown)
        elif suffix in ("cls", "json"):
            number = _label(reader, member, suffix, name, shown)
            if number is not None:
                store = labels if suffix == "cls" else asides
                if key in store:
                    _refuse(name, f"has the member {shown!r} twice", "one label per key")
                store[key] = number
    missing = next(
        (found[2] for key, found in pictures.items() if key not in labels and key not in asides), None
    )
    if missing is not None:
        _refuse(
            name, f"has no label for {missing!r}", 'add KEY.cls, or KEY.json with a whole number as "label"'
        )
    orphan = next((key for key in labels if key not in pictures), None)
    if orphan is not None:
        _refuse(name, f"has a label but no picture for {_printable(orphan)!r}", "keep both in one shard")
    if not pictures:
        _refuse(name, "holds no pictures", "check the pattern")
    return TarIndex(
        offsets=np.array([offset for offset, _, _ in pictures.values()], dtype=np.int64),
        sizes=np.array([length for _, length, _ in pictures.values()], dtype=np.int64),
        labels=np.array([labels.get(key, asides.get(key, 0)) for key in pictures], dtype=np.int64),
        names=tuple(shown for _, _, shown in pictures.values()),
    )


def _members(file: BinaryIO, name: str, size: int) -> Any:
    """(member, reader) of every regular file; what tarfile would pass over in silence is refused."""
    capped = _Capped(file)
    last = -1
    try:
        tar = tarfile.TarFile(fileobj=capped, mode="r", encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0 or member.offset <= last or member.offset_data + member.size > size:
                raise tarfile.ReadError("a header that points outside the file")
            last = member.offset
            if not member.isdir():
                if not member.isreg() or member.issparse():
                    _refuse(name, f"has {_printable(member.name)!r}, {_kind(member)}", "plain files only")
                yield member, capped
    except (_Refused, OSError):
        raise
    except (
        Exception
    ) as error:  # tarfile's own errors, and ValueError, RecursionError and more from hostile headers
        place = f" after byte {last}" if last >= 0 else ""
        _refuse(name, f"is no tar, or damaged{place} ({error or type(error).__name__})", "make it again")
    _check_end(capped, name, tar.offset, size)


def _check_end(file: _Capped, name: str, offset: int, size: int) -> None:
    # tarfile ends quietly at a header that it cannot read, and at the end of a file that was cut between members.
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        _refuse(name, "is cut short: the empty block that closes a tar is missing", "copy or make it again")
    if block.strip(b"\0"):
        _refuse(name, f"has a damaged header at byte {offset}", "make it again")
    if size - offset > MAX_HEADER or file.read(MAX_HEADER).strip(b"\0"):
        _refuse(name, f"goes on after its end at byte {offset}", "keep joined tars as shards of their own")


class _Refused(ValueError):
    """What this file raises itself, apart from what tarfile raises."""


def _refuse(shard: str, what: str, fix: str) -> NoReturn:
    raise _Refused(f"{shard} {what}. Allowed: {_FORM}. Fix: {fix}") from None


class _Capped(io.RawIOBase):
    """A file of which nobody reads more than `MAX_HEADER` bytes at once, whatever a header claims."""

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
    if member.size > MAX_HEADER:
        _refuse(name, f"has {member.size} bytes in {shown!r}", "a label is one whole number")
    file.seek(member.offset_data)
    text = file.read(member.size)
    try:
        number: Any = int(text) if suffix == "cls" and re.fullmatch(rb"\s*\d{1,9}\s*", text) else None
        if suffix == "json":
            found = json.loads(text)
            if not isinstance(found, dict) or "label" not in found:
                return None  # a caption or a size; a .cls may hold the label
            number = found["label"]
    except (ValueError, RecursionError):
        number = None
    if type(number) is not int or not 0 <= number < MAX_CLASSES:
        _refuse(name, f"has no class number in {shown!r}", f"a whole number from 0 to {MAX_CLASSES - 1}")
    return number


def _kind(member: tarfile.TarInfo) -> str:
    if member.islnk() or member.issym():
        return "a link"
    return "a sparse file" if member.issparse() else "no regular file"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
