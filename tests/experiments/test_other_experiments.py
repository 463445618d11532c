"""The experiments that are no sweeps: times of training steps, and the demo's network against its twin."""

import json
from dataclasses import replace

from PIL import Image

from experiments import finetune
from experiments.catalog import experiment
from experiments.claims import RESULTS
from experiments.latency import NETWORKS, PAIR
from normfree import open_source
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES, demo


def test_times_of_steps_are_measured_and_published_accuracies_are_marked(reported):
    one, done, page, folder = reported("latency")
    assert one.alone
    assert len(done) == 4
    cells = json.loads((folder / "latency_tiny.json").read_text())["cells"]
    assert all(cell["seconds_per_image"] > 0 for cell in cells)
    assert {cell["arm"]: cell["parameters"] for cell in cells}["torchvision resnet18"] == 11_689_512
    assert "top-1 %, published" in page
    assert all(network.source for network in NETWORKS.values())
    assert NETWORKS[PAIR[0]].top1 == NETWORKS[PAIR[1]].top1


def test_the_page_on_fine_tuning_is_made_from_its_json():
    found = json.loads((RESULTS / "finetune.json").read_text(encoding="utf-8"))
    committed = (RESULTS / "finetune.md").read_text(encoding="utf-8").splitlines()
    assert finetune.page(found, 3).splitlines() == committed


def test_no_test_image_of_the_fine_tuning_is_trained_on_or_chooses(tmp_path, monkeypatch):
    for number in range(80):
        path = tmp_path / "photos" / f"grade {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    monkeypatch.setattr(finetune, "PACKED", 8)
    for name in ("TRAIN", "TEST", "FEW_TRAIN"):
        monkeypatch.setattr(finetune, name, tmp_path / f"{name}.packed")
    finetune.pack_parts(str(tmp_path / "photos"))
    cell = finetune.Cell("NF + AGC", 8, 0)
    for held_out, longer in ((0.0, None), (finetune.V_FRACTION, None), (0.0, 3)):
        config = with_overrides(
            RECIPES["finetune"](), replace(cell, patience=longer).flags(0.02, held_out=held_out)
        )
        split = open_source(
            config.data, val_fraction=config.input.val_fraction, test_fraction=config.input.test_fraction
        )
        parts = [{part.name(i) for i in range(len(part))} for part in (split.train, split.val, split.test)]
        assert not parts[2] & (parts[0] | parts[1])
        assert len(parts[2]) == 40
        only_trained_on = held_out == 0 and longer is None  # then V is a part of the training images
        assert bool(parts[0] & parts[1]) == only_trained_on


def test_the_demo_and_its_twin_are_scored_on_the_test_part_of_the_recipe(reported):
    _, done, page, _ = reported("demo_seeds")
    assert {cell.arm for cell in done} == {"nf_resnet_micro_64", "resnet_micro_64"}
    flags = next(iter(done)).options["flags"]
    data = next(flag.removeprefix("--data=") for flag in flags if flag.startswith("--data="))
    images = len(open_source(data, test_fraction=demo().input.test_fraction).test)
    assert {result["images"] for result in done.values()} == {images}
    assert "4 of 4 runs are finished" in page
    assert [cell.options["flags"][-1] for cell in experiment("demo_seeds", "cpu").all_cells()[1::2]] == [
        "--optim.clip=off"
    ] * 3
