"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def atomic_write(target: Path, write: Callable[[Path], Any]) -> Path:
    """Call `write` with a temporary path beside `target`, then rename that to `target`; return `target`.

    `write` makes a file or a folder. An existing file is replaced, an existing folder only if it is empty. If `write`
    fails, the temporary path is removed and `target` is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        if target.is_dir():
            target.rmdir()
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    return target


def atomic_write_text(target: Path, text: str) -> Path:
    """Write `text` to `target` in UTF-8 with `atomic_write`."""
    return atomic_write(target, lambda path: path.write_text(text, encoding="utf-8"))
