"""From rounds to figures: medians, quartiles, ratios within rounds, bootstrap intervals."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.arms import Arm

DRAWS = 2000  # of the bootstrap


class Sample(NamedTuple):
    """One visit: seconds a call (whole, and its first part), on the device's clock too if it has one; and what the
    visit cost, warm calls included."""

    whole: float
    first: float
    device: float | None
    spent: float


@dataclass(frozen=True)
class Floor:
    """What nothing can fall below: milliseconds, and the reason in words. It does not compete."""

    ms: float
    reason: str


@dataclass(frozen=True)
class Timing:
    """One arm in the unit of its comparison, and how many times better than the baseline it is (median of the ratios
    within rounds, 95 % interval). `error`: relative L2 distance of its work from the right one, by the gate."""

    arm: str
    median: float
    quartiles: tuple[float, float]
    ratio: float
    interval: tuple[float, float]
    error: float
    images: int = 1
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All arms of one case against `baseline`. `noise` is how far a second copy of the baseline strays from it: the
    larger end of its interval. `rounds`: how many were counted (0: not written down). Less is better in any `unit`."""

    case: str
    baseline: str
    timings: tuple[Timing, ...]
    noise: float
    rounds: int
    unit: str = "ms"
    floor: Floor | None = None


def summary(
    case: str,
    arms: Sequence[Arm],
    errors: Mapping[str, float],
    samples: Mapping[str, Sequence[Sample]],
    dice: random.Random,
    *,
    floor: Floor | None = None,
) -> Comparison:
    """The comparison of `arms`, baseline first, whose samples are there along with those of "A/A"."""
    each = {arm.name: [1e3 * s.whole for s in samples[arm.name]] for arm in arms}
    base = arms[0]
    again = [1e3 * s.whole for s in samples["A/A"]]
    timings = []
    for arm in arms:
        facts, device = dict(arm.facts), [s.device for s in samples[arm.name] if s.device is not None]
        if device:
            facts["device_ms"] = 1e3 * statistics.median(device)
        per_image = arm.images / base.images
        timings.append(
            timing(arm.name, each[arm.name], each[base.name], dice, error=errors[arm.name],
                   images=arm.images, scale=per_image, facts=facts)
        )  # fmt: skip
    noise = spread(ratios(each[base.name], again), dice)
    return Comparison(case, base.name, tuple(timings), noise, len(again), floor=floor)


def timing(
    arm: str,
    own: Sequence[float],
    base: Sequence[float],
    dice: random.Random,
    *,
    error: float = 0.0,
    images: int = 1,
    scale: float = 1.0,
    facts: Mapping[str, float] | None = None,
) -> Timing:
    """Of the values `own` against those of the same rounds in `base`. `scale`: images of a run for one of the base."""
    within = [scale * ratio for ratio in ratios(base, own)]
    low, _, high = statistics.quantiles(own, n=4) if len(own) > 1 else [own[0]] * 3
    return Timing(
        arm, statistics.median(own), (low, high), statistics.median(within), interval(within, dice), error,
        images, facts or {},
    )  # fmt: skip


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times better, round by round."""
    return [b / o for b, o in zip(base, own, strict=True)]


def interval(values: Sequence[float], dice: random.Random) -> tuple[float, float]:
    """95 % of the medians of samples drawn from `values` with replacement."""
    medians = sorted(statistics.median(dice.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS)]


def spread(values: Sequence[float], dice: random.Random) -> float:
    """How far the interval of `values`, which should be 1, reaches from 1."""
    return max(abs(1 - end) for end in interval(values, dice))
