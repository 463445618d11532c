"""What experiments conclude from the scores of their seeds, by rules that are fixed before the runs.

Arms with the same seed share the order of the images, the crops and the initial weights of common layers, so they are
compared seed by seed by a paired t interval. An arm is "ahead" or "behind" if the 95 % interval of the difference
excludes 0, "equal" if the interval lies within the margin of 1 point on both sides of 0, and otherwise "undecided".
The smallest gap that as many seeds with this spread see in 8 of 10 experiments is given after "sees". A run whose
loss or gradient is not finite has diverged. That is counted, and never averaged with accuracies: a comparison with a
diverged run has no interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from normfree.uncertainty import PairedComparison, compare_paired

MARGIN = 1.0  # points that do not matter
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
RULE = " ".join((__doc__ or "").split("\n\n", 1)[1].split())


@dataclass(frozen=True)
class Finding:
    """What an experiment says about one claim of docs/claims.md.

    Attributes:
        claim: key of the claim.
        verdict: HOLDS, FAILS or UNDECIDED.
        numbers: our numbers, as text.
    """

    claim: str
    verdict: str
    numbers: str

    def as_json(self) -> dict[str, str]:
        """Return the finding as an object for JSON."""
        return asdict(self)


class Scores:
    """Scores of arms by point and seed; None is a run that diverged."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], *, key: str = "top1") -> None:
        self._scores: dict[tuple[str, str], dict[int, float | None]] = {}
        for row in rows:
            score = row.get(key) if row["status"] == "done" else None
            self._scores.setdefault((row["arm"], row["point"]), {})[row["seed"]] = score

    def __contains__(self, entry: tuple[str, str]) -> bool:
        return entry in self._scores

    def of(self, arm: str, point: str = "") -> list[float | None]:
        """Return the scores of an arm, seed by seed."""
        own = self._scores.get((arm, point), {})
        return [own[seed] for seed in sorted(own)]

    def good(self, arm: str, point: str = "") -> list[float]:
        """Return the scores of the runs that did not diverge."""
        return [score for score in self.of(arm, point) if score is not None]

    def diverged(self, arm: str, point: str = "") -> int:
        """Return how many runs diverged."""
        return sum(score is None for score in self.of(arm, point))

    def mean(self, arm: str, point: str = "") -> float | None:
        """Return the mean, None if a run diverged or there is none."""
        scores = self.of(arm, point)
        return fmean(self.good(arm, point)) if scores and None not in scores else None

    def compare(
        self, method: tuple[str, str], baseline: tuple[str, str], *, margin: float = MARGIN
    ) -> PairedComparison | None:
        """Compare two arms, each given as (arm, point); None if that needs more seeds or a run diverged."""
        ours, theirs = self.of(*method), self.of(*baseline)
        if len(ours) != len(theirs) or len(ours) < 2 or None in ours or None in theirs:
            return None
        return compare_paired(self.good(*method), self.good(*baseline), margin=margin)

    def text(self, arm: str, point: str = "", *, digits: int = 1) -> str:
        """Return mean ± standard deviation of the runs that did not diverge, and how many did."""
        lost, count = self.diverged(arm, point), len(self.of(arm, point))
        shown = spread(self.good(arm, point), digits=digits)
        return f"{shown} ({lost} of {count} diverged)".removeprefix("– ") if lost else shown


def spread(values: Sequence[float], *, digits: int = 1) -> str:
    """Return mean ± standard deviation as text.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0]), spread([])
    ('2.0 ± 1.0', '1.0', '–')
    """
    if not values:
        return "–"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def comparison_text(found: PairedComparison | None, *, digits: int = 1) -> str:
    """Return a comparison as text: difference, interval, verdict and the smallest gap that it can see."""
    if found is None:
        return "–"
    low, high = found.interval
    shown = f"{found.difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{found.verdict} {shown}; sees {found.smallest_gap:.{digits}f}"


def both(*verdicts: str) -> str:
    """Return the verdict of a claim with several conditions: all must hold.

    >>> both(HOLDS, UNDECIDED), both(HOLDS, FAILS, UNDECIDED)
    ('undecided', 'does not hold')
    """
    if FAILS in verdicts:
        return FAILS
    return UNDECIDED if UNDECIDED in verdicts else HOLDS


def expect(found: PairedComparison | None, *allowed: str) -> str:
    """Return HOLDS if a comparison has one of the allowed verdicts, UNDECIDED if it has none or is undecided.

    >>> expect(compare_paired([54.9, 55.2, 54.4], [53.0, 53.9, 53.0], margin=1.0), "ahead")
    'holds'
    """
    if found is None or (found.verdict == "undecided" and "undecided" not in allowed):
        return UNDECIDED
    return HOLDS if found.verdict in allowed else FAILS
