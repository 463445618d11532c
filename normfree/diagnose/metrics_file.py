"""Reading a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normfree.files import read_bytes

# Bytes that are read: 400,000 lines, or 4 million steps with a line for every 10.
LIMIT = 200_000_000


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl file, in order.

    Lines that are no row are skipped: a run that is killed while writing leaves its last line incomplete, and a disk
    may damage others.

    Raises:
        UnreadableFileError: the file is missing, no regular file, or too large.
    """
    lines = read_bytes(path, limit=LIMIT).decode("utf-8", "replace").splitlines()
    return [row for line in lines if (row := row_in(line)) is not None]


def row_in(line: str) -> dict[str, Any] | None:
    """Return the object in a line of metrics.jsonl: names, with a whole number `step`; None if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    # "ratios" has lists of numbers; all other values are numbers.
    sound = (type(v) in (int, float) or (k == "ratios" and _are_ratios(v)) for k, v in row.items())
    return row if all(sound) else None


def _are_ratios(value: Any) -> bool:
    """Return True for a mapping of names to lists of numbers."""
    return isinstance(value, dict) and all(
        isinstance(numbers, list) and all(type(n) in (int, float) for n in numbers)
        for numbers in value.values()
    )
