"""Goal 7: a disk that is full, read-only or over its quota, a folder that vanishes, too many open files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from reliability.goals import Case, Result, spread
from reliability.operations import fault_at, operations_of_run

FAULTS = ("disk full", "read-only", "quota", "folder vanishes", "too many open files")
POINTS = 40


def cases(count: int) -> Iterator[Case]:
    """Return `count` of 40 points of a run, for each fault. From that point on, it lasts until the process ends."""
    for what in FAULTS:
        for point in spread(POINTS, count):
            check = f"{what}, from a point on: one line or none, checkpoint intact, run continues identical"
            yield Case(check, f"{what}, point {point}", partial(lasting_fault, what, point))


def lasting_fault(what: str, point: int) -> Result:
    """Run with a disk that refuses everything from a point on."""
    return fault_at(point * operations_of_run() // POINTS, what, lasting=True)
