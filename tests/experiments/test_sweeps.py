"""The smallest setting of each sweep runs, and its page, its choice and its rules follow their laws."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import classify
from experiments.candidates import edges, section
from experiments.catalog import SWEEPS, experiment
from experiments.claim_list import CLAIMS
from experiments.classify import Settings
from experiments.networks import build, measure_statistics_
from experiments.sweep import training_seconds
from normfree.data.source import ArraySource


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


def test_batch_norm_of_small_batches_is_also_scored_with_statistics_of_many_images(reported):
    sweep, _, page, folder = reported("small_batches")
    assert "| statistics measured again |" in page
    rows = json.loads((folder / "small_batches_tiny.json").read_text())["cells"]
    assert {row["arm"] for row in rows if "measured_top1" in row} == {"BN"}
    settings = sweep.settings("BN", "2", {})
    net = build(settings.base, "batch", classes=10, seed=0)
    norm = next(module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    pixels = np.random.default_rng(0).integers(0, 255, (250, 16, 16, 3), dtype=np.uint8)
    images = ArraySource(pixels, [0] * 250, classes=tuple("abcdefghij"), names=tuple(map(str, range(250))))
    measure_statistics_(net, classify.training_inputs(images, settings))
    assert len(seen) == 3
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0), rtol=1e-4, atol=1e-6)
    assert not any(module.training for module in net.modules())


def test_rates_at_the_edge_of_those_that_were_tried_are_named():
    sweep = experiment("batch_size", "cpu")
    tried = [{"changes": {"rate": rate}} for rate in (0.1, 0.2, 0.4)]
    chosen = [
        {"arm": arm, "point": "32", "tried": tried, "best": {"rate": rate}}
        for arm, rate in (("BN", 0.4), ("NF", 0.2), ("NF + AGC", 0.1))
    ]
    expected = [
        ("BN", " at batch 32 (rate 0.4, the largest)"),
        ("NF + AGC", " at batch 32 (rate 0.1, the smallest)"),
    ]
    assert edges(chosen, sweep.choices) == expected


def test_the_other_experiments_name_rates_at_the_edge_too():
    tried = [{"changes": {"rate": rate}, "status": "done", "top1": rate} for rate in (5.0, 15.0, 45.0)]
    for name, point, where in (("privacy", "3", " at epsilon 3"), ("contrastive", "", "")):
        choices = experiment(name, "cpu").choices
        chosen = [{"arm": "nf", "point": point, "tried": tried, "best": {"rate": 45.0}}]
        assert edges(chosen, choices) == [("nf", f"{where} (rate 45, the largest)")]
        assert any(
            "rate 5: 5.0; rate 15: 15.0; **rate 45: 45.0**" in line for line in section(chosen, choices)
        )


def test_a_value_is_at_the_edge_of_those_that_were_tried_with_the_same_other_values():
    sweep = experiment("batch_size", "cpu")
    grid = [(0.1, 0.02), (0.2, 0.02), (0.4, 0.02), (0.2, 0.08), (0.8, 0.08)]
    tried = [{"changes": {"rate": rate, "clipping": clipping}} for rate, clipping in grid]

    def found(rate, clipping):
        best = {"rate": rate, "clipping": clipping}
        entry = {"arm": "BN", "point": "32", "tried": tried, "best": best}
        return [where for _, where in edges([entry], sweep.choices)]

    assert found(0.4, 0.02) == [
        " at batch 32 (rate 0.4, the largest)"
    ]  # 0.8 was tried with another clipping only
    assert found(0.2, 0.02) == [" at batch 32 (λ 0.02, the smallest)"]
    assert len(found(0.2, 0.08)) == 2


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
    tried = [cell for _, cell in sweep.choices.tried(arm, point)]
    done = {
        cell: {"status": "done", "choice_top1": score}
        for cell, score in zip(tried, (40.0, 50.0, 60.0, 60.0, 30.0), strict=False)
    }
    assert sweep.choices.chosen(arm, point, done) is None  # one is missing
    done[tried[5]] = {"status": "diverged"}
    assert sweep.choices.chosen(arm, point, done) == {"rate": 0.2}
    assert {c.seed for c in tried} == {100}
    table = [cell for cell in sweep.cells(done) if not cell.chooses]
    assert {(cell.arm, cell.point) for cell in table} == {(arm, point)}
    assert {cell.options["training"]["rate"] for cell in table} == {0.2}


def test_the_recommended_clipping_of_a_run_stands_in_its_row(setup):
    sweep = experiment("clipping_factor", "tiny")
    cell, result = sweep.all_cells()[0], {"status": "done", "ratios": [{"all": [0.001, 0.01, 0.03]}] * 12}
    assert sweep._row(cell, result, setup)["recommended"] == 0.03
    assert "recommended" not in sweep._row(cell, {**result, "ratios": result["ratios"][:2]}, setup)


def test_a_network_without_finite_logits_counts_as_diverged(setup, tmp_path):
    sweep, own = experiment("clipping_factor", "tiny"), replace(setup, runs=tmp_path)
    cell = sweep.all_cells()[0]
    own.folder_of(cell).mkdir(parents=True)
    scores = {"weights@16": {"hits": 0, "count": 20, "loss": float("inf")}}
    (own.folder_of(cell) / "test.json").write_text(json.dumps(scores))
    row = sweep._row(cell, {"status": "done"}, own)
    assert (row["status"], "top1" in row) == ("diverged", False)


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
