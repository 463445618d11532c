"""The harness of the laws counts those that hold, and names those that do not."""

import re

from reliability import properties


def test_the_laws_that_hold_are_counted_and_the_others_are_named(tmp_path):
    law = tmp_path / "test_one_laws.py"
    law.write_text(
        "from hypothesis import given, strategies as st\n\n"
        "@given(st.integers())\ndef test_an_integer_is_itself(n):\n    assert n == n\n\n"
        "@given(st.integers())\ndef test_an_integer_is_small(n):\n    assert n < 100\n",
        encoding="utf-8",
    )
    found = properties.tried(law, 1)
    assert (found.wanted, found.passed, found.detail) == (2, 1, "test_an_integer_is_small")


def test_a_file_that_is_no_test_is_a_failed_check(tmp_path):
    law = tmp_path / "test_two_laws.py"
    law.write_text("import no_such_module\n", encoding="utf-8")
    assert properties.tried(law, 1).passed == 0


def test_there_are_at_least_forty_laws():
    files = list(properties.LAWS.glob("test_*.py"))
    laws = [name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)]
    assert len(set(laws)) == len(laws) >= 40
    assert len({case.name for case in properties.cases(2)}) == 2 * len(files)
