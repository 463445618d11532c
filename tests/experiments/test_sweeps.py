"""The smallest setting of each sweep runs, and its page, its choice and its rules follow their laws."""

import json
from dataclasses import replace

import pytest

from experiments.catalog import SWEEPS, experiment
from experiments.claim_list import CLAIMS
from experiments.classify import Settings
from experiments.sweep import Table, training_seconds
from experiments.verdicts import FAILS, HOLDS, MARGIN, UNDECIDED, Scores, comparison_text


@pytest.mark.parametrize("name", SWEEPS)
def test_the_smallest_setting_runs_and_its_page_is_made_from_its_json(name, reported, setup):
    sweep, done, page, folder = reported(name)
    assert len(done) == len(sweep.all_cells())
    found = json.loads((folder / f"{name}_tiny.json").read_text())
    assert found["complete"]
    claims = {claim.key for section in CLAIMS.values() for claim in section if claim.experiment == name}
    assert {finding["claim"] for finding in found["findings"]} == claims
    assert (folder / f"{name}_tiny.md").read_text() == page
    assert (folder / f"{name}_tiny.png").stat().st_size > 5_000
    assert f"python -m experiments.run --only {name} --preset tiny" in page
    for row in found["cells"]:
        assert row["status"] == "done"
        assert 0 <= row["top1"] <= 100
        assert row["cpu_seconds"] > 0
    # the test images were opened once, by the report
    tests = sorted(setup.folder.glob(f"{name}/*/test.json"))
    assert len(tests) == len(found["cells"])
    before = [path.stat().st_mtime_ns for path in tests]
    assert sweep.report(done, setup, folder) == page
    assert [path.stat().st_mtime_ns for path in tests] == before


def test_other_test_sizes_and_averaged_weights_have_columns(reported):
    assert "| at 16 px | at 20 px | at 24 px | at 32 px |" in reported("transfer")[2]
    assert "| averaged weights |" in reported("optimizers")[2]


def test_the_test_images_stay_closed_until_all_cells_are_finished(reported, setup, tmp_path):
    sweep, done, _, _ = reported("skip_gain")
    sweep = replace(sweep, seeds=sweep.seeds + 1)
    page = sweep.report(done, setup, tmp_path)
    assert (
        f"{len(done)} of {len(sweep.all_cells())} cells are finished; the test images were not opened."
        in page
    )
    assert json.loads((tmp_path / "skip_gain_tiny.json").read_text())["findings"] == []


def test_the_best_candidate_on_the_choice_images_is_used_and_a_diverged_one_never(setup):
    sweep = experiment("batch_size", "cpu")
    arm, point = "NF", "32"
    tried = [cell for _, cell in sweep.tried(arm, point)]
    done = {
        cell: {"status": "done", "choice_top1": score}
        for cell, score in zip(tried, (50.0, 60.0, 60.0), strict=False)
    }
    assert sweep.chosen(arm, point, done) is None  # one is missing
    done[tried[3]] = {"status": "diverged"}
    assert sweep.chosen(arm, point, done) == {"rate": 0.2}
    assert {c.seed for c in tried} == {100}
    table = [cell for cell in sweep.cells(done) if not cell.chooses]
    assert {(cell.arm, cell.point) for cell in table} == {(arm, point)}
    assert {cell.options["training"]["rate"] for cell in table} == {0.2}


def test_arms_differ_only_in_what_they_state():
    sweep = experiment("batch_size", "cpu")
    nf, agc, bn = (sweep.settings(arm, "128", {"rate": 0.4}) for arm in ("NF", "NF + AGC", "BN"))
    assert replace(agc, clip="off") == nf == replace(bn, method="nf")
    assert agc.peak == pytest.approx(0.4 * 128 / 256)
    assert experiment("transfer", "cpu").settings("BN", "48", {}).size == 48


def test_a_misspelled_setting_is_refused():
    with pytest.raises(ValueError, match="unknown setting 'bacth'"):
        Settings().changed({"bacth": 3})
    with pytest.raises(ValueError, match="unknown clip"):
        Settings(clip="agcc")


def test_estimated_time_grows_with_work():
    base = training_seconds(Settings())
    assert training_seconds(Settings(epochs=20.0)) == pytest.approx(2 * base, rel=0.01)
    assert training_seconds(Settings(size=64)) > base
    assert training_seconds(Settings(batch=2)) > 3 * base
    assert training_seconds(Settings(sam=0.1)) == pytest.approx(1.2 * base)


# --- the rules ----------------------------------------------------------------------------------------------


