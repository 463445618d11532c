"""Learning-rate schedules: pure functions of progress.

Progress is step / total steps, in [0, 1]; the result multiplies the peak learning rate. Schedules have no state, so
there is nothing to save: a resumed run computes the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from normfree.suggest import problem, unknown


def warmup_cosine(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: a linear warm-up, then a cosine decay.

    The factor rises linearly from 0 to 1 while progress <= warmup, then falls along half a cosine from 1 to `final` at
    progress 1.

    Args:
        progress: step / total steps, in [0, 1].
        warmup: fraction of the run that the warm-up takes, in [0, 1].
        final: last value as a fraction of the peak, in [0, 1]. NFNets end at 0; NF-RegNets end at a learning rate of
            0.001 with a peak of 0.4.

    Raises:
        ValueError: an argument is outside [0, 1].

    Examples:
        >>> [round(normfree.warmup_cosine(step / 10, warmup=0.2), 2) for step in (0, 1, 2, 4, 6, 10)]
        [0.0, 0.5, 1.0, 0.85, 0.5, 0.0]

    Source: `WarmupCosineDecay` of the reference code; [B] section 4.3 (5 of 360 epochs of warm-up).
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    if rising is not None:
        return rising
    fall = (progress - warmup) / (1.0 - warmup)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * fall))


def warmup_linear(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: a linear warm-up, then a linear decay to `final` at progress 1.

    Arguments and errors are those of `warmup_cosine`.
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    if rising is not None:
        return rising
    return 1.0 - (1.0 - final) * (progress - warmup) / (1.0 - warmup)


def constant(progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate: a linear warm-up, then 1.

    Arguments and errors are those of `warmup_cosine`. `final` is accepted for a common signature and ignored.
    """
    rising = _warmup(progress, warmup=warmup, final=final)
    return 1.0 if rising is None else rising


SCHEDULES: dict[str, Callable[..., float]] = {
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
    "constant": constant,
}


def schedule_multiplier(name: str, progress: float, *, warmup: float = 0.0, final: float = 0.0) -> float:
    """Return the value at `progress` of the schedule with this name, a key of `SCHEDULES`.

    Raises:
        ValueError: the name is unknown, or an argument is outside [0, 1].
    """
    if name not in SCHEDULES:
        raise ValueError(unknown("schedule", name, SCHEDULES))
    return SCHEDULES[name](progress, warmup=warmup, final=final)


def _warmup(progress: float, *, warmup: float, final: float) -> float | None:
    """Check the arguments. Return the factor during the warm-up, or None after it."""
    for argument, value, hint in (
        ("progress", progress, "step / total steps"),
        ("warmup", warmup, "warm-up steps / total steps"),
        ("final", final, "last learning rate / peak learning rate"),
    ):
        if not 0.0 <= value <= 1.0:
            raise ValueError(problem(f"{argument} is {value}", allowed="0 to 1", fix=f"pass {hint}"))
    if progress > warmup or warmup == 0.0:
        return None
    return progress / warmup
