"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
        if temporary.is_dir() and target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    return target


def atomic_write_text(target: Path, text: str) -> Path:
    """Write `text` in UTF-8 with `atomic_write`; return `target`."""
    return atomic_write(target, lambda path: path.write_text(text, encoding="utf-8"))
