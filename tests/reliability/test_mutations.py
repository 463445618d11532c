"""The list of mutations fits the code, and a mutation is noticed or reported."""

import re
from pathlib import Path

import pytest

from reliability import mutations
from reliability.mutations import MUTATIONS, Mutation, noticed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_entry_names_a_line_and_a_test_that_exist(mutation):
    assert (ROOT / "normfree" / mutation.file).read_text(encoding="utf-8").count(mutation.line) == 1
    file, _, test = mutation.test.partition("::")
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), flags=re.M)


def test_names_are_unique():
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.slow
def test_a_protection_taken_out_is_noticed_and_a_change_of_a_comment_is_not(monkeypatch):
    monkeypatch.setattr(mutations, "passes", lambda test: 20.0)
    (real,) = [mutation for mutation in MUTATIONS if mutation.name == "a CSV has no formulas"]
    assert noticed(real).passed == 1
    harmless = Mutation("harmless", real.file, '"""Atomic writes, in which', '"""Writes, in which', real.test)
    result = noticed(harmless)
    assert (result.passed, result.detail) == (0, f"{real.test} passes without it")
