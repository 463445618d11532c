"""Files that can be read at any offset, local or in an object store, and the patterns that name many of them."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from normfree.suggest import needs, problem

MAX_FILES = 100_000  # files that one pattern may name; more is a typing error
_RETRIES = (
    0.5,
    2.0,
)  # seconds before the second and third attempt of a remote read, for short network failures

_BRACES = "{000..127} or {a,b}"
_NO_RANGES = "the server does not support range requests"


@dataclass(frozen=True)
class StoredFile:
    """A local path, or a URL that fsspec opens (s3://, gs://, https://, ...); messages show `label`, if given."""

    url: str
    label: str = ""

    @property
    def remote(self) -> bool:
        """True if fsspec reads the file."""
        return "://" in self.url

    @property
    def shown(self) -> str:
        """The path or URL for messages and names, without user, password and query, which may be secrets."""
        if self.label or not self.remote:
            return self.label or self.url
        scheme, _, rest = self.url.partition("://")
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"

    def stamp(self) -> tuple[int, str]:
        """Return (size in bytes, version), which change when the file changes.

        The version is the modification time of a local file, and the ETag or date that the store reports for others.

        Raises:
            OSError: The file does not exist or cannot be read.
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
        fields = ("ETag", "etag", "md5", "generation", "LastModified", "last_modified", "mtime", "created")
        return int(info["size"]), next((str(info[field]) for field in fields if info.get(field)), "")

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the whole file, seekable, for reading forward in large pieces."""
        if not self.remote:
            with open(self.url, "rb") as file:
                yield file
            return
        self.read(0, 1)  # fails if the server ignores ranges and sends the whole file
        system, path = _filesystem(self.url)
        with system.open(path, "rb", cache_type="readahead") as file:
            yield file

    def read(self, offset: int, size: int, *, stamp: tuple[int, str] | None = None) -> bytes:
        """Return `size` bytes from `offset`. Nothing stays open, so threads and forked processes may call this.

        Raises:
            OSError: The file cannot be read, is too short, or (local files only) no longer has this `stamp`.
        """
        if not self.remote:
            with open(self.url, "rb", buffering=0) as file:
                now = os.fstat(file.fileno())
                if stamp is not None and stamp != (now.st_size, str(now.st_mtime_ns)):
                    raise OSError("the file changed after it was indexed")
                data = _read_fully(file.fileno(), offset, size)
        else:
            data = _read_remote(self.url, offset, size)
        if len(data) != size:
            raise OSError(_NO_RANGES if len(data) > size else "the file is too short")
        return data


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    """Read until `size` bytes or the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one call returns at most 2 GB, and less on some network disks
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _read_remote(url: str, offset: int, size: int) -> bytes:
    """Read from a store, with retries."""
    for pause in (*_RETRIES, None):
        try:
            system, path = _filesystem(url)
            return bytes(system.cat_file(path, start=offset, end=offset + size))
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own exception types
            if pause is None:
                raise OSError(str(error) or type(error).__name__) from error
            time.sleep(pause)
    raise AssertionError


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it.

    fsspec caches one instance per process and drops it after a fork, so this is cheap and safe to call each time.
    """
    scheme = f"{url.partition('://')[0]}://"
    with needs(scheme, install="normfree[remote]"):
        import fsspec
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # the driver of the store is missing; fsspec names its package
        raise ModuleNotFoundError(f"{scheme} needs a driver for fsspec: {error}") from None
    except ValueError as error:  # an unknown scheme
        raise OSError(str(error)) from None
    return system, str(path)


def read_sibling(file: StoredFile, name: str, *, limit: int) -> bytes | None:
    """Return the content of the file `name` in the folder of `file`, or None if it does not exist.

    Raises:
        ValueError: It has more than `limit` bytes.
    """
    sibling = StoredFile(
        file.url.partition("?")[0].rpartition("/")[0] + "/" + name if "/" in file.url else name
    )
    try:
        size, _ = sibling.stamp()
        if size > limit:
            raise ValueError(problem(f"{sibling.shown} has {size:,} bytes", allowed=f"at most {limit:,}"))
        return sibling.read(0, size)
    except OSError:
        return None


def expand(pattern: str) -> list[StoredFile]:
    """Return the files of a pattern: a path or URL with {000..127}, {a,b}, and * ? [ ] as in a shell.

    Braces expand in the order in which they are written; matches of * are sorted. If a local file has exactly the name
    `pattern`, only that file is returned.

    Raises:
        ValueError: Braces are malformed, nothing matches, or a file occurs twice.
    """
    pattern = pattern.removeprefix("file://")
    if "://" not in pattern:
        pattern = os.path.expanduser(pattern)
        if Path(pattern).is_file():
            return [StoredFile(pattern)]
    files = [file for part in braces(pattern, pattern) for file in _globbed(part)]
    if len({file.url for file in files}) != len(files):
        raise ValueError(
            problem(f"{pattern!r} names a file twice", allowed="each once", fix="check the braces")
        )
    return files


def _globbed(pattern: str) -> list[StoredFile]:
    """Return the files that match a pattern without braces."""
    remote = "://" in pattern
    if not re.search(r"[*\[]" if remote else r"[*?\[]", pattern):  # in a URL, ? begins a query
        return [StoredFile(pattern)]
    if not remote:
        found = sorted(glob.glob(pattern))
    else:
        system, path = _filesystem(pattern)
        try:
            found = sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))
        except Exception as error:
            raise ValueError(
                problem(
                    f"{pattern!r} cannot be listed: {error}",
                    allowed="* if the store lists its files",
                    fix="{000..127}",
                )
            ) from error
    if not found:
        raise ValueError(
            problem(
                f"{pattern!r} matches no file", allowed="the path or URL of tar files", fix="check the path"
            )
        )
    return [StoredFile(name) for name in found]


def braces(text: str, whole: str) -> list[str]:
    """Return the strings that `text` expands to by {000..127} and {a,b}; errors quote `whole`."""
    parts: list[list[str]] = []
    count = 1
    while "{" in text or "}" in text:
        start, close = text.find("{"), text.find("}")
        if start < 0 or close < start or "{" in text[start + 1 : close]:
            raise ValueError(
                problem(f"{whole!r} has braces that do not match", allowed=_BRACES, fix="close each")
            )
        parts += [[text[:start]], _alternatives(text[start + 1 : close], whole)]
        count *= len(parts[-1])
        if count > MAX_FILES:
            given = f"{whole!r} names too many files"
            raise ValueError(problem(given, allowed=f"at most {MAX_FILES:,}", fix="fewer braces"))
        text = text[close + 1 :]
    return ["".join(chosen) for chosen in itertools.product(*parts, [text])]


def _alternatives(inner: str, whole: str) -> list[str]:
    """Return the strings that the text within two braces stands for; errors quote `whole`."""
    span = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", inner)
    if span:
        low, high = int(span[1]), int(span[2])
        padded = len(span[1]) if span[1].startswith("0") or len(span[1]) == len(span[2]) else 0
        if not 0 <= high - low < MAX_FILES:
            raise ValueError(
                problem(
                    f"{whole!r} counts from {low} to {high}",
                    allowed=f"upward, at most {MAX_FILES:,} files",
                    fix=f"{{{span[2]}..{span[1]}}}",
                )
            )
        return [str(number).zfill(padded) for number in range(low, high + 1)]
    if "," not in inner:
        raise ValueError(problem(f"{whole!r} has {{{inner}}}", allowed=_BRACES, fix="leave out the braces"))
    return inner.split(",")
