"""Goal 2 in small numbers: a run stopped after a step continues with the same bits."""

import pytest

from reliability import resume


@pytest.mark.slow
@pytest.mark.parametrize("case", list(resume.cases(3)), ids=lambda case: case.name)
def test_a_run_stopped_after_a_step_continues_with_the_same_bits(case):
    result = case.run()
    assert result.passed == result.wanted, result.detail


@pytest.mark.slow
def test_a_run_stopped_within_a_batch_of_two_epochs_continues_with_the_same_bits():
    result = resume.stopped_after(20, 1)
    assert (result.passed, result.wanted) == (1, 1), result.detail
