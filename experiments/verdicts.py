"""What experiments conclude from the scores of their seeds, by rules that are code.

Arms with the same seed share the order of the images, the crops and the initial weights of common layers, so they are
compared seed by seed by a paired t interval. An arm is "ahead" or "behind" if the 95 % interval of the difference
excludes 0, "equal" if the interval lies within the margin of 1 point on both sides of 0, and otherwise "undecided".
An arm is as good as another if the interval lies above -1 point, and is not if the interval lies below it.
The smallest gap that as many seeds with this spread see in 8 of 10 experiments is given after "sees". A run whose
loss or gradient is not finite has diverged. That is counted, and never averaged with accuracies: a comparison with a
diverged run has no interval. An arm of which two or more runs diverged is behind one of which none did. A comparison
in which runs are missing is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from normfree.uncertainty import PairedComparison, compare_paired

MARGIN = 1.0  # points that do not matter
LOST = 2  # diverged runs that put an arm behind one without any
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
RULE = " ".join((__doc__ or "").split("\n\n", 1)[1].split())


@dataclass(frozen=True)
class Finding:
    """What an experiment says about one claim of docs/claims.md.

    Attributes:
        claim: key of the claim.
        verdict: HOLDS, FAILS or UNDECIDED.
        numbers: our numbers, as text.
        rows: (arm, point) of the table whose scores decide it.
        seeds: how many runs of each arm decide it, 0 for those of the table.
    """

    claim: str
    verdict: str
    numbers: str
    rows: tuple[tuple[str, str], ...] = ()
    seeds: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the finding as an object for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Compared:
    """How one arm compares with another.

    Attributes:
        verdict: ahead, behind, equal or undecided.
        paired: difference and interval; None if runs diverged or are missing.
        reason: why there is no interval.
        rows: the two, each as (arm, point).
    """

    verdict: str
    paired: PairedComparison | None = None
    reason: str = ""
    rows: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        if self.paired is None:
            return f"{self.verdict}, {self.reason}"
        low, high = self.paired.interval
        gap = f"{self.paired.difference:+.1f} ({low:+.1f} to {high:+.1f})"
        return f"{self.verdict} {gap}; sees {self.paired.smallest_gap:.1f}"


class Scores:
    """Scores of arms by point and seed; None is a run that diverged. A run without a score is missing."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, key: str = "top1") -> None:
        self._scores: dict[tuple[str, str], dict[int, float | None]] = {}
        for row in rows:
            lost, score = row["status"] != "done", row.get(key)
            if lost or (score is not None and math.isfinite(score)):
                own = self._scores.setdefault((row["arm"], row["point"]), {})
                own[row["seed"]] = None if lost else score

    def by_seed(self, arm: str, point: str = "") -> dict[int, float | None]:
        """Return the scores of an arm by seed, in the order of the seeds."""
        return dict(sorted(self._scores.get((arm, point), {}).items()))

    def of(self, arm: str, point: str = "") -> list[float | None]:
        """Return the scores of an arm, seed by seed."""
        return list(self.by_seed(arm, point).values())

    def good(self, arm: str, point: str = "") -> list[float]:
        """Return the scores of the runs that did not diverge."""
        return [score for score in self.of(arm, point) if score is not None]

    def diverged(self, arm: str, point: str = "") -> int:
        """Return how many runs diverged."""
        return sum(score is None for score in self.of(arm, point))

    def mean(self, arm: str, point: str = "") -> float | None:
        """Return the mean, None if a run diverged or there are fewer than two."""
        scores = self.of(arm, point)
        return fmean(self.good(arm, point)) if len(scores) > 1 and None not in scores else None

    def compare(
        self, method: tuple[str, str], baseline: tuple[str, str], *, margin: float = MARGIN
    ) -> Compared:
        """Compare two arms, each given as (arm, point), by the rule of this module."""
        ours, theirs = self.by_seed(*method), self.by_seed(*baseline)
        if ours.keys() != theirs.keys() or len(ours) < 2:
            return Compared(UNDECIDED, reason="runs are missing", rows=(method, baseline))
        lost, lost_by_other = self.diverged(*method), self.diverged(*baseline)
        if not lost and not lost_by_other:
            paired = compare_paired(self.good(*method), self.good(*baseline), margin=margin)
            return Compared(paired.verdict, paired, rows=(method, baseline))
        verdict = UNDECIDED
        if lost >= LOST and not lost_by_other:
            verdict = "behind"
        elif lost_by_other >= LOST and not lost:
            verdict = "ahead"
        reason = f"{lost} of {len(ours)} runs diverged, against {lost_by_other} of {len(theirs)}"
        return Compared(verdict, reason=reason, rows=(method, baseline))

    def text(self, arm: str, point: str = "", *, digits: int = 1) -> str:
        """Return mean ± standard deviation of the runs that did not diverge, and how many did."""
        lost, count = self.diverged(arm, point), len(self.of(arm, point))
        shown = spread(self.good(arm, point), digits=digits)
        return f"{shown} ({lost} of {count} diverged)".removeprefix("– ") if lost else shown


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Return mean ± standard deviation as text.

    >>> spread([1.0, 2.0, 3.0]), spread([-1e-9]), spread([])
    ('2.0 ± 1.0', '0.0', '–')
    """
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):z.{digits}f}{deviation}"


def rows_of(*compared: Compared) -> tuple[tuple[str, str], ...]:
    """Return the rows of several comparisons, each once.

    >>> rows_of(Compared("equal", rows=(("a", ""), ("b", ""))), Compared("equal", rows=(("b", ""), ("c", ""))))
    (('a', ''), ('b', ''), ('c', ''))
    """
    return tuple(dict.fromkeys(row for one in compared for row in one.rows))


def both(*verdicts: str) -> str:
    """Return the verdict of a claim with several conditions: all must hold; without conditions it is undecided.

    >>> both(HOLDS, UNDECIDED), both(HOLDS, FAILS, UNDECIDED), both()
    ('undecided', 'does not hold', 'undecided')
    """
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and UNDECIDED not in verdicts else UNDECIDED


def expect(found: Compared, *allowed: str) -> str:
    """Return HOLDS if a comparison has one of the allowed verdicts, FAILS if it has another one, else UNDECIDED.

    >>> expect(Compared("behind"), "ahead"), expect(Compared("undecided"), "ahead")
    ('does not hold', 'undecided')
    """
    if found.verdict == UNDECIDED:
        return UNDECIDED
    return HOLDS if found.verdict in allowed else FAILS


def as_good(found: Compared, *, margin: float = MARGIN) -> str:
    """Return HOLDS if an arm is at most `margin` points worse than the other, FAILS if it is more, else UNDECIDED.

    >>> as_good(Compared("behind", compare_paired([1.0, 1.2, 1.1], [1.2, 1.5, 1.3], margin=1.0)))
    'holds'
    """
    if found.paired is None:
        return expect(found, "ahead")
    low, high = found.paired.interval
    return HOLDS if low > -margin else FAILS if high < -margin else UNDECIDED
