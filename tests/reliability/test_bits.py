"""Goal 5 in small numbers: flipped bits and cuts are noticed, or harmless."""

import random

import pytest

from reliability import bits


@pytest.mark.slow
@pytest.mark.parametrize("case", list(bits.cases(2)), ids=lambda case: case.name)
def test_damage_is_noticed_or_harmless(case):
    result = case.run()
    assert result.passed == result.wanted, result.detail


def test_damage_that_changes_what_is_read_is_reported(tmp_path):
    """A reader without checks misses most flips, so that the check can fail."""
    (tmp_path / "a").write_bytes(bytes(1000))
    assert len(bits.try_flips(lambda folder: (folder / "a").read_bytes(), tmp_path, 0, 20)) == 20
    assert bits.try_flips(lambda folder: len(list(folder.iterdir())), tmp_path, 0, 20) == []


def test_a_damage_is_one_bit_or_a_cut(tmp_path):
    kinds = set()
    for seed in range(30):
        (tmp_path / "a").write_bytes(b"\x0f" * 50)
        bits.damage(tmp_path / "a", random.Random(seed))
        data = (tmp_path / "a").read_bytes()
        kinds.add(len(data) < 50)
        flipped = sum((byte ^ 0x0F).bit_count() for byte in data)
        assert flipped == (len(data) == 50)
    assert kinds == {True, False}
