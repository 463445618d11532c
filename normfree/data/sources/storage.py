"""A file that can be read at any offset, here or in an object store, and the patterns that name many of them."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_PLACES = 100_000  # what one pattern may stand for; more is a slip of the keyboard
_RETRIES = (0.5, 2.0)  # seconds before the second and the third try of a remote read: a network blinks

_NO_RANGES = "the server does not read at an offset (no range requests)"


@dataclass(frozen=True)
class StoredFile:
    """A local path, or a URL that fsspec opens (s3://, gs://, https://, ...); `label` is shown in its stead."""

    url: str
    label: str = ""

    @property
    def remote(self) -> bool:
        """Whether fsspec reads it."""
        return "://" in self.url

    @property
    def shown(self) -> str:
        """The path or URL for messages and names: without user, password and query, which may be secrets."""
        if self.label or not self.remote:
            return self.label or self.url
        scheme, _, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"

    def stamp(self) -> tuple[int, str]:
        """(bytes, version): what changes when the file does. Raises `OSError` when it is not there.

        The version is the modification time here, and the ETag or date that the store states elsewhere.
        """
        if not self.remote:
            found = os.stat(self.url)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("not a regular file")
            return found.st_size, str(found.st_mtime_ns)
        system, path = _filesystem(self.url)
        info = system.info(path)
        if info.get("size") is None:
            raise OSError("the server does not state its size")
        words = ("ETag", "etag", "md5", "generation", "LastModified", "last_modified", "mtime", "created")
        return int(info["size"]), next((str(info[word]) for word in words if info.get(word)), "")

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The whole file, seekable, read forwards in large pieces."""
        if not self.remote:
            with open(self.url, "rb") as file:
                yield file
            return
        self.read(0, 1)  # a server that cannot read a part sends the whole
        system, path = _filesystem(self.url)
        with system.open(path, "rb", cache_type="readahead") as file:
            yield file

    def read(self, offset: int, size: int, *, stamp: tuple[int, str] | None = None) -> bytes:
        """`size` bytes from `offset`. Safe in threads and in forked processes: nothing stays open.

        Raises `OSError`, also when fewer bytes come back or a local file no longer has this `stamp`.
        """
        if not self.remote:
            with open(self.url, "rb", buffering=0) as file:
                now = os.fstat(file.fileno())
                if stamp is not None and stamp != (now.st_size, str(now.st_mtime_ns)):
                    raise OSError("the file changed after it was indexed")
                data = _read_fully(file.fileno(), offset, size)
        else:
            data = _patiently(self.url, offset, size)
        if len(data) != size:
            raise OSError(_NO_RANGES if len(data) > size else "cut short")
        return data


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one call stops at 2 GB, and on some network disks before
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _patiently(url: str, offset: int, size: int) -> bytes:
    for pause in (*_RETRIES, None):
        try:
            system, path = _filesystem(url)
            return bytes(system.cat_file(path, start=offset, end=offset + size))
        except FileNotFoundError:
            raise
        except Exception as error:  # every store has errors of its own
            if pause is None:
                raise OSError(str(error) or type(error).__name__) from error
            time.sleep(pause)
    raise AssertionError


def _filesystem(url: str) -> tuple[Any, str]:
    # fsspec keeps one instance per process and forgets it after a fork, so asking each time is cheap and safe.
    try:
        import fsspec
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{url.partition('://')[0]}:// needs fsspec: pip install 'normfree[remote]'"
        ) from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # a store without its driver; fsspec says which package that is
        raise ModuleNotFoundError(
            f"{url.partition('://')[0]}:// needs a driver for fsspec: {error}"
        ) from None
    except ValueError as error:  # an unknown scheme
        raise OSError(str(error)) from None
    return system, str(path)


def beside(place: StoredFile, name: str) -> bytes | None:
    """The content of the file `name` in the folder of `place`, or None when there is none."""
    sibling = StoredFile(
        place.url.partition("?")[0].rpartition("/")[0] + "/" + name if "/" in place.url else name
    )
    try:
        size, _ = sibling.stamp()
        return sibling.read(0, size)
    except OSError:
        return None


def expand(pattern: str) -> list[StoredFile]:
    """The places of a pattern: a path or URL with {000..127}, {a,b}, and * ? [ ] of the shell.

    Braces keep the order in which they are written; what * finds is sorted. A local file that bears exactly
    this name is meant literally. Raises `ValueError` for braces that do not close, for what matches nothing,
    and for a name that occurs twice.
    """
    pattern = pattern.removeprefix("file://")
    if "://" not in pattern:
        pattern = os.path.expanduser(pattern)
        if Path(pattern).is_file():
            return [StoredFile(pattern)]
    places = [place for word in braces(pattern, pattern) for place in _globbed(word)]
    if len({place.url for place in places}) != len(places):
        raise ValueError(f"{pattern!r} names a file twice. Allowed: each once. Fix: check the braces")
    return places


def _globbed(word: str) -> list[StoredFile]:
    if not re.search(r"[*?\[]", word) or (
        "://" in word and not re.search(r"[*\[]", word)
    ):  # ? begins a query
        return [StoredFile(word)]
    if "://" not in word:
        found = sorted(glob.glob(word))
    else:
        system, path = _filesystem(word)
        try:
            found = sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))
        except Exception as error:
            raise ValueError(
                f"{word!r} cannot be listed: {error}. Allowed: * where the store lists its files. Fix: {{000..127}}"
            ) from error
    if not found:
        raise ValueError(
            f"{word!r} matches no file. Allowed: the path or URL of tar files. Fix: check the path"
        )
    return [StoredFile(name) for name in found]


def braces(word: str, whole: str) -> list[str]:
    """The words that `word` stands for, with {000..127} and {a,b} written out; errors quote `whole`."""
    start, close = word.find("{"), word.find("}")
    if start < 0 and close < 0:
        return [word]
    if start < 0 or close < start or "{" in word[start + 1 : close]:
        raise ValueError(
            f"{whole!r} has braces that do not match. Allowed: {{000..127}} or {{a,b}}. Fix: close each"
        )
    inner = word[start + 1 : close]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if span:
        low, high = int(span[1]), int(span[2])
        padded = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        if not 0 <= high - low < MAX_PLACES:
            raise ValueError(
                f"{whole!r} counts from {low} to {high}. Allowed: upwards, {MAX_PLACES:,} files at most. "
                f"Fix: {{{span[2]}..{span[1]}}}"
            )
        parts = [str(number).zfill(padded) for number in range(low, high + 1)]
    elif "," in inner:
        parts = inner.split(",")
    else:
        raise ValueError(
            f"{whole!r} has {{{inner}}}. Allowed: {{000..127}} or {{a,b}}. Fix: leave out the braces"
        )
    rests = braces(word[close + 1 :], whole)
    if len(parts) * len(rests) > MAX_PLACES:
        raise ValueError(
            f"{whole!r} stands for too many files. Allowed: {MAX_PLACES:,} at most. Fix: fewer braces"
        )
    return [word[:start] + part + rest for part in parts for rest in rests]
