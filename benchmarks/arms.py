"""One way to do the job of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Arm:
    """One way to do the job.

    run: does it once and returns what the gate compares.
    before: called before each run, not timed.
    then: a second part of the job, timed with the first and also apart.
    distance: how far this arm's work is from the right one (relative L2), where `run`'s result does not show it.
    allowed: what `distance` may be, where that is not the comparison's tolerance.
    alike: whether the result of `run` is to be that of the first arm.
    images: how many one run takes; arms are compared by the time for one.
    compiled: the first call compiles, and the time that this takes is reported.
    facts: further figures for the tables.
    """

    name: str
    run: Callable[[], Tensor]
    before: Callable[[], object] | None = None
    then: Callable[[], object] | None = None
    distance: Callable[[], float] | None = None
    allowed: float | None = None
    alike: bool = True
    images: int = 1
    compiled: bool = False
    facts: Mapping[str, float] = field(default_factory=dict)
