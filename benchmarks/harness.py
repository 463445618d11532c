"""Comparisons in one process: every arm once per round in shuffled order, ratios within rounds, medians, intervals.

A comparison has a correctness gate (if arms disagree, no time is reported) and measures the baseline twice (A/A): a
difference smaller than that of the baseline from itself does not count. The statistics are in `summary.py`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.arms import Arm
from benchmarks.summary import Comparison, Floor, Sample, summary

# A comparison needs at least this many counted rounds.
LEAST = 5
# Calls of more than this many seconds get no extra warm-up call.
LONG_S = 1.0
CPU = torch.device("cpu")


class GateError(ArithmeticError):
    """Arms that should do the same work disagree."""


class OutOfTimeError(Exception):
    """The remaining time of the suite is too short for `LEAST` rounds."""


@dataclass(frozen=True)
class Bench:
    """Settings of a suite's measurements: its device, its time, and what it left out.

    Args:
        device: device of all arms.
        rounds: number of counted rounds; fewer if time is short, but at least `LEAST`.
        window_s: a visit to an arm is one warm-up call, then calls for at least this long; a longer call is alone.
        deadline: end of the suite on `clock`, in seconds.
        share: end of the current case on `clock`, in seconds.
        bandwidth: measured rate of a copy in bytes/s, read and written; 0 if not measured.
        matmul: measured rate of a matrix product in FLOP/s; 0 if not measured.
        skipped: what was left out and why, as text; filled while the suite runs.
        clock: returns the time in seconds.
    """

    device: torch.device = CPU
    rounds: int = 11
    window_s: float = 0.3
    deadline: float = float("inf")
    share: float = float("inf")
    bandwidth: float = 0.0
    matmul: float = 0.0
    skipped: list[str] = field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter

    @property
    def least(self) -> int:
        """The smallest number of rounds for a comparison."""
        return min(LEAST, self.rounds)

    def left(self) -> float:
        """Return the seconds until the suite must end."""
        return self.deadline - self.clock()

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """One case of a suite: `--only` accepts its `aliases`, `run` measures it."""

    name: str
    aliases: tuple[str, ...]
    run: Callable[[Bench], Iterable[Comparison]]


class Call(NamedTuple):
    """Seconds of `run`, seconds of `run` and `then`, and the result."""

    first: float
    whole: float
    result: Tensor


def compare(
    bench: Bench,
    case: str,
    arms: Sequence[Arm],
    *,
    tolerance: float = 1e-5,
    gradients: bool = False,
    choose: Callable[[dict[str, float]], list[str]] = list,
    parts: tuple[str, str] = ("whole", "first part"),
    floor: Floor | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Check the arms, run one uncounted round, then measure the chosen arms and the baseline a second time.

    Args:
        bench: settings of the measurement.
        case: name of the comparison.
        arms: the alternatives; the first is the baseline and the reference of the gate.
        tolerance: largest relative L2 error of an arm.
        gradients: the arms train; otherwise they run in inference mode.
        choose: receives the seconds of each arm in the uncounted round and returns the names to measure, baseline
            first; by default all, in order. The chosen arms are measured again, so that the choice does not bias the
            result.
        parts: names of the two comparisons if arms have `then`; otherwise there is one comparison, called `case`.
        floor: lower bound of the time.
        seed: seed of the order and of the bootstrap.

    Raises:
        GateError: the relative L2 distance of an arm's result from the first arm's exceeds `tolerance`.
        OutOfTimeError: there is no time for `LEAST` rounds.
    """
    rng = random.Random(seed)
    with torch.enable_grad() if gradients else torch.inference_mode():
        ready, errors, pilot = _gate(bench, case, arms, tolerance)
        for arm in rng.sample(ready, len(ready)):
            pilot[arm.name] = min(_visit(bench, arm), pilot.get(arm.name, Sample(math.inf, 0.0, None, 0.0)))
        names = choose({arm.name: pilot[arm.name].whole / arm.images for arm in ready})
        chosen = [next(arm for arm in ready if arm.name == name) for name in names]
        visits = [*chosen, replace(chosen[0], name="A/A")]
        spent = {a.name: pilot[names[0] if a.name == "A/A" else a.name].spent for a in visits}
        samples = _rounds(bench, case, visits, sum(spent.values()), rng)
    whole = summary(case, chosen, errors, samples, rng, floor=floor)
    if all(arm.then is None for arm in chosen):
        return [whole]
    apart = {name: [s._replace(whole=s.first) for s in own] for name, own in samples.items()}
    return [
        replace(whole, case=f"{case}, {parts[0]}"),
        replace(summary(case, chosen, errors, apart, rng, floor=floor), case=f"{case}, {parts[1]}"),
    ]