def table(name, scores, **more):
    """Return the table of a sweep with scores by (arm, point); None is a diverged run."""
    sweep = experiment(name, "cpu")
    rows = [
        {
            "arm": arm,
            "point": point,
            "seed": seed,
            "status": "diverged" if score is None else "done",
            "top1": score,
            **more.get(arm, {}),
        }
        for (arm, point), own in scores.items()
        for seed, score in enumerate(own)
    ]
    tried = [
        {
            "arm": arm,
            "point": "512",
            "tried": [{"changes": {"rate": rate}, "status": status} for rate, status in own],
        }
        for arm, own in (
            ("NF", [(0.2, "done"), (0.4, "diverged")]),
            ("NF + AGC", [(0.4, "done"), (0.8, "done")]),
        )
    ]
    return sweep, Table(sweep, rows, tried=tried)


def verdicts(name, scores, **more):
    sweep, found = table(name, scores, **more)
    return {finding.claim: finding.verdict for finding in sweep.decide(found)}


GOOD, NEAR, LOW, LOST = [58.0, 59.0, 60.0], [58.1, 58.9, 60.1], [50.0, 51.0, 52.0], [None, None, 40.0]


@pytest.mark.parametrize(
    ("nf", "agc", "expected"),
    [
        (LOST, NEAR, {"nf-large-batch": HOLDS, "agc-large-batch": HOLDS, "agc-gain": HOLDS}),
        (LOW, NEAR, {"nf-large-batch": HOLDS, "agc-large-batch": HOLDS, "agc-gain": HOLDS}),
        (NEAR, NEAR, {"nf-large-batch": FAILS, "agc-large-batch": HOLDS, "agc-gain": FAILS}),
        (LOST, LOW, {"nf-large-batch": HOLDS, "agc-large-batch": FAILS, "agc-gain": HOLDS}),
        (
            [50.0, 59.0, 66.0],
            GOOD,
            {"nf-large-batch": UNDECIDED, "agc-large-batch": HOLDS, "agc-gain": UNDECIDED},
        ),
    ],
)
def test_the_rule_on_batch_size(nf, agc, expected):
    scores = {
        ("BN", "512"): GOOD,
        ("NF", "512"): nf,
        ("NF + AGC", "512"): agc,
        ("BN", "32"): GOOD,
        ("NF", "32"): NEAR,
    }
    found = verdicts("batch_size", scores)
    assert {claim: found[claim] for claim in expected} == expected
    assert found["agc-rates"] == HOLDS
    assert found["nf-competitive"] == HOLDS


def test_the_rule_on_depth():
    signals = {
        arm: {"signal_before": {"cosine": [0.1, cosine], "variance": [1.0, variance]}}
        for arm, cosine, variance in (
            ("NF", 0.1, 1.5),
            ("no weight standardization", 0.95, 0.1),
            ("nothing", 0.9, 1e6),
        )
    }
    scores = {
        (arm, "218"): own
        for arm, own in (
            ("NF", GOOD),
            ("BN", NEAR),
            ("no weight standardization", LOW),
            ("nothing", [10.0, 12.0, 11.0]),
            ("SkipInit", LOW),
            ("FixUp", NEAR),
        )
    }
    scores[("NF", "56")] = NEAR
    assert verdicts("depth", scores, **signals) == {
        "nf-deep": HOLDS,
        "nf-bn-deep": HOLDS,
        "mean-shift": HOLDS,
        "explosion": HOLDS,
        "nf-skipinit-fixup": FAILS,
    }


def test_the_rule_on_lambda():
    arms = {f"λ {value:g}": LOW for value in (0.01, 0.02, 0.04, 0.08, 0.16)}
    scores = {(arm, "32"): own for arm, own in {**arms, "λ 0.16": GOOD, "none": GOOD}.items()}
    scores |= {(arm, "512"): own for arm, own in {**arms, "λ 0.02": GOOD, "none": LOST}.items()}
    assert verdicts("clipping_factor", scores) == {
        "lambda-batch": HOLDS,
        "small-lambda": HOLDS,
        "no-clipping": HOLDS,
    }
    scores[("λ 0.16", "512")] = [58.1, 59.1, 60.1]
    assert verdicts("clipping_factor", scores)["lambda-batch"] == FAILS


def test_divergence_is_counted_and_never_averaged():
    rows = [
        {
            "arm": "a",
            "point": "",
            "seed": seed,
            "status": "diverged" if score is None else "done",
            "top1": score,
        }
        for seed, score in enumerate([50.0, None, 52.0])
    ]
    scores = Scores(rows)
    assert scores.text("a") == "51.0 ± 1.4 (1 of 3 diverged)"
    assert scores.mean("a") is None
    assert scores.compare(("a", ""), ("a", "")) is None
    assert comparison_text(None) == "–"
    assert MARGIN == 1.0
