"""Goals 8 and 9 in small numbers: NaN and Inf are never stored, and nothing grows or is left."""

import pytest

from reliability import finite, memory


@pytest.mark.slow
@pytest.mark.parametrize("case", list(finite.cases(20)), ids=lambda case: case.name)
def test_nothing_that_is_not_finite_is_stored(case):
    result = case.run()
    assert result.passed == result.wanted, result.detail


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixel", "average"])
def test_nan_in_one_rank_is_not_stored(kind):
    result = finite.spoiled(kind, float("nan"), "float32", 1)
    assert (result.passed, result.wanted) == (1, 1), result.detail


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_overflow_in_another_loop_changes_nothing(dtype):
    result = finite.overflow(dtype)
    assert result.passed == result.wanted, result.detail


@pytest.mark.slow
@pytest.mark.parametrize("workers", memory.WORKERS)
def test_nothing_grows_or_is_left(workers, monkeypatch):
    monkeypatch.setattr(memory, "SLOPE", 10.0)  # so few steps do not show a smaller one
    result = memory.flat(workers, steps=400)
    assert result.passed == result.wanted, result.detail
