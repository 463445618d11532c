"""Arms: the alternatives that a comparison measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Arm:
    """One of the alternatives that a comparison measures.

    Args:
        name: name in the tables.
        run: does the work once and returns what the gate compares.
        before: called before each run, not timed.
        then: a second part of the work, timed with the first and also separately.
        distance: returns the relative L2 error of this arm's work, where the result of `run` does not show it.
        allowed: the largest `distance`, if it differs from the comparison's tolerance.
        alike: whether the result of `run` must equal that of the first arm.
        images: number of images per run; arms are compared by the time per image.
        compiled: the first call compiles; the time for it is reported.
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
