"""Goal 6 in small numbers: signals, and ends of ranks, workers and launchers."""

import pytest

from reliability import signals
from reliability.runs import PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("case", list(signals.cases(8)), ids=lambda case: case.name)
def test_a_signal_or_the_end_of_another_process_loses_nothing(case, monkeypatch):
    monkeypatch.setattr(signals, "LIMIT", PATIENCE)  # tests do not depend on the speed of the machine
    result = case.run()
    assert (result.passed, result.wanted) == (1, 1), result.detail
