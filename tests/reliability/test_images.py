"""Goal 3 in small numbers: each malformed image is named with a reason and a fix, no good one is accused."""

import operator
import os
import random
import time
import warnings

import pytest

from normfree.data.audit import BadImage
from reliability import images
from reliability.children import call, watched
from reliability.image_kinds import KINDS, write


def test_there_are_many_kinds_that_cannot_be_used_and_many_that_can():
    bad = [kind for kind, made in KINDS.items() if made.reason]
    assert len(bad) >= 40
    assert len(KINDS) - len(bad) >= 30


def test_one_image_of_each_kind_gets_the_right_verdict(tmp_path):
    paths = {kind: write(kind, tmp_path, random.Random(kind)) for kind in KINDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow
        found = images.verdicts(tmp_path, [path.name for path in paths.values()])
    wrong = {
        kind: images.complaints(kind, str(paths[kind]), bad)
        for kind, (bad, _) in zip(KINDS, found, strict=True)
    }
    assert {kind: texts for kind, texts in wrong.items() if texts} == {}


@pytest.mark.parametrize(("kind", "text"), [("ZIP", "not named"), ("JPEG", "accused: the file is empty")])
def test_a_wrong_verdict_is_noticed(kind, text):
    found = BadImage("a.jpg", "the file is empty") if kind == "JPEG" else None
    assert images.complaints(kind, "a.jpg", found) == [text]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(images.cases(3)), ids=lambda case: case.name)
def test_a_folder_of_all_kinds(case):
    result = case.run()
    assert result.passed == result.wanted == len(KINDS), result.detail


def test_the_end_of_a_call_in_another_process_is_reported():
    assert call(divmod, 7, 3).value == (2, 1)
    wrong = call(int, "x")
    assert (wrong.error, wrong.text) == ("ValueError", "invalid literal for int() with base 10: 'x'")
    assert call(time.sleep, 600, patience=0.5).error == "hangs"
    assert call(os.abort).error == "killed"
    assert call(operator.mul, b"x", 300_000_000).memory > 250_000_000


def test_files_that_another_process_opens_are_noticed(tmp_path):
    (tmp_path / "secret").write_text("1")
    with watched(tmp_path) as events:
        assert call((tmp_path / "secret").read_text).value == "1"
    assert events == ["secret"]
    with watched(tmp_path) as events:
        (tmp_path / "secret").stat()
    assert events == []
