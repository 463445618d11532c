"""Goal 1 in small numbers: runs that are killed at random instants end with the same bits."""

import pytest

from reliability import kill
from reliability.runs import FLAGS, differences, train, uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("case", list(kill.cases(6)), ids=lambda case: case.name)
def test_a_killed_run_ends_identical(case):
    result = case.run()
    assert result.passed == result.wanted == kill.KILLS, result.detail


def test_a_run_killed_once_ends_identical_and_another_seed_does_not(monkeypatch, tmp_path):
    monkeypatch.setattr(kill, "KILLS", 1)
    result = kill.killed_run(0, 1)
    assert (result.wanted, result.passed, result.detail) == (1, 1, "")
    whole, _ = uninterrupted()
    other = tmp_path / "run"
    assert train(other, flags=(*FLAGS, "--seed", "1")).wait() == [0]
    found = differences(whole, other)
    assert "model/model.safetensors: differs" in found
    assert "metrics.jsonl: differs" in found
    (whole / "left.partial").touch()
    assert "left.partial: only in one" in differences(whole, other)
    (whole / "left.partial").unlink()
