"""Intervals cover what they promise, agree with SciPy, and verdicts follow the rule."""

import doctest

import numpy as np
import pytest

from normfree import uncertainty
from normfree.uncertainty import (
    accuracy_text,
    bootstrap_interval,
    compare_paired,
    mcnemar,
    mean_interval,
    student_quantile,
    wilson_interval,
)

scipy_stats = pytest.importorskip("scipy.stats")


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(uncertainty).failed == 0


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 100])
@pytest.mark.parametrize("probability", [0.5, 0.8, 0.975, 0.9999])
def test_quantiles_of_student_equal_those_of_scipy(probability, freedom):
    assert student_quantile(probability, freedom) == pytest.approx(
        scipy_stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (4, 4), (270, 374), (7, 5000), (1, 2)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_wilson_interval_equals_that_of_scipy(hits, count, confidence):
    expected = scipy_stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    found = wilson_interval(hits, count, confidence=confidence)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert hits / count in found


def test_an_interval_of_the_mean_contains_the_true_mean_as_often_as_it_promises():
    rng = np.random.default_rng(0)
    inside = [3.0 in mean_interval(rng.normal(3.0, 2.0, size=4).tolist()) for _ in range(2000)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_the_paired_comparison_equals_the_t_test_of_scipy_and_follows_the_rule():
    rng = np.random.default_rng(1)
    seen = set()
    for shift in (0.0, 0.05, 0.4, 2.0, -2.0):
        a, b = rng.normal(50, 3, 6), rng.normal(0, 0.5, 6)
        method, baseline = a + b + shift, a
        found = compare_paired(method.tolist(), baseline.tolist(), margin=0.8)
        result = scipy_stats.ttest_rel(method, baseline)
        expected = result.confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high))
        assert (found.verdict in ("ahead", "behind")) == (result.pvalue < 0.05)
        if found.verdict == "equal":
            assert max(map(abs, found.interval)) <= 0.8
        seen.add(found.verdict)
    assert {"ahead", "behind"} <= seen
    assert compare_paired([1.0, 1.1, 0.9], [1.0, 1.0, 1.0], margin=1.0).verdict == "equal"
    assert compare_paired([1.0, 4.0], [2.0, 1.0], margin=1.0).verdict == "undecided"


def test_the_smallest_gap_is_found_in_eight_of_ten_experiments():
    """The gap is estimated from the spread of each experiment; on average it has the promised power."""
    rng = np.random.default_rng(2)
    noise = rng.normal(0, 1, (500, 8))
    gap = np.mean([compare_paired(row.tolist(), [0.0] * 8, margin=1).smallest_gap for row in noise])
    found = [compare_paired((row + gap).tolist(), [0.0] * 8, margin=1).verdict == "ahead" for row in noise]
    assert 0.74 < np.mean(found) < 0.9


def test_mcnemar_equals_the_binomial_test_on_the_images_that_differ():
    rng = np.random.default_rng(3)
    first, second = rng.random(200) < 0.7, rng.random(200) < 0.6
    only = int((first & ~second).sum()), int((second & ~first).sum())
    expected = scipy_stats.binomtest(only[0], sum(only)).pvalue
    assert mcnemar(first.tolist(), second.tolist()) == pytest.approx(expected)
    assert mcnemar([True, False], [True, False]) == 1.0


def test_the_bootstrap_keeps_columns_paired():
    rng = np.random.default_rng(4)
    base = rng.normal(0, 10, 200)
    scores = np.stack([base, base + 1 + rng.normal(0, 0.1, 200)], axis=1)

    def difference(rows):
        return rows[:, 1].mean() - rows[:, 0].mean()

    low, high = bootstrap_interval(scores, difference, resamples=500)
    assert 0.95 < low < 1.0 < high < 1.05  # unpaired, it would be wider than 2
    assert bootstrap_interval(scores, difference, resamples=50) == bootstrap_interval(
        scores, difference, resamples=50
    )


def test_the_text_of_an_accuracy_has_as_many_digits_as_the_images_allow():
    assert accuracy_text(4, 4) == "100 (51 to 100)"
    assert accuracy_text(38210, 50000) == "76.42 (76.05 to 76.79)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(0, 0), r"^0 of 0 answers are correct\. Allowed: 0 to all of 1 or more\.$"),
        (lambda: wilson_interval(3, 2), r"^3 of 2 answers"),
        (lambda: mean_interval([1.0]), r"^1 values\. Allowed: two or more\. Fix: run more seeds\.$"),
        (lambda: compare_paired([1.0, 2.0], [1.0], margin=1), r"^2 scores of the method and 1"),
        (lambda: mcnemar([True], []), r"^1 and 0 images"),
        (lambda: bootstrap_interval([]), r"^there are no samples"),
        (lambda: student_quantile(0.3, 3), r"^probability 0\.3"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
