"""What the pages of all experiments share: how results were made, verdicts, tables, and the files."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.cells import Experiment, Results, Setup
from experiments.claim_list import TEXTS
from normfree.files import atomic_write_text


def machine() -> str:
    """Return the number of cores and the name of the CPU, or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def command_of(name: str, setup: Setup) -> str:
    """Return the command that runs an experiment; a local path is FOLDER, since it means nothing on other machines."""
    shown = "FOLDER" if Path(setup.data).exists() else setup.data
    preset = "" if setup.preset == "cpu" else f" --preset {setup.preset}"
    return f"python -m experiments.run --only {name}{preset} --data {shown}"


def facts(experiment: Experiment, setup: Setup, done: Results) -> dict[str, Any]:
    """Return how the results of an experiment were made."""
    return {
        "name": experiment.name,
        "title": experiment.title,
        "command": command_of(experiment.name, setup),
        "preset": setup.preset,
        "stem": setup.stem(experiment.name),
        "machine": machine(),
        "torch": str(torch.__version__),
        "seeds": experiment.seeds,
        "finished": len(done),
        "expected": len(experiment.all_cells()),
        "cpu_minutes": cpu_minutes(done),
    }


def cpu_minutes(done: Results) -> float:
    """Return the CPU time of trainings in minutes."""
    return round(sum(result["cpu_seconds"] for result in done.values()) / 60, 1)


def write(found: Mapping[str, Any], text: str, results: Path) -> str:
    """Write the JSON and the page of an experiment, named by the `stem` of its facts; return the page."""
    atomic_write_text(results / f"{found['stem']}.json", json.dumps(found, indent=1) + "\n")
    atomic_write_text(results / f"{found['stem']}.md", text)
    return text


def verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a list item for each claim: its text, the verdict and our numbers."""
    return [
        f"- {TEXTS[found['name'], f['claim']]}: **{f['verdict']}**. {f['numbers']}" for f in found["findings"]
    ]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
