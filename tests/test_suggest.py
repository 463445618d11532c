"""Error messages have three parts, and suggestions name the most similar known name."""

import doctest

import pytest

from normfree import suggest
from normfree.suggest import closest, did_you_mean, problem, some_names, unknown


def test_the_examples_run() -> None:
    assert doctest.testmod(suggest).failed == 0


@pytest.mark.parametrize(
    ("name", "expected"), [("agx", "agc"), ("NORM", None), ("xyz", None), ("", None), ("agc", "agc")]
)
def test_the_closest_name(name: str, expected: str | None) -> None:
    assert closest(name, ["agc", "norm", "value"]) == expected
    assert did_you_mean(name, ["agc", "norm", "value"]) == (
        f" Did you mean {expected!r}?" if expected else ""
    )


def test_known_names_may_be_an_iterator() -> None:
    assert unknown("mode", "agx", iter(["agc", "norm"])) == unknown("mode", "agx", ["agc", "norm"])
    assert some_names(iter("abc"), limit=3) == "'a', 'b', 'c'"


def test_a_long_list_of_names_is_cut() -> None:
    assert some_names("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
    assert some_names([]) == ""


def test_each_part_of_a_problem_is_one_sentence() -> None:
    assert problem("x is 3") == "x is 3."
    assert problem("x is 3.", allowed="1") == "x is 3. Allowed: 1."
    assert problem("is x 3?", fix="pass x=1.") == "is x 3? Fix: pass x=1."
