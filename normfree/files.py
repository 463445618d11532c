"""Atomic writes, in which a file appears complete or not at all, and bounded reads of files from anywhere."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

_DOTS = 200  # in one line of TOML
_PAUSES = (0.01, 0.05, 0.2, 1.0)  # seconds; scanners for viruses open new files, and close them soon
_PARTIAL = re.compile(r"\..+\.(\d+)\.partial")


def atomic_write(target: Path, write: Callable[[Path], Any]) -> Path:
    """Write to a temporary path in the folder of `target`, then rename it to `target`.

    A file replaces an existing file, and a folder replaces an empty folder. If anything fails, the temporary path is
    removed and `target` stays as it was. Missing parent folders are created.

    Args:
        target: the file or folder to write.
        write: function that creates a file or a folder at the path that it is given.

    Returns:
        `target`.

    Raises:
        OSError: the target cannot be written, or it is a folder that is not empty or that a file would replace.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder, "a.txt"), lambda path: path.write_text("hello")).read_text()
        'hello'
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        if temporary.is_file():
            flush(temporary)  # else a power failure could leave an empty file under the name
        if temporary.is_dir() and target.is_dir():
            target.rmdir()
        _replace(temporary, target)
        flush(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    return target


def _replace(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`, on Windows once more after a while if another program has opened it."""
    for pause in _PAUSES if os.name == "nt" else ():
        try:
            temporary.replace(target)
            return
        except PermissionError:
            time.sleep(pause)
    temporary.replace(target)


def atomic_write_text(target: Path, text: str) -> Path:
    """Write `text` in UTF-8 with `atomic_write`; return `target`."""
    return atomic_write(target, lambda path: write_text(path, text))


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 with the line breaks that it has, so that every system writes the same bytes."""
    path.write_text(text, encoding="utf-8", newline="\n")


def flush(path: Path) -> None:
    """Wait until the content of a file or folder is on disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what `atomic_write` left in a folder when its process was killed; return the names."""
    found = []
    for path in folder.glob(".*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match is None or _lives(int(match[1])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
        found.append(path.name)
    return found


def _lives(process: int) -> bool:
    """Return True if another process has this id."""
    if process == os.getpid() or os.name == "nt":  # on Windows the signal 0 would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


# --- reading ----------------------------------------------------------------------------------------------


class UnreadableFileError(ValueError):
    """A file that cannot be used: it is missing, no regular file, too large, or damaged. The message names it."""


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Pipes and devices are refused without waiting for them; links to regular files are followed.

    Raises:
        UnreadableFileError: the file is missing, no regular file, or larger.

    Examples:
        >>> read_bytes("/dev/zero", limit=100)
        Traceback (most recent call last):
        normfree.files.UnreadableFileError: '/dev/zero' is not a regular file.
    """
    shown = repr(str(path))
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > limit else file.read(size)
    except OSError as error:
        raise UnreadableFileError(f"{shown} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # a zero byte in the path, or no regular file
        if isinstance(error, UnreadableFileError):
            raise
        raise UnreadableFileError(f"{shown} cannot be read: {error}.") from None
    if size > limit or len(content) > limit:
        raise UnreadableFileError(
            f"{shown} has {max(size, len(content)):,} bytes; at most {limit:,} are read."
        )
    return content


@contextlib.contextmanager
def open_regular(path: str | Path) -> Iterator[io.BufferedReader]:
    """Open a regular file for reading. Pipes and devices are refused without waiting for them.

    Raises:
        UnreadableFileError: it is no regular file.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnreadableFileError(f"{str(path)!r} is not a regular file.")
        yield file


def read_text(path: str | Path, *, limit: int) -> str:
    """Return the content of a UTF-8 file, as `read_bytes` does.

    Raises:
        UnreadableFileError: also if it is not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(f"{str(path)!r} is not UTF-8: {error.reason} at {error.start}.") from None


def read_json(path: str | Path, *, limit: int) -> dict[str, Any]:
    """Return the object in a JSON file, as `read_bytes` does.

    Raises:
        UnreadableFileError: also if it is not valid JSON, nested too deeply, or not an object.
    """
    text = read_text(path, limit=limit)
    try:
        value = json.loads(text)
    except RecursionError:
        raise UnreadableFileError(f"{str(path)!r} is nested too deeply.") from None
    except ValueError as error:  # also integers of thousands of digits
        raise UnreadableFileError(f"{str(path)!r} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{str(path)!r} holds a {type(value).__name__}, not an object.")
    return value


Model = TypeVar("Model", bound="BaseModel")


def read_model(path: str | Path, model: type[Model], *, limit: int, fix: str) -> Model:
    """Return what a JSON file holds as a model of pydantic, as `read_json` does.

    Args:
        fix: what to do about a file with other contents.

    Raises:
        UnreadableFileError: also if a value is missing or has another type; the message names the first one.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(read_json(path, limit=limit))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UnreadableFileError(
            f"{str(path)!r} is damaged: {where!r}: {first['msg']}. Fix: {fix}."
        ) from None


def read_toml(path: str | Path, *, limit: int = 128_000) -> dict[str, Any]:
    """Return the content of a TOML file, as `read_bytes` does.

    Raises:
        UnreadableFileError: also if it is not valid TOML, or nested too deeply.
    """
    text = read_text(path, limit=limit)
    # `tomllib` takes time and memory in the square of the parts of a dotted key.
    if any(line.count(".") > _DOTS for line in text.splitlines()):
        raise UnreadableFileError(f"{str(path)!r} has a line with more than {_DOTS} dots.")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UnreadableFileError(f"{str(path)!r} is nested too deeply.") from None
    except ValueError as error:
        raise UnreadableFileError(f"{path} cannot be read as TOML: {error}.") from None


def read_csv(path: str | Path, *, limit: int, dialect: type[csv.Dialect] = csv.excel) -> list[list[str]]:
    """Return the rows of a CSV file, as `read_bytes` does.

    Raises:
        UnreadableFileError: also if it is not UTF-8, or a cell is larger than 128 kB.
    """
    text = read_text(path, limit=limit).removeprefix("\ufeff")
    try:
        return list(csv.reader(io.StringIO(text, newline=""), dialect))
    except csv.Error as error:
        raise UnreadableFileError(f"{str(path)!r} cannot be read as CSV: {error}.") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal.

    Raises:
        UnreadableFileError: it is no regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return the text of a CSV file, which `read_csv` reads as the same rows of texts.

    >>> csv_text([("a", 1), ("b, c", 2)])
    'a,1\\n"b, c",2\\n'
    """
    text = io.StringIO()
    minimal, all_cells = (
        csv.writer(text, lineterminator="\n", quoting=quoting)
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    for row in rows:
        cells = list(row)
        # Python's writer does not quote "\r" by itself, which its reader takes for the end of a line.
        writer = all_cells if any("\r" in str(cell) for cell in cells) else minimal
        writer.writerow(cells)
    return text.getvalue()


def spreadsheet_cell(text: str) -> str:
    """Return a text for a CSV file that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection".

    >>> spreadsheet_cell("=HYPERLINK(1)"), spreadsheet_cell("cat"), spreadsheet_cell("-1.5")
    ("'=HYPERLINK(1)", 'cat', "'-1.5")
    """
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
