"""Laws of intervals, comparisons and the numbers of differential privacy."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from normfree.uncertainty import (
    accuracy_text,
    bootstrap_interval,
    compare_paired,
    mcnemar,
    mean_interval,
    normal_quantile,
    student_quantile,
    wilson_interval,
)

shares = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)
# Scores with few digits, so that sums of them are exact.
scores = st.lists(st.integers(-400, 400).map(lambda n: n / 4), min_size=2, max_size=8)
pairs = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=2, max_size=8)


@given(shares, confidences)
def test_an_interval_of_a_share_contains_it_and_is_within_0_and_1(share, confidence):
    hits, count = share
    low, high = wilson_interval(hits, count, confidence=confidence)
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= hits / count <= high + 1e-12
    assert high > low


@given(shares, confidences)
def test_the_interval_of_the_errors_mirrors_that_of_the_hits(share, confidence):
    hits, count = share
    low, high = wilson_interval(hits, count, confidence=confidence)
    mirrored = wilson_interval(count - hits, count, confidence=confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(shares, confidences)
def test_one_more_hit_moves_the_interval_up(share, confidence):
    hits, count = share
    assume(hits < count)
    before, after = (wilson_interval(h, count, confidence=confidence) for h in (hits, hits + 1))
    assert before.low <= after.low
    assert before.high <= after.high


@given(shares, st.integers(2, 50), confidences)
def test_more_images_of_the_same_accuracy_narrow_the_interval(share, times, confidence):
    hits, count = share
    few, many = (wilson_interval(k * hits, k * count, confidence=confidence) for k in (1, times))
    assert many.high - many.low < few.high - few.low


@given(shares, confidences, confidences)
def test_more_confidence_widens_the_interval(share, one, other):
    narrow, wide = (wilson_interval(*share, confidence=c) for c in sorted((one, other)))
    assert wide.low <= narrow.low + 1e-12
    assert narrow.high <= wide.high + 1e-12


@given(shares)
def test_the_text_of_an_accuracy_has_its_numbers(share):
    hits, count = share
    accuracy, low, high = (float(part) for part in accuracy_text(hits, count).replace("(", "").replace(")", "")
                           .replace(" to", "").split())  # fmt: skip
    assert 0 <= low <= accuracy <= high <= 100
    assert abs(accuracy - 100 * hits / count) <= 0.5


@given(scores, st.integers(-100, 100), st.sampled_from([0.5, 2.0, 4.0]), confidences)
def test_an_interval_of_a_mean_moves_and_scales_with_the_values(values, shift, scale, confidence):
    low, high = mean_interval(values, confidence=confidence)
    moved = mean_interval([scale * value + shift for value in values], confidence=confidence)
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-6)
    assert low <= sum(values) / len(values) <= high


@given(pairs, st.integers(0, 20))
def test_a_comparison_the_other_way_round_has_the_opposite_verdict(values, margin):
    one, other = zip(*values, strict=True)
    there, back = compare_paired(one, other, margin=margin), compare_paired(other, one, margin=margin)
    assert there.difference == pytest.approx(-back.difference, abs=1e-9)
    assert there.interval == pytest.approx((-back.interval.high, -back.interval.low), abs=1e-9)
    assert {"ahead": "behind", "behind": "ahead"}.get(there.verdict, there.verdict) == back.verdict
    assert there.smallest_gap == pytest.approx(back.smallest_gap)


@given(pairs, st.integers(1, 100), st.randoms())
def test_a_comparison_depends_on_differences_only_and_on_no_order(values, shift, random):
    one, other = zip(*values, strict=True)
    before = compare_paired(one, other, margin=1)
    mixed = random.sample(values, len(values))
    after = compare_paired([a + shift for a, _ in mixed], [b + shift for _, b in mixed], margin=1)
    assert after.verdict == before.verdict
    assert after.interval == pytest.approx(before.interval, abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30), st.integers(0, 20), st.randoms())
def test_mcnemar_is_a_probability_of_the_images_that_differ(images, more, random):
    one, other = [a for a, _ in images], [b for _, b in images]
    p = mcnemar(one, other)
    assert 0 < p <= 1
    assert mcnemar(other, one) == p
    mixed = random.sample([*images, *[(True, True)] * more], len(images) + more)
    assert mcnemar([a for a, _ in mixed], [b for _, b in mixed]) == p


@given(st.integers(1, 25))
def test_mcnemar_is_sure_of_images_that_differ_in_one_direction(count):
    assert mcnemar([True] * count, [False] * count) == min(1, 2 / 2**count)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(0, 9))
def test_a_bootstrap_interval_is_within_the_samples_and_the_same_for_a_seed(samples, seed):
    low, high = bootstrap_interval(samples, resamples=50, seed=seed)
    assert min(samples) - 1e-9 <= low <= high <= max(samples) + 1e-9
    assert bootstrap_interval(np.array(samples), resamples=50, seed=seed) == (low, high)


@given(st.floats(0.501, 0.999), st.integers(1, 200))
def test_student_quantiles_fall_with_the_freedom_to_the_normal_one(probability, freedom):
    here, more = (student_quantile(probability, f) for f in (freedom, freedom + 1))
    assert here >= more >= normal_quantile(probability) > 0


@given(st.floats(0.5, 0.999), st.floats(0.5, 0.999), st.integers(1, 50))
def test_student_quantiles_rise_with_the_probability(one, other, freedom):
    low, high = (student_quantile(p, freedom) for p in sorted((one, other)))
    assert low <= high


@given(st.floats(0.5, 0.999))
def test_student_quantiles_of_one_and_two_degrees_have_closed_forms(probability):
    assert student_quantile(probability, 1) == pytest.approx(
        math.tan(math.pi * (probability - 0.5)), abs=1e-9
    )
    centered = 2 * probability - 1
    expected = centered * math.sqrt(2 / (4 * probability * (1 - probability)))
    assert student_quantile(probability, 2) == pytest.approx(expected, abs=1e-9)


@given(
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(1, 200),
    st.integers(0, 200),
)
def test_privacy_that_is_spent_rises_with_steps_and_falls_with_noise(noise, more_noise, steps, more_steps):
    pytest.importorskip("opacus", reason="the accountants of private runs")
    from normfree.training.accounting import epsilon_of

    plan = {"delta": 1e-5, "sample_rate": 0.01, "accountant": "rdp"}
    spent = epsilon_of(noise, steps=steps, **plan)
    assert spent <= epsilon_of(noise, steps=steps + more_steps, **plan)
    assert epsilon_of(noise + more_noise, steps=steps, **plan) <= spent
    assert epsilon_of(noise, steps=0, **plan) == 0
    assert epsilon_of(0.0, steps=steps, **plan) == math.inf


@given(st.sampled_from([1.0, 3.0, 8.0]), st.integers(10, 500))
def test_the_noise_for_an_epsilon_spends_no_more_than_it(epsilon, steps):
    pytest.importorskip("opacus", reason="the accountants of private runs")
    from normfree.training.accounting import epsilon_of, noise_for

    plan = {"delta": 1e-5, "sample_rate": 0.02, "steps": steps, "accountant": "rdp"}
    assert epsilon_of(noise_for(epsilon, **plan), **plan) <= epsilon
    assert noise_for(math.inf, **plan) == 0
