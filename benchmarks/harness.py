"""Side by side in one process: every arm once per round in shuffled order, ratios within rounds, medians, intervals.

A comparison has a correctness gate (arms that disagree print no time) and the baseline twice (A/A): a difference
smaller than what the baseline shows against itself is no difference.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Arm:
    """One way to do the job. `run` does it once and returns what the gate compares; `before` is called before each
    run and not timed."""

    name: str
    run: Callable[[], Tensor]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one arm, and how many times faster than the baseline it is (median, 95 % interval)."""

    arm: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    speedup: float
    interval: tuple[float, float]
    error: float
    """Relative L2 distance of its result from the baseline's."""


@dataclass(frozen=True)
class Comparison:
    """All arms of one case against `baseline`. `noise` is how far a second copy of an arm strays from the first: the
    larger end of its interval."""

    case: str
    baseline: str
    timings: tuple[Timing, ...]
    noise: float


def compare(
    case: str,
    arms: Sequence[Arm],
    *,
    rounds: int = 11,
    window_s: float = 0.3,
    tolerance: float = 1e-5,
    seed: int = 0,
    gradients: bool = False,
    choose: Callable[[dict[str, float]], list[str]] = list,
) -> Comparison:
    """Times `arms`. A visit is one warm call, then calls for at least `window_s`; the first round is not counted.

    `gradients`: the arms train; otherwise they run in inference mode.
    `choose` gets the median of each arm and returns the names to report, baseline first; by default all, in order.

    Raises:
        ArithmeticError: an arm's result is further than `tolerance` (relative L2) from the first arm's.
    """
    with torch.enable_grad() if gradients else torch.inference_mode():
        wanted = _once(arms[0])[1]
        errors = {a.name: float((_once(a)[1] - wanted).norm() / wanted.norm()) for a in arms[1:]}
        errors[arms[0].name] = 0.0
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        if wrong:
            raise ArithmeticError(f"{case}: {wrong} differ from {arms[0].name} by more than {tolerance}")
        visits = [*arms, replace(arms[0], name="A/A")]
        seconds: dict[str, list[float]] = {arm.name: [] for arm in visits}
        dice = random.Random(seed)
        for turn in range(rounds + 1):
            for arm in dice.sample(visits, len(visits)):
                took = _visit(arm, window_s)
                if turn:
                    seconds[arm.name].append(took)
    again = seconds.pop("A/A")
    noise = max(abs(1 - end) for end in _bootstrap(_ratios(seconds[arms[0].name], again), dice))
    names = choose({name: statistics.median(own) for name, own in seconds.items()})
    base = seconds[names[0]]
    timings = tuple(_timing(name, seconds[name], base, errors[name], dice) for name in names)
    return Comparison(case, names[0], timings, noise)


def _timing(
    name: str, own: Sequence[float], base: Sequence[float], error: float, dice: random.Random
) -> Timing:
    ratios = _ratios(base, own)
    low, _, high = statistics.quantiles(own, n=4)
    return Timing(
        arm=name,
        median_ms=1e3 * statistics.median(own),
        quartiles_ms=(1e3 * low, 1e3 * high),
        speedup=statistics.median(ratios),
        interval=_bootstrap(ratios, dice),
        error=error,
    )


def _ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    return [b / o for b, o in zip(base, own, strict=True)]


def _visit(arm: Arm, window_s: float) -> float:
    _once(arm)
    count, passed = 0, 0.0
    while passed < window_s:
        passed += _once(arm)[0]
        count += 1
    return passed / count


def _once(arm: Arm) -> tuple[float, Tensor]:
    """Seconds and result of one call."""
    if arm.before is not None:
        arm.before()
    _synchronize()
    start = time.perf_counter()
    result = arm.run()
    _synchronize()
    return time.perf_counter() - start, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bootstrap(values: Sequence[float], dice: random.Random, draws: int = 2000) -> tuple[float, float]:
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


# --- what is written ---------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def milliseconds(timing: Timing) -> str:
    """An arm's time as the tables have it."""
    low, high = timing.quartiles_ms
    return f"{timing.median_ms:.1f} ({low:.1f} … {high:.1f})"


def table(
    comparisons: Sequence[Comparison],
    *,
    columns: tuple[str, str, str] = ("case", "arm", "ms (quartiles)"),
    figure: Callable[[Timing], str] = milliseconds,
) -> str:
    """Markdown: one row per case and arm. `figure` writes what the third column holds."""
    lines = [
        f"| {' | '.join(columns)} | times faster than the baseline (95 %) |",
        "|---|---|--:|--:|",
    ]
    for comparison in comparisons:
        for t in comparison.timings:
            faster = f"{t.speedup:.2f} ({t.interval[0]:.2f} … {t.interval[1]:.2f})"
            if t.arm == comparison.baseline:
                faster = f"baseline, against itself ± {comparison.noise:.2f}"
            lines.append(f"| {comparison.case} | {t.arm} | {figure(t)} | {faster} |")
    return "\n".join(lines) + "\n"


def write(suite: str, comparisons: Sequence[Comparison], *, about: str = "", rows: str = "") -> Path:
    """results/SUITE.json and .md; `about` says in the page what was done, `rows` is its table (default: `table`)."""
    folder = ROOT / "results"
    folder.mkdir(exist_ok=True)
    facts = machine()
    entry = {"suite": suite, "machine": facts, "comparisons": [asdict(c) for c in comparisons]}
    (folder / f"{suite}.json").write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    words = ", ".join(f"{k} {v}" for k, v in facts.items() if v)
    parts = [f"# {suite}", about, words, rows or table(comparisons)]
    path = folder / f"{suite}.md"
    path.write_text("\n\n".join(part for part in parts if part), encoding="utf-8")
    return path
