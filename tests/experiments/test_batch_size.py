"""The batch-size experiment: differences between cells, the rule of the verdict, and the page made from the JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return `experiments.batch_size`, with its variants in the table for the duration of a test."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = import_module("experiments.batch_size")
    for name, variant in module.EXTRA_VARIANTS.items():
        monkeypatch.setitem(module.VARIANTS, name, variant)
    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return `experiments.batch_size_report`."""
    monkeypatch.syspath_prepend(str(ROOT))
    return import_module("experiments.batch_size_report")


def test_cells_are_all_arms_batches_and_seeds_once_and_no_probe_run(script: ModuleType) -> None:
    preset = script.PRESETS["cpu"]
    cells = script.cells(preset)
    assert {(c.arm, c.batch, c.seed) for c in cells} == {
        (a, b, s) for a in ("bn", "nf", "nf_agc") for b in preset.batches for s in range(preset.seeds)
    }
    assert preset.batches[-1] >= 16 * preset.batches[0]
    assert preset.seeds >= 3
    probe = script.probe_cells(preset)
    names = [c.name for c in cells + probe]
    assert len(set(names)) == len(names)
    table = {(c.arm, c.batch, c.seed, c.lr, c.clipping) for c in cells}
    assert all((c.arm, c.batch, c.seed, c.lr, c.clipping) not in table for c in probe)
    assert list(preset.clippings) == sorted(preset.clippings, reverse=True)  # smaller batches need a larger λ


def test_arms_differ_only_in_network_and_clipping_and_the_rate_scales_with_the_batch(
    script: ModuleType,
) -> None:
    preset = script.PRESETS["cpu"]
    configs = {
        (c.arm, c.batch): script.config_of(preset, c, "x") for c in script.cells(preset) if c.seed == 1
    }
    for batch in preset.batches:
        assert configs["nf", batch].optim.lr == pytest.approx(preset.lr * batch / 256)
        bn, nf, agc = (configs[arm, batch].model_dump() for arm in ("bn", "nf", "nf_agc"))
        assert (bn.pop("model"), nf["model"]) == ("resnet_thin", "nf_resnet_thin")
        assert agc["optim"].pop("clipping") == preset.clippings[preset.batches.index(batch)]
        assert (agc["optim"].pop("clip"), nf["optim"].pop("clip")) == ("agc", "off")
        del nf["optim"]["clipping"]
        assert agc == nf
        for unused in ("clip", "clipping"):
            bn["optim"].pop(unused)
        del nf["model"]
        assert bn == nf


def test_balanced_subset_has_equal_classes_and_refuses_more_images_than_exist(script: ModuleType) -> None:
    from normfree.data.sources.open import open_source

    source = open_source("synthetic:classes=4,size=8,train=41,val=8").train
    subset = script.BalancedSubset(source, 20)
    labels = [subset.label(i) for i in range(len(subset))]
    assert [labels.count(k) for k in range(4)] == [5] * 4
    assert len({subset.name(i) for i in range(20)}) == 20
    with pytest.raises(ValueError, match=r"^42 images are requested and the data has 41\."):
        script.BalancedSubset(source, 42)


def scores(large: dict[str, list[float]], small: float = 60.0) -> dict[tuple[str, int], list[float]]:
    """Return scores of three seeds: equal for all arms at batch 32, as given at batch 512."""
    return {(arm, 512): own for arm, own in large.items()} | {
        (arm, 32): [small, small + 1, small - 1] for arm in large
    }


GOOD, MIDDLE, BAD = [58.0, 59.0, 60.0], [40.0, 41.0, 42.0], [10.0, 10.0, 10.0]


@pytest.mark.parametrize(
    ("nf", "agc", "verdict"),
    [
        (GOOD, GOOD, "nothing lost"),
        (BAD, GOOD, "recovered"),
        (BAD, MIDDLE, "partly recovered"),
        (BAD, BAD, "not recovered"),
        (BAD, [65.0, 66.0, 67.0], "recovered"),  # above BN, so no gap
        (BAD, [57.5, 58.5, 59.5], "recovered"),  # half a point, 0.6 of its standard error
        (BAD, [10.0, 10.0, 14.0], "not recovered"),  # one standard error above NF
        ([10.0, 57.0, 60.0], GOOD, "nothing lost"),  # one loss of three is within two standard errors
    ],
)
def test_verdict_follows_its_rule_at_any_level(
    report: ModuleType, nf: list[float], agc: list[float], verdict: str
) -> None:
    for level in (0.0, 7.0):
        arms = {"bn": GOOD, "nf": nf, "nf_agc": agc}
        shifted = {k: [x + level for x in own] for k, own in scores(arms).items()}
        assert report.verdict(shifted)[0] == verdict


