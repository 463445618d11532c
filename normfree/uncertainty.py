"""Uncertainty of measured numbers: intervals of accuracies and means, and paired comparisons.

Runs that share seeds share the order of the images, the crops and the initial weights, so two methods are compared seed
by seed; two networks that were scored on the same images are compared image by image. A small sample cannot show that
two methods are equal unless a margin was fixed before: not seeing a difference is "undecided", not "equal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from normfree.suggest import problem

POWER = 0.8  # of `PairedComparison.smallest_gap`: the usual one, for example Cohen 1988


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


def wilson_interval(hits: int, count: int, *, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share, such as an accuracy, from 0 to 1.

    It stays meaningful for few images and for shares near 0 and 1, where mean ± 2 standard errors does not.

    Args:
        hits: number of correct answers.
        count: number of answers.
        confidence: how often such an interval contains the true share, below 1.

    Raises:
        ValueError: `hits` is not in 0 to `count`, or `count` is 0.

    Examples:
        >>> low, high = wilson_interval(4, 4)
        >>> round(low, 2), round(high, 2)
        (0.51, 1.0)

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= hits <= count or count < 1:
        raise ValueError(problem(f"{hits} of {count} answers are correct", allowed="0 to all of 1 or more"))
    z, share = normal_quantile(0.5 + confidence / 2), hits / count
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Interval(max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale))


def accuracy_digits(count: int) -> int:
    """Return how many decimals an accuracy in percent of so many images deserves: 0 below 100, 2 from 10,000 on.

    One image more or less then changes the last digit.
    """
    return 0 if count < 100 else 1 if count < 10_000 else 2


def accuracy_text(hits: int, count: int) -> str:
    """Return an accuracy in percent with its 95 % interval, with the decimals of `accuracy_digits`.

    >>> accuracy_text(270, 374), accuracy_text(4, 4)
    ('72.2 (67.4 to 76.5)', '100 (51 to 100)')
    """
    low, high = wilson_interval(hits, count)
    digits = accuracy_digits(count)
    return f"{100 * hits / count:.{digits}f} ({100 * low:.{digits}f} to {100 * high:.{digits}f})"


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Return the interval of the mean of independent values, by Student's t distribution.

    Raises:
        ValueError: there are fewer than two values.

    Examples:
        >>> low, high = mean_interval([1.85, 1.25, 1.35])
        >>> round(low, 2), round(high, 2)
        (0.68, 2.28)
    """
    if len(values) < 2:
        raise ValueError(problem(f"{len(values)} values", allowed="two or more", fix="run more seeds"))
    reach = student_quantile(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    mean = fmean(values)
    return Interval(mean - reach, mean + reach)


@dataclass(frozen=True)
class PairedComparison:
    """How much a method differs from another, measured on the same seeds or images.

    Attributes:
        difference: mean of method minus baseline.
        interval: its confidence interval.
        verdict: "ahead" or "behind" if the interval excludes 0, else "equal" if it lies within the margin on both
            sides of 0, else "undecided".
        smallest_gap: the true difference that as many pairs with this spread find in 8 of 10 experiments.
    """

    difference: float
    interval: Interval
    verdict: str
    smallest_gap: float


def compare_paired(
    method: Sequence[float], baseline: Sequence[float], *, margin: float, confidence: float = 0.95
) -> PairedComparison:
    """Compare two methods on the same seeds by a paired t test.

    Args:
        method: scores of the method, larger is better, one for each seed.
        baseline: scores of the baseline in the same order.
        margin: difference that does not matter, fixed before the scores are known.
        confidence: of the interval, below 1.

    Raises:
        ValueError: the numbers of scores differ or are below two.

    Examples:
        >>> found = compare_paired([54.9, 55.2, 54.4], [53.05, 53.95, 53.05], margin=1.0)
        >>> found.verdict, round(found.difference, 2), round(found.interval.low, 2)
        ('ahead', 1.48, 0.68)
    """
    if len(method) != len(baseline):
        given = f"{len(method)} scores of the method and {len(baseline)} of the baseline"
        raise ValueError(problem(given, allowed="one score of each for each seed"))
    differences = [a - b for a, b in zip(method, baseline, strict=True)]
    interval = mean_interval(differences, confidence=confidence)
    if 0 not in interval:
        verdict = "ahead" if interval.low > 0 else "behind"
    else:
        verdict = "equal" if -margin <= interval.low and interval.high <= margin else "undecided"
    freedom = len(differences) - 1
    quantiles = student_quantile(0.5 + confidence / 2, freedom) + student_quantile(POWER, freedom)
    gap = quantiles * stdev(differences) / math.sqrt(len(differences))
    return PairedComparison(fmean(differences), interval, verdict, gap)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Return the two-sided exact p-value of McNemar's test: are two networks equally accurate on the same images?

    Args:
        first: for each image, whether the first network is correct.
        second: the same for the second network.

    Raises:
        ValueError: the lengths differ.

    Examples:
        >>> mcnemar([True] * 6 + [False], [False] * 6 + [False])  # 6 images differ, all in one direction: 2 / 2 ** 6
        0.03125

    Source: McNemar 1947; exact by the binomial distribution of the images on which the networks differ.
    """
    if len(first) != len(second):
        given = f"{len(first)} and {len(second)} images"
        raise ValueError(problem(given, allowed="the same images in the same order"))
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_interval(
    samples: Any,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of any statistic of independent samples.

    Args:
        samples: N or N x C numbers. Samples are drawn along the first axis, so columns stay paired: for the difference
            of two networks pass N x 2 scores, and the difference of the means as the statistic.
        statistic: function of an array of this shape.
        confidence: of the interval, below 1.
        resamples: number of samples drawn with replacement, each of size N.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: there is no sample.

    Examples:
        >>> interval = bootstrap_interval([0.0] * 50 + [1.0] * 50)
        >>> 0.39 < interval.low < 0.42 and 0.58 < interval.high < 0.61
        True

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    array = np.asarray(samples)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(problem("there are no samples", allowed="one or more"))
    rng = np.random.default_rng(seed)
    found = [float(statistic(array[rng.integers(len(array), size=len(array))])) for _ in range(resamples)]
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def normal_quantile(probability: float) -> float:
    """Return the quantile of the standard normal distribution.

    >>> round(normal_quantile(0.975), 4)
    1.96
    """
    return NormalDist().inv_cdf(probability)


def student_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, for a probability of 0.5 to below 1.

    Raises:
        ValueError: the probability is out of range, or `freedom` is below 1.

    >>> round(student_quantile(0.975, 2), 4)
    4.3027
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        given = f"probability {probability} with {freedom} degrees of freedom"
        raise ValueError(problem(given, allowed="0.5 to below 1, with 1 or more"))
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(100):  # bisection down to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, freedom: int) -> float:
    """Return the distribution function of Student's t for t >= 0 and integer degrees of freedom.

    Source: Abramowitz and Stegun, equations 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(3 if odd else 2, freedom, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    both = 2 / math.pi * (angle + sine * total) if odd else sine * total  # P(-t < T < t)
    return 0.5 + both / 2
