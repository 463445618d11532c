"""A file or folder that a command makes: it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def move_into_place(target: Path, write: Callable[[Path], Any]) -> Path:
    """Lets `write` write beside the target, then moves it there; nothing is left behind if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        write(place)
        if target.is_dir():
            target.rmdir()  # it is empty
        place.rename(target)
    finally:
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)
    return target
