"""Tests of learning-rate schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest

from normfree.optim.schedule import (
    SCHEDULES,
    constant,
    schedule_multiplier,
    warmup_cosine,
    warmup_linear,
)

END = {"warmup_cosine": 0.25, "warmup_linear": 0.25, "constant": 1.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rises_from_zero_meets_the_peak_and_ends_at_final(name: str) -> None:
    def at(progress: float) -> float:
        return schedule_multiplier(name, progress, warmup=0.2, final=0.25)

    assert at(0.0) == 0.0
    assert at(0.05) == pytest.approx(0.25)
    assert at(0.2) == 1.0
    assert at(1.0) == pytest.approx(END[name])
    assert at(0.2 - 1e-9) == pytest.approx(1.0, abs=1e-8)
    assert at(0.2 + 1e-9) == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize("name", SCHEDULES)
def test_never_rises_after_the_warmup(name: str) -> None:
    values = [schedule_multiplier(name, i / 500, warmup=0.1) for i in range(50, 501)]
    assert all(a >= b for a, b in pairwise(values))
    assert all(0.0 <= v <= 1.0 for v in values)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_without_warmup_it_starts_at_the_peak(schedule: Callable[..., float]) -> None:
    assert schedule(0.0) == 1.0


def test_intermediate_values() -> None:
    # Halfway down, the cosine and the line have the same value; after a quarter they differ.
    assert warmup_cosine(0.6, warmup=0.2, final=0.0) == pytest.approx(0.5)
    assert warmup_linear(0.6, warmup=0.2, final=0.0) == pytest.approx(0.5)
    assert warmup_cosine(0.4, warmup=0.2) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert warmup_linear(0.4, warmup=0.2) == pytest.approx(0.75)
    assert warmup_cosine(0.6, warmup=0.2, final=0.5) == pytest.approx(0.75)
    assert constant(0.9, warmup=0.2) == 1.0


def test_the_last_rate_of_nf_regnets() -> None:
    # From a peak of 0.4 to 0.001.
    assert 0.4 * warmup_cosine(1.0, warmup=5 / 360, final=0.001 / 0.4) == pytest.approx(0.001)


def test_a_warmup_of_the_whole_run_only_rises() -> None:
    assert [warmup_cosine(p, warmup=1.0) for p in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"progress": 1.5}, "progress is 1.5. Allowed: 0 to 1. Fix: pass step / total steps."),
        (
            {"progress": 0.5, "warmup": 5.0},
            "warmup is 5.0. Allowed: 0 to 1. Fix: pass warm-up steps / total steps.",
        ),
        (
            {"progress": 0.5, "final": -0.1},
            "final is -0.1. Allowed: 0 to 1. Fix: pass last learning rate / peak learning rate.",
        ),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_arguments_outside_the_unit_interval(
    schedule: Callable[..., float], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schedule(**arguments)


def test_unknown_name() -> None:
    message = (
        "unknown schedule 'cosine'. Did you mean 'warmup_cosine'? "
        "Allowed: 'warmup_cosine', 'warmup_linear', 'constant'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        schedule_multiplier("cosine", 0.5)
