"""Goal 4 in small numbers: hostile files are refused in one line, run nothing and touch nothing else."""

import pickle

import pytest

from reliability import hostile, payloads
from reliability.children import Outcome


def test_there_are_more_than_three_hundred_hostile_files():
    assert len(list(hostile.cases(1000))) > 300


@pytest.mark.slow
@pytest.mark.parametrize("case", list(hostile.cases(4)), ids=lambda case: case.name)
def test_a_hostile_file_is_refused(case):
    result = case.run()
    assert (result.passed, result.wanted) == (1, 1), result.detail


@pytest.mark.parametrize(
    "case",
    [case for case in hostile.cases(1000) if case.name in (
        "weights: header of 4 EB", "npz: pickle, os.system", "config.toml: a million deep", "shard: symbolic link",
        "table of images: one cell of 10 MB", "packed images: overlap", "metrics: pipe",
        "manifest of a checkpoint: link to a device", "samples of a run: sparse, 40 GB",
    )],
    ids=lambda case: case.name,
)  # fmt: skip
def test_a_hostile_file_of_a_fast_reader_is_refused(case):
    result = case.run()
    assert (result.passed, result.wanted) == (1, 1), result.detail


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "os.mkdir", "subprocess.getoutput", "timeit"])
def test_the_payloads_run_when_they_are_unpickled(name, tmp_path):
    site = payloads.Site(tmp_path / "a", tmp_path)
    pickle.loads(payloads.pickled(name, 2, site))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("outcome", "events", "wrong"),
    [
        (Outcome(error="ValueError", text="no"), [], []),
        (Outcome(value=[1]), [], ["was read: '[1]'"]),
        (Outcome(error="MemoryError"), [], ["MemoryError: ''"]),
        (Outcome(error="ValueError", text="a\nb"), [], [r"several lines: 'a\nb'"]),
        (Outcome(error="ValueError", seconds=6.0, memory=2 * 10**9), [], ["6.0 s, 2000 MB"]),
        (Outcome(error="ValueError"), ["secret"], ["touched 'secret' outside"]),
    ],
)
def test_what_is_wrong_is_noticed(outcome, events, wrong):
    assert hostile.complaints(outcome, events, sound=False) == wrong
