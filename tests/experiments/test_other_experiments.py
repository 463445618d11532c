"""The experiments that are no sweeps: times of training steps, and the demo's network against its twin."""

import json

from experiments import finetune
from experiments.catalog import experiment
from experiments.claims import RESULTS
from experiments.latency import NETWORKS, PAIR
from normfree import open_source
from normfree.training.recipes import demo


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
    assert finetune.page(found, 3).splitlines()[:-1] == committed[:-1]  # the last line names this machine
    course = [(50.0, 1.0), (60.0, 0.9), (55.0, 1.1), (54.0, 1.2), (70.0, 0.8)]
    assert finetune.stopped(course, 0) == (5, 70.0)
    assert finetune.stopped(course, 2) == (4, 60.0)


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
