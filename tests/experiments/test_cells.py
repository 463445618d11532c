"""Cells: an interrupted experiment repeats nothing, a changed plan reuses nothing, and a stopped cell continues
exactly."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import classify
from experiments.catalog import DATA, DEFAULT, NAMES, experiment
from experiments.cells import CHOICE_SEED, Cell, Setup, finish, known_cells, measure_cell
from experiments.classify import Settings
from experiments.parts import balanced, of_classes, three_parts
from experiments.run import main, plan
from experiments.sweep import Sweep
from normfree import open_source
from normfree.training.stop import StoppedBySignal

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(experiment(name, "cpu"), "choices")])
def test_one_more_candidate_makes_no_other_cell_invalid(name):
    """What a cell does must not depend on which other cells there are, or a longer list would repeat all of them."""
    one = experiment(name, "cpu")
    more = experiment(name, "cpu")
    if isinstance(one, Sweep):
        longer = {k: replace(a, candidates=[*a.candidates, {"rate": 77.0}]) for k, a in one.arms.items()}
        more = replace(one, arms=longer)
    else:
        more.size = replace(one.size, rates=(*one.size.rates, 77.0), seeds=one.size.seeds + 1)
    cells = [one.cell(arm, point, one.choices.candidates[arm][0], 0) for arm, point in one.choices.rows]
    again = [more.cell(arm, point, more.choices.candidates[arm][0], 0) for arm, point in more.choices.rows]
    assert cells == again
    assert len(more.all_cells()) > len(one.all_cells())


class Doubling:
    """An experiment whose first cells choose a number, and whose others double it."""

    name, title, alone = "doubling", "Doubling", False

    def __init__(self, numbers=(1, 5, 3)):
        self.numbers, self.measured = numbers, []

    def cells(self, done):
        tried = [Cell.of(self.name, "x", seed=CHOICE_SEED, settings={"n": n}) for n in self.numbers]
        if any(cell not in done for cell in tried):
            return tried
        best = max(tried, key=lambda cell: done[cell]["score"]).options["n"]
        return [*tried, *(Cell.of(self.name, "x", seed=seed, settings={"n": best}) for seed in range(2))]

    def measure(self, cell, folder, setup):
        self.measured.append(cell)
        return {"status": "done", "score": 2 * cell.options["n"]}


def test_cells_that_choose_run_first_and_nothing_runs_twice(tmp_path):
    setup, one = Setup(preset="tiny", runs=tmp_path), Doubling()
    assert [cell.chooses for cell in known_cells(one, setup)[0]] == [True] * 3
    done = finish(one, setup, jobs=0)
    assert [cell.options["n"] for cell in done if not cell.chooses] == [5, 5]
    assert len(one.measured) == 5
    again = Doubling()
    assert finish(again, setup, jobs=0) == done
    assert again.measured == []
    changed = Doubling(numbers=(1, 7))
    assert {cell.options["n"] for cell in finish(changed, setup, jobs=0)} == {1, 7}
    assert [cell.options["n"] for cell in changed.measured] == [7, 7, 7]  # 1 was known


def test_the_folder_of_a_cell_is_readable_and_depends_on_every_setting():
    cell = Cell.of("e", "NF + AGC", point="32", seed=1, settings={"rate": 0.1, "fields": {"a": [1]}})
    assert cell.name.startswith("NF_AGC-32-s1-")
    assert cell.options == {"rate": 0.1, "fields": {"a": [1]}}
    others = [
        replace(cell, seed=2),
        replace(cell, point="64"),
        Cell.of("e", "NF + AGC", point="32", seed=1, settings={"rate": 0.2}),
    ]
    assert len({c.name for c in (cell, *others)}) == 4
    for name in ("batch_size", "contrastive"):
        tiny, full = (experiment(name, preset).all_cells() for preset in ("tiny", "cpu"))
        assert len({c.name for c in (*tiny, *full)}) == len(tiny) + len(full)


def test_training_choice_and_test_images_are_different_images_of_equal_classes():
    parts = three_parts(DATA["tiny"], train=40, choice=10, test=20)
    names = {part: {source.name(i) for i in range(len(source))} for part, source in parts.items()}
    assert {part: len(found) for part, found in names.items()} == {"train": 40, "choice": 10, "test": 20}
    assert not names["train"] & names["choice"]
    assert not (names["train"] | names["choice"]) & names["test"]
    labels = [parts["train"].label(i) for i in range(40)]
    assert max(labels.count(k) for k in range(10)) - min(labels.count(k) for k in range(10)) <= 1


def test_a_smaller_balanced_part_is_in_the_larger_one_and_too_many_images_are_refused():
    source = open_source("synthetic:classes=4,size=8,train=41,val=8").train
    small, large = (
        {part.name(i) for i in range(len(part))} for part in (balanced(source, n) for n in (8, 20))
    )
    assert small < large
    with pytest.raises(ValueError, match=r"^42 images are requested and the data has 41\."):
        balanced(source, 42)
    chosen = of_classes(source, (1, 3))
    assert chosen.classes == [source.classes[1], source.classes[3]] or tuple(chosen.classes) == tuple(
        source.classes[k] for k in (1, 3)
    )
    assert {chosen.label(i) for i in range(len(chosen))} == {0, 1}


def test_a_stopped_training_continues_with_the_same_bits(tmp_path, monkeypatch):
    source = open_source("synthetic:classes=3,size=16,train=24,val=8").train
    settings = Settings(
        base="tiny",
        images=24,
        batch=4,
        epochs=2,
        size=16,
        clip="agc",
        average=0.9,
        mixup=0.2,
        fields={"drop_rate": 0.2},
    )
    setup = Setup(preset="tiny", runs=tmp_path)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, facts = classify.train(settings, source, seed=0, folder=tmp_path / "whole", setup=setup)
    step = classify.Training.step

    def stop_in_the_middle(self, batch):
        step(self, batch)
        if batch.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(classify.Training, "step", stop_in_the_middle)
    with pytest.raises(StoppedBySignal):
        classify.train(settings, source, seed=0, folder=tmp_path / "stopped", setup=setup)
    monkeypatch.setattr(classify.Training, "step", step)
    assert (tmp_path / "stopped" / "state.pt").exists()
    again, found = classify.train(settings, source, seed=0, folder=tmp_path / "stopped", setup=setup)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    averages = [
        torch.load(tmp_path / name / "average.pt", weights_only=True) for name in ("whole", "stopped")
    ]
    assert all(torch.equal(a, averages[1][name]) for name, a in averages[0].items())
    assert (found["train_loss"], found["steps"]) == (facts["train_loss"], 12)
    assert not (tmp_path / "stopped" / "state.pt").exists()


def test_a_diverged_training_is_counted_and_has_no_score(setup):
    one = experiment("batch_size", "tiny")
    one = replace(one, name="diverging", base=one.base.changed({"epochs": 3.0}), points={"32": {"batch": 4}})
    one = replace(one, arms={"NF": replace(one.arms["NF"], candidates=[{"rate": 1e9}])})
    (cell,) = one.cells({})
    measure_cell(one, cell, setup)
    _, done = known_cells(one, setup)
    assert done[cell]["status"] == "diverged"
    assert "top1" not in one._row(cell, done[cell], setup)


def test_the_plan_lists_every_cell_with_minutes_and_all_fit_into_six_hours(tmp_path, capsys):
    setup = Setup(data="cifar10", runs=tmp_path)
    text = plan([experiment(name, "cpu") for name in DEFAULT], setup, jobs=2)
    total = float(text.splitlines()[-1].split()[3])
    assert 120 <= total <= 360
    assert main(["--dry-run", "--only", "depth", "--runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    own = experiment("depth", "cpu")
    assert printed.startswith(f"depth: {len(own.all_cells())} cells, 0 finished, about ")
    candidates = sum(len(arm.candidates) for arm in own.arms.values())
    assert printed.count("(chooses)") == candidates * len(own.points)
    assert not any(tmp_path.iterdir())


def test_an_unknown_name_is_one_line(capsys):
    assert main(["--only", "bach_size", "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown experiment 'bach_size'. Did you mean 'batch_size'?"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_every_size_of_every_experiment_has_three_seeds_and_unique_cells(name, preset):
    one = experiment(name, preset)
    cells = one.all_cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert len({cell.seed for cell in cells if not cell.chooses}) >= 3
    assert all(one.minutes(cell) > 0 for cell in cells)


@pytest.mark.slow
def test_the_command_continues_after_a_signal(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.run",
        "--preset",
        "tiny",
        "--only",
        "batch_size",
        "--runs",
        str(tmp_path / "runs"),
        "--results",
        str(tmp_path / "results"),
    ]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while first.poll() is None and not list((tmp_path / "runs").glob("tiny/batch_size/*/result.json")):
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 130
    assert errors.endswith("stopped; the same command continues\n")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("tiny/batch_size/*/result.json")}
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, cwd=ROOT)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    found = json.loads((tmp_path / "results" / "batch_size_tiny.json").read_text())
    assert found["complete"]
