"""Growth: lines are fitted exactly, points off the line are named, and a tiny case of each kind runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

Script = Callable[[str], ModuleType]


def test_a_line_is_found_exactly_and_what_leaves_it_is_named(script: Script) -> None:
    growth, summary = script("growth"), script("summary")
    amounts = [1, 2, 4, 8, 16, 32, 64]
    assert growth.fitted_line(amounts, [5.0 + 3.0 * n for n in amounts]) == pytest.approx((5.0, 3.0))
    rng, times = random.Random(0), [5.0 + 3.0 * n for n in amounts[:-1]] + [2 * (5.0 + 3.0 * 64)]
    timings = tuple(
        summary.timing(str(n), [t], [8.0], rng, facts={"peak_mib": 10.0 + n})
        for n, t in zip(amounts, times, strict=True)
    )
    found = growth._with_line(summary.Comparison("case", "1", timings, 0.0, 1), amounts, "image")
    time, memory = found.notes
    assert "64 by +" in time
    assert memory == "case, memory: 10 MiB + 1 MiB per image; nowhere off by more than 10%"
    assert [t.facts["of_line"] > 1.1 for t in found.timings] == [False] * 6 + [True]


def test_steps_grow_in_memory(script: Script) -> None:
    growth, bench = script("growth"), script("harness").Bench(rounds=2, window_s=0.0)
    (found,) = growth.batch_case("nf_resnet_nano", 32, (1, 2, 4)).run(bench)
    peaks = [t.facts["peak_mib"] for t in found.timings]
    assert peaks == sorted(peaks)
    assert max(t.error for t in found.timings) <= growth.TOLERANCE


def test_batch_statistics_fail_the_gate(script: Script) -> None:
    growth = script("growth")
    net = growth.create_model("resnet_nano", drop_rate=0.0, stochdepth_rate=0.0, classifier_std=0.1).train()
    x, y = script("networks").batch(32, 4, torch.device("cpu"))
    assert growth.mixing(net, x, y) > 100 * growth.TOLERANCE


def test_visits_that_disagree_are_refused(script: Script) -> None:
    growth, harness = script("growth"), script("harness")
    bench, names = harness.Bench(rounds=3), {1: "one", 2: "two"}
    found = growth._visited(bench, "case", names, lambda key: (10.0 / key, torch.ones(2)))
    assert [t.ratio for t in found.timings] == [1.0, 2.0]
    assert (found.baseline, found.noise, found.rounds) == ("one", 0.0, 3)
    with pytest.raises(harness.GateError, match=r"case: .* give another result"):
        growth._visited(bench, "case", names, lambda key: (1.0, torch.full((2,), float(key))))


@pytest.mark.slow
def test_processes_and_workers(script: Script) -> None:
    growth, bench = script("growth"), script("harness").Bench(rounds=1)
    (found,) = growth.process_case("nf_resnet_nano", 32, (1, 2), 4, steps=2).run(bench)
    assert [t.arm for t in found.timings] == ["1 process of 1 thread", "2 processes of 1 thread"]
    pytest.importorskip("skimage", reason="scikit-image is missing; the extra bench has it")
    (found,) = growth.loader_case((0, 1), 3, 8).run(bench)
    assert [t.images for t in found.timings] == [24, 24]
