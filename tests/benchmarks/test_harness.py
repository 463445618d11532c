"""The harness: ratios of known times, coverage of intervals, the correctness gate, and time budgets."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]


class Clock:
    """A clock that advances only when an arm works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def harness(script: Script) -> ModuleType:
    return script("harness")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bench(harness: ModuleType, clock: Clock) -> Any:
    return harness.Bench(clock=clock, window_s=1.0)


def worker(
    harness: ModuleType,
    clock: Clock,
    name: str,
    seconds: Any,
    *,
    value: float = 1.0,
    rest: Any = None,
    **more: Any,
) -> Any:
    """Return an arm that takes `seconds`, a number or a function that draws one."""

    def spend(draw: Any) -> None:
        clock.now += draw() if callable(draw) else draw

    def run() -> torch.Tensor:
        spend(seconds)
        return torch.tensor([value])

    return harness.Arm(name, run, then=None if rest is None else lambda: spend(rest), **more)


def test_ratios_are_ratios_of_times(harness: ModuleType, bench: Any, clock: Clock) -> None:
    arms = [worker(harness, clock, "slow", 3.0), worker(harness, clock, "fast", 0.75)]
    (found,) = harness.compare(bench, "case", arms)
    slow, fast = found.timings
    assert (found.baseline, found.noise, found.rounds) == ("slow", 0.0, 11)
    assert (slow.median, fast.median) == pytest.approx((3000, 750))
    assert fast.ratio == pytest.approx(4)
    assert fast.interval == pytest.approx((4, 4))


def test_arms_are_compared_by_the_time_for_one_image(harness: ModuleType, bench: Any, clock: Clock) -> None:
    arms = [worker(harness, clock, "8", 2.0, images=8), worker(harness, clock, "2", 2.0, images=2)]
    (found,) = harness.compare(bench, "case", arms)
    assert found.timings[1].ratio == pytest.approx(0.25)


def test_both_parts_are_timed_in_the_same_calls(harness: ModuleType, bench: Any, clock: Clock) -> None:
    arms = [worker(harness, clock, "a", 2.0, rest=2.0), worker(harness, clock, "b", 2.0, rest=0.0)]
    whole, first = harness.compare(bench, "case", arms, parts=("whole step", "forward"))
    assert (whole.case, first.case) == ("case, whole step", "case, forward")
    assert [c.timings[1].ratio for c in (whole, first)] == pytest.approx([2, 1])


def test_a_slow_machine_slows_all_arms_of_a_round(harness: ModuleType, bench: Any, clock: Clock) -> None:
    """Ratios are taken within rounds, so that a drift by a factor of 100 cancels."""

    def drifting(factor: float) -> Callable[[], float]:
        return lambda: factor * (1 + 0.1 * clock.now)

    arms = [worker(harness, clock, name, drifting(f)) for name, f in (("a", 1.0), ("b", 0.5))]
    (found,) = harness.compare(bench, "case", arms)
    assert found.timings[1].ratio == pytest.approx(2, rel=0.5)
    assert max(found.timings[0].quartiles) > 10 * 1e3


def test_the_interval_covers_the_true_ratio_and_the_noise_is_measured(
    harness: ModuleType, bench: Any, clock: Clock
) -> None:
    rng = random.Random(1)

    def noisy(mean: float) -> Callable[[], float]:
        return lambda: mean * rng.lognormvariate(0, 0.1)

    held = 0
    for _ in range(20):
        arms = [worker(harness, clock, "a", noisy(2.0)), worker(harness, clock, "b", noisy(1.0))]
        (found,) = harness.compare(bench, "case", arms)
        low, high = found.timings[1].interval
        held += low <= 2.0 <= high
        assert 0.01 < found.noise < 0.4
    assert held >= 15


