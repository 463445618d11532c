"""Results survive a round trip through their file; pages keep their text; the table of docs/results.md is current."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]


@pytest.fixture
def result(script: Script) -> Any:
    report, summary, machine = script("report"), script("summary"), script("machine")
    rng = random.Random(0)
    timings = (
        summary.timing("timm NCHW", [200.0, 220.0, 210.0], [200.0, 220.0, 210.0], rng, images=8),
        summary.timing("normfree NHWC", [100.0, 110.0, 105.0], [200.0, 220.0, 210.0], rng, images=8,
                         facts={"compile_s": 12.0}),
    )  # fmt: skip
    floor = summary.Floor(50.0, "its bytes")
    comparison = summary.Comparison("a case", "timm NCHW", timings, 0.04, 3, floor=floor, notes=("a note",))
    ceilings = machine.Ceilings(20.0, 150.0, "float32")
    facts = machine.facts(torch.device("cpu"))
    return report.Result(
        "suite", "What was done.", "python -m benchmarks.run suite", facts, ceilings, ceilings, 12.0, (comparison,),
        ("another case: no time left",),
    )  # fmt: skip


def test_a_result_survives_its_file(script: Script, result: Any, tmp_path: Path) -> None:
    report = script("report")
    for capability, stem in (("AVX2", "suite"), ("AVX512", "suite_avx512"), ("AVX512_VNNI", "suite_avx512")):
        own = replace(result, machine=result.machine | {"capability": capability})
        page = report.write(own, tmp_path)
        assert report.read(tmp_path / f"{stem}.json") == own
        assert page == tmp_path / f"{stem}.md"


def test_the_page_has_figures_lower_bounds_facts_and_skipped_cases(script: Script, result: Any) -> None:
    text = script("report").page(result)
    row = "| a case | normfree NHWC | 105.0 (100.0 … 110.0) | 76 | 12 | 48% | 2.00 (2.00 … 2.00) | 3 |"
    assert row in text.splitlines()
    assert "floor: its bytes | 50" in text
    assert "\n\n- a note\n" in text
    assert "Left out:\n\n- another case: no time left" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "20.0 GB/s, 150 GFLOP/s float32 and 20.0" in text


def test_the_page_keeps_everything_outside_the_comments(script: Script) -> None:
    page = script("results_page")
    text = f"before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n"
    made = page.between(text, "| new |")
    assert made == f"before\n\n{page.BEGIN}\n| new |\n{page.END}\n\nafter\n"
    assert page.between(made, "| new |") == made
    assert page.between(made, "old") == text


@pytest.mark.parametrize("text", ["", "{0}", "{1}", "{1} {0}", "{0} {0} {1}", "{0} {1} {1}"])
def test_a_page_without_the_comments_is_an_error(script: Script, text: str) -> None:
    page = script("results_page")
    with pytest.raises(ValueError, match=r"results.md: the table goes between"):
        page.between(text.format(page.BEGIN, page.END), "| new |")


def test_a_pick_becomes_a_row_with_ratio_interval_and_command(
    script: Script, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, report = script("results_page"), script("report")
    avx2 = replace(
        result, machine=result.machine | {"capability": "AVX2", "cpu": "A", "torch": "2", "date": "today"}
    )
    report.write(avx2, tmp_path)
    picks = (page.Pick("suite", "a case", "what it is"), page.Pick("suite", "no such case", "never"))
    monkeypatch.setattr(page, "PICKS", picks)
    shown = (
        "2.00 (2.00 … 2.00): 105 ms (normfree NHWC), 210 ms (timm NCHW); [all](../benchmarks/results/{}.md)"
    )
    command = "`python -m benchmarks.run suite`"
    *_, row, empty, processor = page.table(tmp_path).splitlines()
    assert row == f"| what it is | {shown.format('suite')} | not measured | not measured | {command} |"
    assert (empty, processor) == ("", "AVX2: A, torch 2, today.")
    report.write(replace(avx2, machine=avx2.machine | {"capability": "AVX512"}), tmp_path)
    assert f"| {shown.format('suite')} | {shown.format('suite_avx512')} |" in page.table(tmp_path)
    for noise, mark in ((0.3, ""), (0.4, " ~")):  # of a difference of 1.00
        noisy = replace(avx2, comparisons=tuple(replace(c, noise=noise) for c in avx2.comparisons))
        report.write(noisy, tmp_path)
        assert f"| 2.00 (2.00 … 2.00){mark}: 105 ms" in page.table(tmp_path)


def test_an_arm_that_is_not_the_baseline_is_compared_by_medians(
    script: Script, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, report = script("results_page"), script("report")
    (case,) = result.comparisons
    other = replace(case.timings[0], arm="NNCF", median=84.0)
    case = replace(case, timings=(*case.timings, other))
    report.write(
        replace(
            result, comparisons=(case,), machine=result.machine | {"capability": "AVX2", "date": "today"}
        ),
        tmp_path,
    )
    monkeypatch.setattr(page, "PICKS", (page.Pick("suite", "a case", "what it is", theirs="NNCF"),))
    assert "| 0.80 (of medians): 105 ms (normfree NHWC), 84 ms (NNCF);" in page.table(tmp_path)


def test_docs_results_has_the_table_of_the_results(script: Script) -> None:
    """The table is written by `make bench`, not edited by hand."""
    page, report = script("results_page"), script("report")
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.between(text, page.table(report.RESULTS)) == text
    assert len(page.table(report.RESULTS).splitlines()) <= 32