def _rounds(
    bench: Bench, case: str, visits: Sequence[Arm], expected: float, rng: random.Random
) -> dict[str, list[Sample]]:
    """Return the samples of each arm; `expected` is the duration of a round in seconds."""
    if bench.clock() + bench.least * expected > bench.deadline:
        needs, left = bench.least * expected, max(0.0, bench.left())
        raise OutOfTimeError(f"{case}: {bench.least} rounds need {needs:.0f} s, {left:.0f} s are left")
    samples: dict[str, list[Sample]] = {arm.name: [] for arm in visits}
    for done in range(bench.rounds):
        start = bench.clock()
        if done >= bench.least and start + expected > min(bench.share, bench.deadline):
            break
        for arm in rng.sample(visits, len(visits)):
            samples[arm.name].append(_visit(bench, arm))
        expected = max(expected, bench.clock() - start)
    return samples


def _gate(
    bench: Bench, case: str, arms: Sequence[Arm], tolerance: float
) -> tuple[list[Arm], dict[str, float], dict[str, Sample]]:
    """Return the arms that can run, with facts of their first calls; the error of each; and samples of slow arms.

    For arms that take longer than `LONG_S`, the sample is the second call. It makes the uncounted round less noisy.
    """
    ready: list[Arm] = []
    errors: dict[str, float] = {}
    long: dict[str, Sample] = {}
    wanted: Tensor | None = None
    for arm in arms:
        try:
            limit = tolerance if arm.allowed is None else arm.allowed
            apart = [] if arm.distance is None else [(arm.distance(), limit)]
            calls = [_once(bench, arm) for _ in range(2)]  # the second call shows what the first one changed
            facts = _facts(bench, arm, calls)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            bench.skipped.append(f"{case}, {arm.name}: out of memory")
            continue
        results = torch.cat([call.result.detach().float().flatten() for call in calls])
        if arm.alike:
            wanted = results if wanted is None else wanted
            apart.append((float((results - wanted).norm() / wanted.norm()), tolerance))
        if not apart:
            raise AssertionError(f"{arm.name} has no gate")
        for error, limit in apart:
            if not error <= limit:  # also true for NaN
                off = f"{arm.name} is off by {error:.1e}, allowed is {limit:g}"
                raise GateError(f"{case}: {off}; no time is reported")
        errors[arm.name] = max(error for error, _ in apart)
        if calls[1].whole > LONG_S:
            long[arm.name] = Sample(calls[1].whole, calls[1].first, None, calls[1].whole)
        ready.append(replace(arm, facts={**arm.facts, **facts}))
    if not ready:
        raise OutOfTimeError(f"{case}: no arm fits into memory")
    return ready, errors, long


def _facts(bench: Bench, arm: Arm, calls: Sequence[Call]) -> dict[str, float]:
    """Return the seconds of compilation and, on a GPU, the peak of newly allocated memory in GiB."""
    found = {"compile_s": calls[0].whole - calls[1].whole} if arm.compiled else {}
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        _once(bench, arm)
        found["peak_gib"] = (torch.cuda.max_memory_allocated(bench.device) - before) / 2**30
    return found


def _visit(bench: Bench, arm: Arm) -> Sample:
    """Make a warm-up call, then calls for `window_s`; in one window if nothing has to happen between them."""
    start = bench.clock()
    warm_up = _once(bench, arm)
    calls = [warm_up] if warm_up.whole >= bench.window_s else []
    if not calls and arm.before is None and arm.then is None:
        return _window(bench, arm, max(1, round(bench.window_s / max(warm_up.whole, 1e-6))), start)
    while sum(call.whole for call in calls) < bench.window_s:
        calls.append(_once(bench, arm))
    first, whole = (sum(part) / len(calls) for part in zip(*(call[:2] for call in calls), strict=True))
    return Sample(whole, first, None, bench.clock() - start)


def _window(bench: Bench, arm: Arm, count: int, visited: float) -> Sample:
    """Time `count` calls without a wait between them, on the host's clock and on the device's."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if bench.device.type == "cuda" else []
    bench.wait()
    start = bench.clock()
    for mark in marks[:1]:
        mark.record()
    for _ in range(count):
        arm.run()
    for mark in marks[1:]:
        mark.record()
    bench.wait()
    took = (bench.clock() - start) / count
    device = 1e-3 * marks[0].elapsed_time(marks[1]) / count if marks else None
    return Sample(took, took, device, bench.clock() - visited)


def _once(bench: Bench, arm: Arm) -> Call:
    """Time a single call."""
    if arm.before is not None:
        arm.before()
    bench.wait()
    start = bench.clock()
    result = arm.run()
    bench.wait()
    between = bench.clock()
    if arm.then is None:
        return Call(between - start, between - start, result)
    arm.then()
    bench.wait()
    return Call(between - start, bench.clock() - start, result)