def test_a_gap_that_small_batches_also_have_is_not_attributed_to_large_ones(report: ModuleType) -> None:
    own = scores({"bn": GOOD, "nf": MIDDLE, "nf_agc": GOOD})
    assert report.verdict(own)[0] == "recovered"
    own["nf", 32] = [20.0, 21.0, 22.0]
    assert report.verdict(own)[0] == "nothing lost"


def test_verdict_reports_its_numbers(report: ModuleType) -> None:
    short, sentence, numbers = report.verdict(scores({"bn": GOOD, "nf": BAD, "nf_agc": MIDDLE}))
    assert short == "partly recovered"
    assert sentence == "AGC recovers part of the accuracy lost at large batch sizes."
    # standard errors: sqrt(1/3), sqrt(2/3), sqrt(1/3)
    assert numbers == (
        "At batch 512, NF is 49.0 ± 0.6 points below BN (at batch 32: 0.0), and NF + AGC is 18.0 ± 0.8 below BN and "
        "31.0 ± 0.6 above NF."
    )
    alone = {k: v[:1] for k, v in scores({"bn": GOOD, "nf": BAD, "nf_agc": GOOD}).items()}
    assert report.verdict(alone)[0] == "undecided"


def test_diverged_cell_is_a_result_with_the_accuracy_of_guessing(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    preset = replace(script.PRESETS["tiny"], lr=1e9)
    data = script.packed(preset, preset.data, tmp_path / "tiny")
    cell = script.cell(preset, "nf", batch=8, seed=0)
    assert script.run_cell(preset, cell, data=data, folder=tmp_path / "tiny") == 0
    (row,) = script.read_rows(tmp_path / "tiny", [cell])
    assert (row["status"], row["top1"], row["clipped"]) == ("diverged", 25.0, 0.0)
    script.run_cells([cell], preset="tiny", data=data, runs=tmp_path, jobs=1)
    assert capsys.readouterr().out.startswith("1 of 1 cells are finished, 0 to run")


def test_finished_cells_give_page_plot_and_json(script: ModuleType, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    preset = script.PRESETS["tiny"]
    data = script.packed(preset, preset.data, tmp_path / "tiny")
    for cell in script.cells(preset)[::2]:
        assert script.run_cell(preset, cell, data=data, folder=tmp_path / "tiny") == 0
    found = script.found("tiny", runs=tmp_path, data=preset.data)
    assert [row["status"] for row in found["cells"]] == ["done"] * 3
    page = script.write(found, tmp_path / "results")
    assert "**3 of 6 cells are finished: no verdict yet.**" in page
    assert "`python -m experiments.batch_size --preset tiny`: 3 cells" in page
    assert (tmp_path / "results" / "batch_size_tiny.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results" / "batch_size_tiny.json").read_text())["total"] == 6
    with pytest.raises(ValueError, match=r"has cells trained on synthetic:.*, not on emoji\."):
        script.packed(preset, "emoji", tmp_path / "tiny")


def test_published_page_is_made_from_its_json(report: ModuleType, tmp_path: Path) -> None:
    results = ROOT / "experiments" / "results"
    found = json.loads((results / "batch_size.json").read_text(encoding="utf-8"))
    assert report.write(found, tmp_path) == (results / "batch_size.md").read_text(encoding="utf-8")
    assert len(found["cells"]) == found["total"]


@pytest.mark.slow
def test_command_continues_after_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.batch_size", "--preset", "tiny"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while first.poll() is None and not list((tmp_path / "runs").glob("tiny/*/cell.json")):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 1
    assert errors.endswith("stopped; run the same command again to continue\n")
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, cwd=ROOT)
    assert not again.stdout.startswith("0 of 6")
    assert "# Accuracy against batch size" in again.stdout
    found = json.loads((tmp_path / "results" / "batch_size_tiny.json").read_text())
    assert len(found["cells"]) == 6
