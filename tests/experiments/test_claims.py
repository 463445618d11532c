"""docs/claims.md: written from committed results, and every quoted number is in the file that it names."""

import json
from pathlib import Path

import pytest

from experiments.catalog import experiment
from experiments.claim_list import CLAIMS, NOT_RUN, Evidence
from experiments.claims import PAGE, _mark, evidence_for, findings, judge_again, table
from experiments.verdicts import FAILS, HOLDS, UNDECIDED

ROOT = Path(__file__).parents[2]
ALL = [claim for claims in CLAIMS.values() for claim in claims]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == table()


def test_committed_results_are_judged_by_todays_rules(tmp_path):
    results = ROOT / "experiments" / "results"
    for name in ("depth.json", "contrastive.json"):
        (tmp_path / name).write_bytes((results / name).read_bytes())
    judge_again(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in ("depth", "contrastive") for kind in ("json", "md", "png")
    }
    for path in tmp_path.glob("*.[jm]*"):
        assert path.read_text(encoding="utf-8") == (results / path.name).read_text(encoding="utf-8")


def test_a_verdict_on_an_arm_whose_best_rate_is_at_an_end_is_marked():
    at_edge = {"a.md": {"NF + AGC": True, "BN": False, "NF": False}}
    marks = {
        numbers: _mark(Evidence(numbers=numbers, page="a.md"), at_edge)
        for numbers in ("NF + AGC against BN: 1", "NF against BN: 1")
    }
    assert list(marks.values()) == [" †", ""]
    assert _mark(Evidence(numbers="NF + AGC", page="b.md"), at_edge) == ""


@pytest.mark.parametrize("claim", [c for c in ALL if c.known], ids=lambda c: c.key)
def test_quotes_are_in_the_committed_file(claim):
    text = (ROOT / claim.known.page).read_text(encoding="utf-8")
    assert claim.known.quotes
    assert all(quote in text for quote in claim.known.quotes)


def test_a_finished_experiment_fills_its_claims_and_the_others_are_not_run(tmp_path):
    assert findings(tmp_path) == {}
    content = {
        "findings": [{"claim": "sam", "verdict": FAILS, "numbers": "-1.0"}],
        "command": "python -m x",
        "seeds": 3,
        "machine": "m",
    }
    (tmp_path / "optimizers.json").write_text(json.dumps(content))
    text = table(tmp_path)
    assert "| SAM helps with AGC | [B] table 3 | **does not hold** | -1.0 | `python -m x`" in text
    other = next(claim for claim in ALL if claim.key == "muon-agc")
    assert evidence_for(other, findings(tmp_path)).verdict == NOT_RUN
    assert len({claim.key for claim in ALL}) == len(ALL)
    assert {evidence_for(claim, findings(tmp_path)).verdict for claim in ALL} <= {
        HOLDS,
        FAILS,
        UNDECIDED,
        NOT_RUN,
    }


def test_each_claim_that_does_not_hold_has_a_reason():
    found = findings(ROOT / "experiments" / "results")
    with_verdict = {claim.key: evidence_for(claim, found).verdict for claim in ALL}
    failed = {key for key, verdict in with_verdict.items() if verdict == FAILS}
    waiting = {key for key, verdict in with_verdict.items() if verdict == NOT_RUN}
    assert {claim.key for claim in ALL if claim.reason} - waiting == failed - waiting


def test_the_earlier_figure_is_judged_by_todays_rule():
    found = findings(ROOT / "experiments" / "results")
    shared = found["batch_size_shared_rate", "agc-large-batch-shared"]
    assert shared.verdict == UNDECIDED  # -1, the margin, is in the interval
    assert "-1.5 (-2.3 to -0.7)" in shared.numbers
    assert experiment("batch_size", "cpu").seeds == 5
