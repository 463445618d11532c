"""Statistics of a comparison: medians, quartiles, ratios within rounds, bootstrap intervals."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.arms import Arm

DRAWS = 2000  # samples of the bootstrap


class Sample(NamedTuple):
    """One visit: seconds per call (whole, first part, by the device's clock), and seconds of the visit with warm-up."""

    whole: float
    first: float
    device: float | None
    spent: float


@dataclass(frozen=True)
class Floor:
    """A lower bound of the time in milliseconds, and its reason."""

    ms: float
    reason: str


@dataclass(frozen=True)
class Timing:
    """Result of one arm, in the unit of its comparison.

    `ratio` is how many times better than the baseline it is (median of the ratios within rounds, with the 95 %
    interval). `error` is the relative L2 error of its work, as measured by the gate.
    """

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
    """All arms of one case compared with `baseline`.

    `noise` is the deviation of the baseline's second copy from it: the larger end of the interval. `rounds` is the
    number of counted rounds (0: not recorded). Less is better in every `unit`. Comparisons with a `column` form a table
    of their own, with one line per `row`. `notes` are printed below the tables.
    """

    case: str
    baseline: str
    timings: tuple[Timing, ...]
    noise: float
    rounds: int
    unit: str = "ms"
    floor: Floor | None = None
    row: str = ""
    column: str = ""
    notes: tuple[str, ...] = ()


def summary(
    case: str,
    arms: Sequence[Arm],
    errors: Mapping[str, float],
    samples: Mapping[str, Sequence[Sample]],
    rng: random.Random,
    *,
    floor: Floor | None = None,
) -> Comparison:
    """Return the comparison of `arms`, baseline first; `samples` also has those of "A/A"."""
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
            timing(arm.name, each[arm.name], each[base.name], rng, error=errors[arm.name],
                   images=arm.images, scale=per_image, facts=facts)
        )  # fmt: skip
    noise = spread(ratios(each[base.name], again), rng)
    return Comparison(case, base.name, tuple(timings), noise, len(again), floor=floor)


def timing(
    arm: str,
    own: Sequence[float],
    base: Sequence[float],
    rng: random.Random,
    *,
    error: float = 0.0,
    images: int = 1,
    scale: float = 1.0,
    facts: Mapping[str, float] | None = None,
) -> Timing:
    """Compare the values `own` with those of the same rounds in `base`; `scale` is the ratio of images per run."""
    within = [scale * ratio for ratio in ratios(base, own)]
    low, _, high = statistics.quantiles(own, n=4) if len(own) > 1 else [own[0]] * 3
    return Timing(
        arm, statistics.median(own), (low, high), statistics.median(within), interval(within, rng), error,
        images, facts or {},
    )  # fmt: skip


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """Return how many times better `own` is, round by round."""
    return [b / o for b, o in zip(base, own, strict=True)]


def interval(values: Sequence[float], rng: random.Random) -> tuple[float, float]:
    """Return the 95 % interval of the median, by sampling from `values` with replacement."""
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS)]


def spread(values: Sequence[float], rng: random.Random) -> float:
    """Return the largest deviation from 1 of the interval of `values`, which are expected to be 1."""
    return max(abs(1 - end) for end in interval(values, rng))
