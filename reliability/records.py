"""Run the cases of a goal, keep each result at once, and summarize them.

runs/reliability/GOAL.jsonl      one line for each case that was run; an interrupted command continues after them
reliability/results/GOAL.json    the summary, which docs/reliability.md shows
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_info
from normfree.files import atomic_write_text
from reliability.goals import Case, Goal, Result

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "runs" / "reliability"
RESULTS = Path(__file__).parent / "results"


def run_goal(
    name: str,
    goal: Goal,
    count: int,
    *,
    records: Path = RECORDS,
    results: Path = RESULTS,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Run the cases of a goal that have no passed result yet, and write and return the summary of all of them.

    Args:
        name: of the module.
        count: passed to the module's `cases`.
        say: called with one line for each case.
    """
    file = records / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        for case in goal.cases(name, count):
            known = read_records(file).get(case.name)
            if known is not None and known["passed"] == known["wanted"]:
                continue
            start = time.monotonic()
            result = run_case(case)
            line = {"case": case.name, "check": case.check, "wanted": result.wanted, "passed": result.passed,
                    "detail": result.detail, "seconds": round(time.monotonic() - start, 2),
                    "commit": commit()}  # fmt: skip
            with file.open("a", encoding="utf-8") as stream:
                stream.write(f"\n{json.dumps(line)}\n")  # a kill may have cut the line before
            verdict = f"{result.passed}/{result.wanted}"
            say(f"{name}  {verdict}  {case.check}: {case.name}  {result.detail}".rstrip())
    finally:  # also when it is interrupted
        found = summary(name, goal, read_records(file))
        atomic_write_text(results / f"{name}.json", json.dumps(found, indent=1) + "\n")
    return found


def run_case(case: Case) -> Result:
    """Run a case; an exception is a failed check."""
    try:
        return case.run()
    except Exception as error:
        return Result(1, 0, f"{type(error).__name__}: {error}")


def read_records(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last record of each case; lines that were cut by a kill are left out."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["case"]] = record
    return found


def summary(name: str, goal: Goal, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what docs/reliability.md shows of a goal: counts by check, failures, time, machine and versions."""
    full = {case.name: case.check for case in goal.cases(name, goal.full)}
    checks: dict[str, dict[str, Any]] = {
        check: {"wanted": 0, "passed": 0, "cases": 0, "full": 0, "detail": []} for check in full.values()
    }
    for case, check in full.items():
        line = checks[check]
        line["full"] += 1
        if record := records.get(case):
            line["cases"] += 1
            line["wanted"] += record["wanted"]
            line["passed"] += record["passed"]
            if record["passed"] < record["wanted"]:
                line["detail"].append(f"{case}: {record['detail']}")
            elif record["detail"] and list(full.values()).count(check) == 1:
                line["figures"] = record["detail"]
    kept = [record for case, record in records.items() if case in full]
    return {
        "goal": goal.number,
        "title": goal.title,
        "checks": checks,
        "minutes": round(sum(record["seconds"] for record in kept) / 60, 1),
        "commits": sorted({record["commit"] for record in kept}),
        "processor": cpu_info("model name") or platform.processor(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def commit() -> str:
    """Return the commit of the working tree, with "+" if files have changed."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
