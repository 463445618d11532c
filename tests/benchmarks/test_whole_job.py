"""The whole job: one target for all arms, runs that are kept, equal networks, and a tiny job from end to end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from normfree import create_model

Script = Callable[[str], ModuleType]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes that are easily told apart, 8 images to train on and 4 to test."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 8), ("test", 4)):
        for label, color in enumerate((40, 200)):
            folder = tmp_path / "data" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 40, (32, 32, 3), generator=generator)
                Image.fromarray((color + noise).to(torch.uint8).numpy()).save(folder / f"{number}.jpg")
    return tmp_path / "data"


def test_time_to_the_target_and_runs_that_miss_it(script: Script) -> None:
    job = script("whole_job")

    def outcome(*curve: tuple[float, float]) -> Any:
        return job.Outcome(curve, 100.0)

    fast, slow = (
        outcome((1.0, 50.0), (2.0, 75.0), (3.0, 80.0)),
        outcome((5.0, 50.0), (6.0, 72.0), (7.0, 74.0)),
    )
    never = outcome((1.0, 20.0), (2.0, 30.0))
    assert (fast.seconds_to(75.0), never.seconds_to(75.0), slow.final) == (2.0, float("inf"), 74.0)
    found = job.comparison({"torchvision": [slow] * 2, "timm": [never] * 2, "normfree": [fast] * 2})
    assert found.notes[0].startswith("to 72.0 % top-1;")  # 90 % of the best final accuracy
    assert [(t.arm, t.median) for t in found.timings] == [
        (job.NAMES["torchvision"], 6000.0 / 1000), (job.NAMES["normfree"], 2.0),
    ]  # fmt: skip
    assert found.timings[1].ratio == 3.0
    assert any("timm, NF network: 2 of 2 runs stay below the target" in note for note in found.notes)


def test_the_lines_of_normfree_train_are_read(script: Script) -> None:
    line = "epoch   1.0  top-1 43.21 %  averaged 50.00 %  loss 1.234"
    assert script("whole_job").LINE.search(line).groups() == ("1.0", "43.21", "50.00")


def test_finished_runs_are_kept_and_other_settings_run_again(
    script: Script, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, harness = script("whole_job"), script("harness")
    started: list[str] = []

    def run(args: list[str]) -> Any:
        started.append(args[2])
        if len(started) == 5:
            raise KeyboardInterrupt
        return job.Outcome(((1.0, 60.0), (2.0, 70.0)), 50.0)

    monkeypatch.setattr(job, "run", run)
    size, runs = job.Job(train=4, test=2, epochs=2, seeds=2, workers=0), tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        list(job.measure(data, size, runs, harness.Bench()))
    (found,) = job.measure(data, size, runs, harness.Bench())
    assert len(started) == 5 + 2  # the fourth run is the last that was kept
    assert found.rounds == 2
    assert job.recorded(runs, "timm", 0, size) is not None
    assert job.recorded(runs, "timm", 0, replace(size, epochs=3)) is None
    bench = harness.Bench()
    assert list(job.measure(None, size, runs, bench)) == []
    assert bench.skipped == ["no data; pass a folder with train/ and test/ by --data FOLDER"]


def test_the_subset_has_the_first_images_of_each_class(script: Script, data: Path, tmp_path: Path) -> None:
    job = script("whole_job")
    folder = job.subset(data, tmp_path / "few", job.Job(train=3, test=2))
    names = {part: sorted(p.name for p in (folder / part / "class1").iterdir()) for part in ("train", "val")}
    assert names == {"train": ["0.jpg", "1.jpg", "2.jpg"], "val": ["0.jpg", "1.jpg"]}
    with pytest.raises(ValueError, match=r"class0 has 4 images\. Allowed: 5 or more"):
        job.subset(data, tmp_path / "more", job.Job(train=3, test=5))


def test_the_networks_have_as_many_parameters_as_ours(script: Script) -> None:
    arms = script("whole_job_arms")
    ours = create_model("nf_resnet_micro", num_classes=10)
    count = sum(p.numel() for p in ours.parameters())
    theirs = arms.timm_network("nf_resnet_micro", 10)
    plain = arms.torchvision_network(arms.width_of(count, 10), 10)
    for net in (theirs, plain):
        assert sum(p.numel() for p in net.parameters()) == pytest.approx(count, rel=0.1)
        assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    maps = [
        f.shape[-1]
        for f in theirs.forward_intermediates(torch.randn(1, 3, 32, 32), intermediates_only=True)[-3:]
    ]
    assert maps == [32, 16, 8]  # those of our stages


@pytest.mark.parametrize("half", [False, True])
def test_all_arms_compute_in_the_same_precision(script: Script, tmp_path: Path, half: bool) -> None:
    job = script("whole_job")
    size = job.Job(half=half)
    for arm in job.NAMES:
        args = job.command(arm, 0, tmp_path, tmp_path, size)
        assert ("--half" in args or "--precision=bfloat16" in args) == half


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_each_arm_learns(script: Script, data: Path, tmp_path: Path, half: bool) -> None:
    job = script("whole_job")
    size = job.Job(train=8, test=4, epochs=2, seeds=1, workers=0, half=half)
    folder = job.subset(data, tmp_path / "few", size)
    for arm in job.NAMES:
        args = job.command(arm, 0, folder, tmp_path, size)
        args += ["--input.batch_size", "8"] if arm == "normfree" else ["--batch-size", "8"]
        found = job.run(args)
        assert len(found.curve) == 2
        assert found.peak_mib > 100


def test_timms_schedule_is_that_of_our_recipe(script: Script) -> None:
    """Up to 0.2 after two epochs, at half of it in the middle of the rest, 0 at the end."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler, rates = script("whole_job_arms").cosine(optimizer, 8, 10), []
    for update in range(1, 81):
        scheduler.step_update(num_updates=update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert [rates[i] for i in (9, 19, 49, 79)] == pytest.approx([0.1, 0.2, 0.1, 0.0])
