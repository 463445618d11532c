"""Error messages have three parts, and suggestions name the most similar known name."""

import doctest
import re
import sys
import tomllib
from pathlib import Path

import pytest

import normfree
from normfree import suggest
from normfree.suggest import closest, did_you_mean, needs, problem, some_names, unknown


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


# --- missing packages ------------------------------------------------------------------------------------------


def test_a_missing_part_of_a_package_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json.decoder", None)
    with pytest.raises(ModuleNotFoundError) as caught, needs("a table", install="normfree[x]"):
        import json.decoder  # noqa: F401
    assert str(caught.value) == 'a table needs json, which is not installed. Fix: pip install "normfree[x]".'
    assert caught.value.name == "json"


def test_a_package_that_is_too_old_or_broken_is_named_with_the_reason() -> None:
    with pytest.raises(ImportError) as caught, needs("a table", install="normfree[x]"):
        from json import no_such_name  # noqa: F401
    assert not isinstance(caught.value, ModuleNotFoundError)
    assert re.match(
        r"a table needs json, which cannot be imported: cannot import name 'no_such_name'.*"
        r'Fix: pip install --upgrade "normfree\[x\]"\.',
        str(caught.value),
    )


def test_other_errors_pass() -> None:
    with pytest.raises(ValueError, match=r"^mine$"), needs("a table", install="normfree[x]"):
        raise ValueError("mine")


def test_every_extra_that_a_message_names_exists() -> None:
    root = Path(normfree.__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in (root / "normfree").rglob("*.py")}
    named = {
        (path, extra) for path, text in texts.items() for extra in re.findall(r"normfree\[(\w+)\]", text)
    }
    assert len(named) > 8
    assert [(path, extra) for path, extra in named if extra not in extras and path.stem != "suggest"] == []
