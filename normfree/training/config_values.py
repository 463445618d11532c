"""Config values with a form of their own: the processes that load images, and the images that validate.

This file does not import PyTorch, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import re

# A config may come from others. This is far above what machines have, and far below what stops one.
MAX_WORKERS = 256
# Folds of a cross-validation: far more than are of use.
MAX_FOLDS = 100
# Default of `input.val_fraction`.
VAL_FRACTION = 0.1
_WORKERS = re.compile(r"(auto|\d{1,6})(?::deadline=(\d{1,7}(?:\.\d{1,6})?))?")
_FOLD = re.compile(r"fold:(\d{1,4})/(\d{1,4})")


def check_val_fraction(value: float | str) -> float | str:
    """Return a value of `input.val_fraction`, a number if it is one; raise ValueError with what is allowed."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # from the command line
    if isinstance(value, str):
        match = _FOLD.fullmatch(value)
        valid = match is not None and 1 <= int(match[1]) <= int(match[2]) and int(match[2]) > 1
    else:
        valid = 0.0 <= value < 1.0
    if not valid:
        raise ValueError("a number from 0 to below 1, or fold:2/5, the second of five folds")
    return value


def check_workers(value: int | str) -> int | str:
    """Return a value of `input.workers`, a number if it is one; raise ValueError with what is allowed."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 7:
        value = int(value)  # from the command line
    match = _WORKERS.fullmatch(str(value))
    if match is None or (match[1] != "auto" and int(match[1]) > MAX_WORKERS) or float(match[2] or 1) <= 0:
        allowed = f"0 to {MAX_WORKERS} processes, or 'auto', and after them :deadline=SECONDS above 0"
        raise ValueError(f"{allowed}, for example 4:deadline=600")
    return value


def workers_in(workers: int | str) -> tuple[int | None, float | None]:
    """Return the number of processes and the deadline in seconds in a value of `input.workers`; None for "auto", and
    for a deadline that is not given.

    >>> workers_in(4), workers_in("auto:deadline=60")
    ((4, None), (None, 60.0))
    """
    match = _WORKERS.fullmatch(str(workers))
    assert match, workers
    return None if match[1] == "auto" else int(match[1]), float(match[2]) if match[2] else None


def fold_in(val_fraction: float | str) -> tuple[int, int] | None:
    """Return the fold, from 1, and the number of folds in a value of `input.val_fraction`; None for a fraction.

    >>> fold_in("fold:2/5"), fold_in(0.1)
    ((2, 5), None)
    """
    match = _FOLD.fullmatch(val_fraction) if isinstance(val_fraction, str) else None
    return (int(match[1]), int(match[2])) if match else None
