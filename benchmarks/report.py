"""Write results/SUITE.json and SUITE.md: measurements, machine, its rates, and what was left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Ceilings
from benchmarks.summary import Comparison, Floor, Timing

RESULTS = Path(__file__).resolve().parent / "results"

# Columns for the `facts` of arms: heading and format.
COLUMNS = {
    "device_ms": ("device ms", "{:.2f}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
    "compile_s": ("compile s", "{:.0f}"),
    "beyond_torch_ms": ("ms beyond torch", "{:+.0f}"),
    "of_floor": ("floor / time", "{:.0%}"),
    "accuracy": ("accuracy", "{:.2f}"),
    "runs": ("runs", "{:.0f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "whole_s": ("whole run s", "{:.0f}"),
    "of_line": ("time / line", "{:.2f}"),
}


@dataclass(frozen=True)
class Result:
    """Everything that a run of a suite records. Rates of the machine are None if they were not measured."""

    suite: str
    about: str
    command: str
    machine: dict[str, Any]
    before: Ceilings | None
    after: Ceilings | None
    seconds: float
    comparisons: tuple[Comparison, ...]
    skipped: tuple[str, ...] = ()


def write(result: Result, folder: Path = RESULTS) -> Path:
    """Write both files, named after the suite and what it ran on; return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = result.suite + suffix(result.machine)
    entry = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    (folder / f"{stem}.json").write_text(entry + "\n", encoding="utf-8")
    path = folder / f"{stem}.md"
    path.write_text(page(result), encoding="utf-8")
    return path


def suffix(machine: Mapping[str, Any]) -> str:
    """Return the end of a file name for results of `machine`: "_cuda", or for a CPU the kind of its instructions.

    That is "" for AVX2, "_avx512", or "_avx512_bf16" if `precision = "auto"` is bfloat16.
    """
    if machine["device"] == "cuda":
        return "_cuda"
    if not machine["capability"].startswith("AVX512"):
        return ""
    return "_avx512_bf16" if machine.get("bfloat16") else "_avx512"


def read(path: Path) -> Result:
    """Return the result that `write` wrote to the .json file."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    entry["comparisons"] = tuple(_comparison(c) for c in entry["comparisons"])
    for when in ("before", "after"):
        entry[when] = entry[when] and Ceilings(**entry[when])
    return Result(**{**entry, "skipped": tuple(entry["skipped"])})


def _comparison(entry: dict[str, Any]) -> Comparison:
    """Return the comparison of an entry of the JSON file."""
    timings = tuple(
        Timing(**{**t, "quartiles": tuple(t["quartiles"]), "interval": tuple(t["interval"])})
        for t in entry["timings"]
    )
    floor = entry["floor"] and Floor(**entry["floor"])
    return Comparison(**{**entry, "timings": timings, "floor": floor, "notes": tuple(entry.get("notes", ()))})


def page(result: Result) -> str:
    """Return the page in Markdown."""
    facts_text = ", ".join(f"{k} {v}" for k, v in result.machine.items() if v)
    rates = " and ".join(
        f"{c.copy_gb_s:.1f} GB/s, {c.matmul_gflop_s:.0f} GFLOP/s {c.precision}"
        for c in (result.before, result.after)
        if c is not None
    )
    parts = [
        f"# {result.suite}",
        result.about,
        f"`{result.command}`" + (f", {result.seconds:.0f} s" if result.seconds else "") + f". {facts_text}.",
        f"Copy (read and written) and matrix product in the same process, before and after: {rates}."
        if rates
        else "",
        grid([c for c in result.comparisons if c.column]),
        table(result.comparisons),
        "\n".join(f"- {note}" for c in result.comparisons for note in c.notes),
    ]
    if result.skipped:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in result.skipped))
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def grid(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table with a line per row and a column per column of the comparisons; "" without any.

    A cell has the times of the baseline and of the last arm, and how many times better that arm is.
    """
    if not comparisons:
        return ""
    columns, rows = (
        list(dict.fromkeys(names)) for names in zip(*((c.column, c.row) for c in comparisons), strict=True)
    )
    lines = [
        f"| timm by hand → normfree, ms | {' | '.join(columns)} |",
        "|---|" + "--:|" * len(columns),
    ]
    for row in rows:
        cells = []
        for column in columns:
            found = [c for c in comparisons if (c.row, c.column) == (row, column)]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(comparison: Comparison) -> str:
    """Return the cell of one comparison."""
    first, last = comparison.timings[0], comparison.timings[-1]
    low, high = last.interval
    return f"{first.median:.3g} → {last.median:.3g}, {last.ratio:.2f} ({low:.2f} … {high:.2f})"


def table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table: a row per case and arm, a column for each fact of any arm, and the lower bounds."""
    if not comparisons:
        return "Nothing was measured."
    timings = [t for c in comparisons for t in c.timings]
    extra = [key for key in COLUMNS if any(key in facts(t, c) for c in comparisons for t in c.timings)]
    several = any(t.images > 1 for t in timings)
    units = " or ".join(dict.fromkeys(c.unit for c in comparisons))
    heads = ["case", "arm", f"{units} (quartiles)", *(["images/s"] if several else [])]
    heads += [COLUMNS[key][0] for key in extra] + ["times better than the baseline (95 %)", "rounds"]
    lines = [f"| {' | '.join(heads)} |", "|---|---" + "|--:" * (len(heads) - 2) + "|"]
    for c in comparisons:
        for t in c.timings:
            better = f"{t.ratio:.2f} ({t.interval[0]:.2f} … {t.interval[1]:.2f})"
            if t.arm == c.baseline:
                better = f"baseline, against itself ± {c.noise:.2f}"
            rate = [f"{images_per_second(t):.0f}" if t.images > 1 else ""] if several else []
            own = facts(t, c)
            more = [COLUMNS[key][1].format(own[key]) if key in own else "" for key in extra]
            cells = [c.case, t.arm, format_time(t, c.unit), *rate, *more, better, str(c.rounds or "")]
            lines.append(f"| {' | '.join(cells)} |")
        if c.floor is not None:
            cells = [c.case, f"floor: {c.floor.reason}", f"{c.floor.ms:.3g}"]
            lines.append(f"| {' | '.join([*cells, *([''] * (len(heads) - 3))])} |")
    return "\n".join(lines)


def facts(timing: Timing, comparison: Comparison) -> dict[str, float]:
    """Return the facts of the arm, and the lower bound as a fraction of its time."""
    own = dict(timing.facts)
    if comparison.floor is not None:
        own["of_floor"] = comparison.floor.ms / timing.median
    return own


def format_time(timing: Timing, unit: str) -> str:
    """Return median and quartiles as text, with the unit if it is not milliseconds."""
    digits = 1 if timing.median >= 10 else 3
    low, high = timing.quartiles
    return f"{timing.median:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})" + (unit != "ms") * f" {unit}"


def images_per_second(timing: Timing) -> float:
    """Return images per second, from milliseconds per run."""
    return 1e3 * timing.images / timing.median
