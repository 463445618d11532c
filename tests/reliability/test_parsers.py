"""Goal 12 in small numbers: any bytes are accepted or refused, and no other error comes out of a parser."""

import random

import pytest

from reliability import fuzz
from reliability.goals import Result
from reliability.parsers import CORPUS, PARSERS, Parser, accepts, inputs


@pytest.mark.filterwarnings("ignore")  # of Pillow
@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_takes_any_bytes(name):
    for data in inputs(name):
        accepts(name, data)
    fuzz.changed_at_random(name, 60, seed=1)


@pytest.mark.parametrize(
    "name", sorted(set(PARSERS) - {"manifest", "checksums", "model"})
)  # these state digests or networks
def test_the_valid_inputs_are_accepted(name):
    assert all(accepts(name, data) for data in PARSERS[name].seeds())


def test_the_corpus_belongs_to_parsers_and_is_small():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(PARSERS)
    assert sum(path.stat().st_size for path in files) < 300_000


def test_an_error_of_another_kind_is_noticed(monkeypatch):
    monkeypatch.setitem(PARSERS, "json", Parser(lambda data: data[100], lambda: [b"abc"]))
    with pytest.raises(IndexError):
        fuzz.changed_at_random("json", 5)


def test_changes_are_the_same_for_the_same_seed():
    assert [fuzz.changed(b"abc", random.Random(1)) for _ in range(2)] == 2 * [
        fuzz.changed(b"abc", random.Random(1))
    ]


@pytest.mark.slow
def test_a_guided_run_executes_its_inputs_and_an_error_of_another_kind_ends_it(monkeypatch):
    pytest.importorskip("atheris", reason="the extra `fuzz` is not installed")
    monkeypatch.setattr(fuzz, "PART", 200)
    assert fuzz.fuzzed("json", 1) == Result(200, 200)
    assert fuzz.fuzzed("no-such-parser", 1).passed == 0
