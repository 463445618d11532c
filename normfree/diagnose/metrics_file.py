"""Reading a run's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics.jsonl file, in order.

    Lines that are not valid JSON are skipped: a run that is killed while writing leaves its last line incomplete.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
