"""Learning-rate schedules: pure functions of progress.

Progress is step / total steps, in [0, 1]; the result multiplies the peak learning rate. Without state there
is nothing to save: a resumed run asks for the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches


def warmup_cosine(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Linear from 0 to 1 while progress <= warmup, then half a cosine from 1 down to `final` at progress 1.

    warmup: fraction of the run. final: last value as a fraction of the peak. NFNets end at 0; NF-RegNets end
    at 0.001 of a peak of 0.4. Raises ValueError for an argument outside [0, 1].
    Source: the reference code's WarmupCosineDecay, [B] section 4.3 (5 of 360 epochs of warm-up).
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    if rising is not None:
        return rising
    fall = (progress - warmup) / (1.0 - warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * fall))


def warmup_linear(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Linear from 0 to 1 while progress <= warmup, then linear from 1 down to `final` at progress 1.

    Arguments and errors as for `warmup_cosine`.
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    if rising is not None:
        return rising
    return 1.0 - (1.0 - final) * (progress - warmup) / (1.0 - warmup)


def constant(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Linear from 0 to 1 while progress <= warmup, then 1.

    `final` is there so that schedules can stand in for each other; a constant one never falls.
    Arguments and errors as for `warmup_cosine`.
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    return 1.0 if rising is None else rising


SCHEDULES: dict[str, Callable[..., float]] = {
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
    "constant": constant,
}


def schedule_multiplier(name: str, progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """The value of the schedule called `name` (a key of SCHEDULES) at `progress`.

    Raises ValueError for an unknown name, with the nearest one, and as `warmup_cosine` does.
    """
    if name not in SCHEDULES:
        near = get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"Schedule {name!r} is unknown. Allowed: {', '.join(map(repr, SCHEDULES))}. Nearest: {near!r}."
        )
    return SCHEDULES[name](progress, warmup=warmup, final=final)


def _warmup(progress: float, *, warmup: float, final: float) -> float | None:
    """The rising part, or None past it. Also checks the arguments, since every schedule starts here."""
    for what, value, hint in (
        ("progress", progress, "step / total steps"),
        ("warmup", warmup, "warm-up steps / total steps"),
        ("final", final, "last learning rate / peak learning rate"),
    ):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{what} is {value}. It must lie in [0, 1]. Pass {hint}.")
    if progress > warmup or warmup == 0.0:
        return None
    return progress / warmup