def test_the_gate_refuses_a_wrong_arm(harness: ModuleType, bench: Any, clock: Clock) -> None:
    right = worker(harness, clock, "right", 1.0)
    for wrong in (
        worker(harness, clock, "wrong", 1.0, value=1.001),
        worker(harness, clock, "wrong", 1.0, value=float("nan")),
        worker(harness, clock, "wrong", 1.0, alike=False, distance=lambda: 0.01),
        worker(harness, clock, "wrong", 1.0, distance=lambda: float("nan")),
    ):
        with pytest.raises(
            harness.GateError, match=r"case: wrong is off by .*, allowed is 1e-05; no time is reported"
        ):
            harness.compare(bench, "case", [right, wrong])
    with pytest.raises(AssertionError, match="has no gate"):
        harness.compare(bench, "case", [right, worker(harness, clock, "other", 1.0, alike=False)])


def test_the_gate_checks_the_effect_of_the_first_call(harness: ModuleType, bench: Any) -> None:
    """Two calls are compared: a wrong update shows in the second."""

    def stepping(step: float) -> Callable[[], torch.Tensor]:
        state = torch.tensor([1.0])

        def run() -> torch.Tensor:
            result = state.clone()
            state.mul_(step)
            return result

        return run

    arms = [harness.Arm(str(step), stepping(step)) for step in (1.0, 1.1)]
    with pytest.raises(harness.GateError):
        harness.compare(bench, "case", arms)


def test_the_chosen_arms_are_measured_again(harness: ModuleType, bench: Any, clock: Clock) -> None:
    times = {"x NCHW": 2.0, "x NHWC": 1.0, "y NCHW": 1.0, "y NHWC": 4.0}
    arms = [worker(harness, clock, name, seconds) for name, seconds in times.items()]
    chosen = []

    def choose(seconds: dict[str, float]) -> list[str]:
        assert seconds == pytest.approx(times)
        chosen.append(clock.now)
        return ["x NHWC", "y NCHW"]

    (found,) = harness.compare(bench, "case", arms, choose=choose)
    assert [t.arm for t in found.timings] == ["x NHWC", "y NCHW"]
    assert found.baseline == "x NHWC"
    assert clock.now - chosen[0] == pytest.approx(11 * 3.0)  # 11 rounds with both and the second baseline


def test_short_time_reduces_the_rounds_but_not_below_five(
    harness: ModuleType, bench: Any, clock: Clock
) -> None:
    arms = [worker(harness, clock, "a", 1.0), worker(harness, clock, "b", 1.0)]
    for seconds, rounds in ((1000, 11), (6 + 3 * 8, 8), (6, 5)):
        clock.now = 0.0
        (found,) = harness.compare(replace(bench, share=seconds), "case", arms)  # 6 s: gate and first round
        assert found.rounds == rounds
    clock.now = 0.0
    with pytest.raises(harness.OutOfTimeError, match="case: 5 rounds need 15 s, 14 s are left"):
        harness.compare(replace(bench, deadline=20), "case", arms)


def test_a_suite_stops_before_its_deadline_and_lists_what_it_left_out(
    harness: ModuleType, script: Script, bench: Any, clock: Clock
) -> None:
    run = script("run")
    arms = [worker(harness, clock, "a", 1.0), worker(harness, clock, "b", 1.0)]
    cases = [
        harness.Case(n, (n,), lambda b, n=n: harness.compare(b, n, arms)) for n in ("one", "two", "three")
    ]
    timed = replace(bench, deadline=50.0)
    comparisons, wrong = run.measure(timed, cases)
    assert clock.now <= 50.0
    assert [c.case for c in comparisons] == ["one", "two"]
    assert timed.skipped == ["three: 5 rounds need 15 s, 2 s are left"]
    assert not wrong


def test_a_case_with_disagreeing_arms_does_not_stop_the_others(
    harness: ModuleType, script: Script, bench: Any, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")

    def case(name: str, value: float) -> Any:
        arms = [worker(harness, clock, "a", 1.0), worker(harness, clock, "b", 1.0, value=value)]
        return harness.Case(name, (name,), lambda b: harness.compare(b, name, arms))

    comparisons, wrong = run.measure(bench, [case("bad", 2.0), case("good", 1.0)])
    assert wrong
    assert [c.case for c in comparisons] == ["good"]
    assert bench.skipped == ["wrong: bad: b is off by 1.0e+00, allowed is 1e-05; no time is reported"]
