"""Side by side in one process: every arm once per round in shuffled order, ratios within rounds, medians, intervals.

A comparison has a correctness gate (where arms disagree no time is taken) and the baseline twice (A/A): a difference
smaller than what the baseline shows against itself is no difference. Statistics stand in `statistic.py`.
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

#: Counted rounds below which a comparison says nothing.
LEAST = 5
#: Seconds of a call above which a call more, only to get warm, is too dear.
LONG_S = 1.0
CPU = torch.device("cpu")


class GateError(ArithmeticError):
    """Arms that should do the same work do not."""


class OutOfTimeError(Exception):
    """What is left of the suite's time does not suffice for `LEAST` rounds."""


@dataclass(frozen=True)
class Bench:
    """How a suite measures: its device, its time, and what it had to leave out.

    rounds: counted ones; where time runs short fewer, but not below `LEAST`.
    window_s: a visit to an arm is one warm call, then calls for at least this long; a longer call comes alone.
    deadline: of the suite; share: of the case at work. Both on `clock`, in seconds.
    bandwidth, matmul: the machine's ceilings in bytes/s (read and written) and flop/s; 0: not measured.
    skipped: what was left out and why, in words; filled as the suite goes on.
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
        """Rounds below which there is no comparison."""
        return min(LEAST, self.rounds)

    def left(self) -> float:
        """Seconds until the suite has to end."""
        return self.deadline - self.clock()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Case:
    """One row of a suite: `words` are what `--only` may call it, `run` measures it."""

    name: str
    words: tuple[str, ...]
    run: Callable[[Bench], Iterable[Comparison]]


class Call(NamedTuple):
    """Seconds of `run`, and of `run` and `then`; and the result."""

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
    """Gate, one round that is not counted, then rounds of the chosen arms and of the baseline once more.

    gradients: the arms train; otherwise they run in inference mode.
    choose: gets the seconds of each arm in the uncounted round and returns the names to go on with, baseline first;
        by default all, in order. What is chosen is measured anew, so that luck in the choice does not count.
    parts: names of the two comparisons where arms have `then`; otherwise there is one, called `case`.

    Raises:
        GateError: an arm's result is further than `tolerance` (relative L2) from the first arm's.
        OutOfTimeError: there is no time for `LEAST` rounds.
    """
    dice = random.Random(seed)
    with torch.enable_grad() if gradients else torch.inference_mode():
        ready, errors, pilot = _gate(bench, case, arms, tolerance)
        for arm in dice.sample(ready, len(ready)):
            pilot[arm.name] = min(_visit(bench, arm), pilot.get(arm.name, Sample(math.inf, 0.0, None, 0.0)))
        names = choose({arm.name: pilot[arm.name].whole / arm.images for arm in ready})
        chosen = [next(arm for arm in ready if arm.name == name) for name in names]
        visits = [*chosen, replace(chosen[0], name="A/A")]
        spent = {a.name: pilot[names[0] if a.name == "A/A" else a.name].spent for a in visits}
        samples = _rounds(bench, case, visits, sum(spent.values()), dice)
    whole = summary(case, chosen, errors, samples, dice, floor=floor)
    if all(arm.then is None for arm in chosen):
        return [whole]
    apart = {name: [s._replace(whole=s.first) for s in own] for name, own in samples.items()}
    return [
        replace(whole, case=f"{case}, {parts[0]}"),
        replace(summary(case, chosen, errors, apart, dice, floor=floor), case=f"{case}, {parts[1]}"),
    ]


def _rounds(
    bench: Bench, case: str, visits: Sequence[Arm], expected: float, dice: random.Random
) -> dict[str, list[Sample]]:
    """Samples of each arm. `expected`: seconds of a round."""
    if bench.clock() + bench.least * expected > bench.deadline:
        needs, left = bench.least * expected, max(0.0, bench.left())
        raise OutOfTimeError(f"{case}: {bench.least} rounds need {needs:.0f} s, {left:.0f} s are left")
    samples: dict[str, list[Sample]] = {arm.name: [] for arm in visits}
    for done in range(bench.rounds):
        start = bench.clock()
        if done >= bench.least and start + expected > min(bench.share, bench.deadline):
            break
        for arm in dice.sample(visits, len(visits)):
            samples[arm.name].append(_visit(bench, arm))
        expected = max(expected, bench.clock() - start)
    return samples


def _gate(
    bench: Bench, case: str, arms: Sequence[Arm], tolerance: float
) -> tuple[list[Arm], dict[str, float], dict[str, Sample]]:
    """The arms that can run here, with what their first calls showed; how far each is from the first; and of those that
    take longer than `LONG_S` the second call, so that luck has less of a say in the uncounted round."""
    ready: list[Arm] = []
    errors: dict[str, float] = {}
    long: dict[str, Sample] = {}
    wanted: Tensor | None = None
    for arm in arms:
        try:
            limit = tolerance if arm.allowed is None else arm.allowed
            apart = [] if arm.distance is None else [(arm.distance(), limit)]
            calls = [_once(bench, arm) for _ in range(2)]  # the second shows what the first call changed
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
            if not error <= limit:  # NaN is wrong too
                off = f"{arm.name} is {error:.1e} off, allowed are {limit:g}"
                raise GateError(f"{case}: {off}; no time is given")
        errors[arm.name] = max(error for error, _ in apart)
        if calls[1].whole > LONG_S:
            long[arm.name] = Sample(calls[1].whole, calls[1].first, None, calls[1].whole)
        ready.append(replace(arm, facts={**arm.facts, **facts}))
    if not ready:
        raise OutOfTimeError(f"{case}: no arm fits into memory")
    return ready, errors, long


def _facts(bench: Bench, arm: Arm, calls: Sequence[Call]) -> dict[str, float]:
    """Seconds that compiling took; and on a GPU the most memory beyond what lay there, in GiB."""
    found = {"compile_s": calls[0].whole - calls[1].whole} if arm.compiled else {}
    if bench.device.type == "cuda":
        before = torch.cuda.memory_allocated(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        _once(bench, arm)
        found["peak_gib"] = (torch.cuda.max_memory_allocated(bench.device) - before) / 2**30
    return found


def _visit(bench: Bench, arm: Arm) -> Sample:
    """A warm call, then calls for `window_s`, in one window where nothing has to happen in between."""
    start = bench.clock()
    seen = _once(bench, arm)
    calls = [seen] if seen.whole >= bench.window_s else []
    if not calls and arm.before is None and arm.then is None:
        return _window(bench, arm, max(1, round(bench.window_s / max(seen.whole, 1e-6))), start)
    while sum(call.whole for call in calls) < bench.window_s:
        calls.append(_once(bench, arm))
    first, whole = (sum(part) / len(calls) for part in zip(*(call[:2] for call in calls), strict=True))
    return Sample(whole, first, None, bench.clock() - start)


def _window(bench: Bench, arm: Arm, count: int, visited: float) -> Sample:
    """`count` calls without a wait between them, on the host's clock and on the device's."""
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
