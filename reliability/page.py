"""docs/reliability.md and the table that the command prints, from the summaries in `reliability/results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reliability.records import RESULTS, ROOT

PAGE = ROOT / "docs" / "reliability.md"

INTRO = """# Reliability

What the library promises, and how often each promise was tried. `make reliability` makes all checks, continues where it
was interrupted, and writes this page; `python -m reliability kill --count 20` makes those of one goal.
`SECURITY.md` lists the promises for each kind of input. The tests in `tests/reliability/` make the same checks in small
numbers.

"Identical" means: equal bits in weights, averaged weights and momentum; equal metrics, results, pointers and model
folder; no file that the uninterrupted run does not have.
"""


def summaries(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the summaries by the name of the goal, in the order of their numbers; mutations last."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[1]["goal"] or 99, item[0])))


def table(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the table: goal, check, passed, made, share of the full count."""
    rows = []
    for name, goal in found.items():
        for check, line in goal["checks"].items():
            share = "all" if line["cases"] == line["full"] else f"{line['cases']} of {line['full']} cases"
            rows.append([name, check, f"{line['passed']:,}", f"{line['wanted']:,}", share])
    return rows


def printed(found: dict[str, dict[str, Any]]) -> str:
    """Return the table as aligned text."""
    rows = [["goal", "check", "passed", "made", "of the full count"], *table(found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def page(found: dict[str, dict[str, Any]]) -> str:
    """Return docs/reliability.md."""
    lines = [INTRO]
    for name, goal in found.items():
        title = f"{goal['goal']}. {goal['title']}" if goal["goal"] else goal["title"]
        lines += [f"## {title}", ""]
        lines += ["| check | passed | made | of the full count |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for _, *cells in table({name: goal})]
        commits = ", ".join(f"`{commit}`" for commit in goal["commits"])
        lines += ["", f"`python -m reliability {name}`: {goal['minutes']} minutes of one {goal['processor']}, "
                      f"{goal['versions']}; commit {commits}."]  # fmt: skip
        failures = [text for line in goal["checks"].values() for text in line["detail"]]
        lines += ["", "Failed:", "", *(f"- {text}" for text in failures)] if failures else []
        figures = [
            f"- {check}: {line['figures']}" for check, line in goal["checks"].items() if "figures" in line
        ]
        lines += ["", "Measured:", "", *figures] if figures else []
        lines += [""]
    return "\n".join(lines)


def write_page() -> None:
    """Write docs/reliability.md."""
    PAGE.write_text(page(summaries()), encoding="utf-8")
