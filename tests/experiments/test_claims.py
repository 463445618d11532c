"""docs/claims.md: written from committed results, and every quoted number is in the file that it names."""

import json
from pathlib import Path

import pytest

from experiments.catalog import NAMES, experiment
from experiments.claim_list import CLAIMS, NOT_RUN
from experiments.claims import PAGE, evidence_for, findings, judge_again, table
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


def test_a_verdict_on_a_row_whose_best_rate_is_at_an_end_is_marked(tmp_path):
    tried = [{"changes": {"rate": rate}} for rate in (0.1, 0.2, 0.4)]
    best = {("SGD", ""): 0.2, ("SGD, SAM", ""): 0.4, ("SGD, AGC", ""): 0.1}
    chosen = [
        {"arm": arm, "point": point, "tried": tried, "best": {"rate": rate}}
        for (arm, point), rate in best.items()
    ]
    rows = {
        "sam-unclipped": [["SGD, SAM", ""], ["SGD", ""]],
        "ema": [["SGD", ""]],
        "sam": [["SGD, AGC", "1"]],
    }
    found = [{"claim": claim, "verdict": HOLDS, "numbers": "", "rows": own} for claim, own in rows.items()]
    content = {"findings": found, "chosen": chosen, "command": "", "seeds": 3, "machine": ""}
    (tmp_path / "optimizers.json").write_text(json.dumps(content))
    marked = {claim: own.at_end for (_, claim), own in findings(tmp_path).items()}
    assert marked == {"sam-unclipped": True, "ema": False, "sam": False}
    assert "| SAM helps without AGC | Foret et al. 2021 | **holds** † |" in table(tmp_path)


def test_the_rows_of_each_finding_are_those_of_its_table():
    """Else a rate at an end would not be marked."""
    for name in NAMES:
        path = ROOT / "experiments" / "results" / f"{name}.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        choices = getattr(experiment(name, "cpu"), "choices", None)
        for finding in content.get("findings", ()) if choices else ():
            rows = {tuple(row) for row in finding["rows"]}
            assert rows <= set(choices.rows), finding["claim"]
            assert rows or finding["seeds"] == 1, finding["claim"]


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
