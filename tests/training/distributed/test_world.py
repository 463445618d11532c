"""Gradients, runs and scores do not depend on the number of processes, which stop, fail and continue together.

Each world of 1, 2, 3 and 4 processes is started once and works through tests/workers/world_worker.py; the tests read
what it has saved.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normfree.training import checkpoint
from normfree.training.distributed.world import World, device_of, start_world

WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def folder(worlds) -> Path:
    return worlds / "world"


@pytest.fixture(scope="module")
def found(folder) -> dict[tuple[int, int], dict]:
    return {(size, rank): torch.load(folder / f"found-{size}-{rank}.pt", weights_only=False)
            for size in (*WORLDS, 3) for rank in range(size)}  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_gradient_of_a_batch_does_not_depend_on_how_it_is_split(found, plans, dtype, bound):
    def cut(model: str, size: int, m: int) -> list[torch.Tensor]:
        return found[size, 0]["gradient", model, dtype, m]

    whole = cut("nf_resnet_nano", 1, 1)
    worst = {
        (size, m): max(map(distance, cut("nf_resnet_nano", size, m), whole))  # largest over the parameters
        for size in WORLDS
        for m in plans.LAYOUTS[str(size)]
    }
    assert len(worst) == 19
    assert max(worst.values()) <= bound, worst
    assert worst[4, 8] > 0  # another order of the same sum
    flat = torch.cat([g.flatten() for g in cut("resnet_nano", 1, 1)])
    for size, m in ((1, 4), (2, 1), (2, 4), (4, 1), (4, 4)):  # the law does not hold with batch statistics
        other = torch.cat([g.flatten() for g in cut("resnet_nano", size, m)])
        assert distance(other, flat) > 0.1, (size, m)


def test_the_cached_gradient_of_a_contrastive_loss_does_not_depend_on_how_the_batch_is_split(found, plans):
    whole = found[1, 0]["cached", "nf_resnet_nano", 1]
    worst = {
        (size, m): max(map(distance, found[size, size - 1]["cached", "nf_resnet_nano", m], whole))
        for size in WORLDS
        for m in plans.LAYOUTS[str(size)]
    }
    assert len(worst) == 19
    assert max(worst.values()) <= 1e-12, worst
    assert worst[4, 8] > 0  # another order of the same sum
    for size in WORLDS:
        for m in plans.LAYOUTS[str(size)]:
            if (size, m) != (1, 1):  # batch statistics are refused
                assert (
                    "normalize with the statistics of a micro-batch"
                    in found[size, 0]["cached", "resnet_nano", m]
                ), (size, m)


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_hold_the_same_bits_of_the_gradient(found, size):
    for name, value in found[size, 0].items():
        if name[0] == "gradient":
            assert all(map(torch.equal, found[size, 1][name], value)), name
            assert all(map(torch.equal, found[size, size - 1][name], value)), name


@pytest.mark.parametrize("mebibytes", [25, 0.001])
def test_standardized_once_under_ddp_gives_the_gradient_of_the_whole_batch(found, mebibytes):
    for rank in range(2):
        got, whole = found[2, rank]["standardized once", mebibytes], found[2, rank]["whole batch"]
        assert max(map(distance, got, whole)) <= 1e-12


def weights(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert [f.stem for f in files] == ["ema", "model", "optim"]
    return {f"{f.stem}:{k}": v for f in files for k, v in load_file(f).items()}


def assert_same_run(one: Path, other: Path, bound: float) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    far = {k: distance(a[k], b[k]) for k in a if float((a[k].double() - b[k].double()).norm()) > 1e-8}
    assert max(far.values(), default=0.0) <= bound, far


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_does_not_depend_on_the_number_of_processes(folder, size):
    """With dropout, stochastic depth and mixing of fresh pairs, all seeded by the index in the global batch."""
    assert_same_run(folder / f"run{size}", folder / "run1", 1e-5)
    rows = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            for name in (f"run{size}", "run1")]  # fmt: skip
    assert [r["step"] for r in rows[0]] == [2, 3, 4, 6, 6]
    for one, other in zip(*rows, strict=True):
        values = {k: v for k, v in one.items() if k != "images_per_s"}
        assert values == pytest.approx({k: v for k, v in other.items() if k != "images_per_s"}, rel=1e-4)


def test_three_processes_share_a_batch_of_twelve(folder):
    assert_same_run(folder / "twelve3", folder / "twelve1", 1e-5)


def test_the_same_number_of_processes_gives_the_same_bits(folder):
    one, again, other = (weights(folder / name) for name in ("run2", "again2", "run1"))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)  # a sum in another order


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_of_four_processes_continues_on_fewer(folder, found, size):
    assert {found[4, rank]["stopped"] for rank in range(4)} == {(3, 143)}  # only rank 1 got the signal
    assert "continuing" in found[size, 0]["console"]
    assert "after step 3" in found[size, 0]["console"]
    assert_same_run(folder / f"continued{size}", folder / "run1", 1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_a_twins_running_statistics_are_averaged_for_scores(found, size):
    for which in (0, 1):  # weights, averaged weights
        own = [found[size, rank]["statistics"][which] for rank in range(size)]
        assert distance(own[0], own[1]) > 0.01  # each process has seen its part of the batch
        for rank in range(size):
            torch.testing.assert_close(found[size, rank]["aligned"][which], torch.stack(own).mean(dim=0))


@pytest.mark.parametrize("n", range(1, 18))
def test_every_image_is_scored_once_in_any_world(found, n):
    whole = found[1, 0]["score", n]
    assert whole.count == n
    for (size, rank), values in found.items():
        score = values["score", n]
        assert (score.count, score.top1, score.top5) == (n, whole.top1, whole.top5), (size, rank)
        assert torch.equal(score.labels, whole.labels)
        assert torch.equal(score.predictions, whole.predictions)
        assert score.loss == pytest.approx(whole.loss, rel=1e-6)


def test_all_processes_report_logits_that_are_not_finite(found):
    expected = "logits are not finite for '0' and other images. Allowed: 7 finite logits, one per class."
    assert {values["no score"] for values in found.values()} == {expected}


@pytest.mark.parametrize("size", WORLDS)
def test_sums_means_and_flags(found, size):
    total = size * (size - 1) / 2
    for rank in range(size):
        values = found[size, rank]
        assert values["rank"] == (rank, size, "gloo" if size > 1 else "")
        assert torch.equal(values["sum"][0], torch.full((2, 3), total))
        assert int(values["sum"][1]) == total
        assert values["mean"].tolist() == [size - 1.0, 4.0]
        assert [float(t) for t in values["first"]] == [5.0, 7.0]
        assert values["largest"] == (10 * (size - 1), True, False)


@pytest.mark.parametrize("size", [2, 4])
def test_if_one_process_fails_all_report_the_reason(found, size):
    for rank in range(size):
        values = found[size, rank]
        own = ("KeyError", f"'process {rank}'")
        others = ("ElsewhereError", f"process {size - 1} of {size}: 'process {size - 1}'")
        assert values["last"] == (own if rank == size - 1 else others)
        assert values["all"] == (
            own if rank == 0 else ("ElsewhereError", f"process 0 of {size}: \"'process 0'\"".replace('"', ""))
        )
        assert values["none"] == "passed"


@pytest.mark.parametrize("size", WORLDS)
def test_a_gradient_that_is_not_finite_in_one_process_stops_all(folder, found, size):
    for rank in range(size):
        text = found[size, rank]["diverged"]
        assert text.startswith("step 1: 1 of ")
        assert "'head.bias'" in text
    assert not (folder / f"diverged{size}" / "checkpoints").exists()


def test_a_world_of_one_exchanges_nothing(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with start_world("cpu") as world:
        assert (world.rank, world.size, world.backend, world.device) == (0, 1, "", torch.device("cpu"))
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("device", "local", "gpus", "expected"), [
    ("cpu", 3, 0, "cpu"), ("cpu", 0, 8, "cpu"), ("auto", 3, 0, "cpu"), ("auto", 3, 4, "cuda:3"),
    ("cuda", 0, 1, "cuda:0"),
])  # fmt: skip
def test_each_process_has_its_own_device(device, local, gpus, expected):
    assert device_of(device, local=local, gpus=gpus) == torch.device(expected)


@pytest.mark.parametrize(("device", "local", "gpus", "message"), [
    ("cuda", 0, 0, "no GPU for process 1 of this machine, which has 0. Fix: use --device cpu."),
    ("auto", 4, 4, "no GPU for process 5 of this machine, which has 4. Fix: use --nproc-per-node 4."),
    ("cuda:1", 0, 4, "device 'cuda:1' for several processes. Allowed: auto, cuda (one GPU each), cpu. "
     "Fix: use --device auto."),
    ("mps", 0, 0, "device 'mps' for several processes. Allowed: auto, cuda (one GPU each), cpu. "
     "Fix: use --device auto."),
])  # fmt: skip
def test_a_device_that_cannot_be_shared_is_refused(device, local, gpus, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        device_of(device, local=local, gpus=gpus)
    assert str(error.value) == message


def test_a_batch_that_cannot_be_divided_is_refused():
    assert World(size=4).part(32) == 8
    with pytest.raises(ValueError, match=r"^input\.batch_size=30 for 4 processes") as error:
        World(size=4).part(30)
    allowed = "Allowed: a multiple of 4, because all processes take equal parts. Fix: use 28 or 32."
    assert str(error.value).endswith(allowed)
    with pytest.raises(ValueError, match=r"Fix: use 4\.$"):
        World(size=4).part(3)


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without valid RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Fix: start "
     "several processes with torchrun --nproc-per-node N -m normfree train ..."),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment. Allowed: a whole number, as set by torchrun."),
])  # fmt: skip
def test_an_environment_without_valid_variables_of_torchrun_is_refused(monkeypatch, variables, message):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        start_world("cpu")
    assert str(error.value) == message


# --- from the command line ----------------------------------------------------------------------------


def test_torchrun_from_the_command_line(folder, torchrun, plans, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, *plans.WORLD_FLAGS, "--out", str(out))
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert text.count("top-1 on 13 validation images") == 1  # only rank 0 prints
    assert_same_run(out, folder / "run1", 1e-5)


@pytest.mark.slow
def test_a_mistake_is_reported_once(torchrun, plans, tmp_path):
    refused = torchrun(2, *plans.WORLD_FLAGS, "--input.batch_size", "9", "--out", str(tmp_path / "other"))
    text = refused.communicate(timeout=300)[0]
    assert text.count("normfree: input.batch_size=9 for 2 processes. Allowed: a multiple of 2") == 1
    assert not (tmp_path / "other").exists()


def members(agent: int) -> list[int]:
    """Return the ids of the processes that torchrun has started, in order of rank."""
    children = [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    ranks = {}
    for child in children:
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def working(process: subprocess.Popen[str], out: Path) -> list[int]:
    """Wait for the first checkpoint in `out` and return the ids of the processes."""
    while process.poll() is None and not (out / "checkpoints" / "last").exists():
        time.sleep(0.05)
    return members(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchrun", "0", "1"])
def test_sigterm_to_one_or_all_saves_once(torchrun, plans, tmp_path, target):
    out = tmp_path / "run"
    process = torchrun(
        2, *plans.WORLD_FLAGS, "--length", "100000st", "--input.workers", "2", "--out", str(out)
    )
    ranks = working(process, out)
    os.kill(process.pid if target == "torchrun" else ranks[int(target)], signal.SIGTERM)
    text = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    assert passed_over == []
    assert (
        text.count(f"stopped after step {saved.step}; everything is saved. Resume: normfree train {out}\n")
        == 1
    )
    assert "Terminated" not in text  # no worker was killed by the signal
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicated", "sharded", "exact"])
def test_a_killed_process_ends_all_and_the_run_continues(torchrun, plans, tmp_path, mode):
    out = tmp_path / "run"
    flags = ("--parallel", mode, "--length", "1000st", "--out", str(out))
    process = torchrun(2, *plans.WORLD_FLAGS, *flags)
    ranks = working(process, out)
    os.kill(ranks[1], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert (
        text.count("normfree: another process of this run has ended") <= 1
    )  # torchrun may stop the process before it prints
    assert "in _steps" not in text, text  # no traceback
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)
    step = checkpoint.newest(out / "checkpoints")[0].step
    again = torchrun(2, str(out))
    while again.poll() is None and f"after step {step}" not in (out / "log.txt").read_text():
        time.sleep(0.05)
    working(again, out)
    again.terminate()
    assert f"continuing {out} after step {step}" in again.communicate(timeout=300)[0]
    shutil.rmtree(out)


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process_and_a_checkpoint(torchrun, plans, tmp_path):
    out = tmp_path / "run"
    flags = (
        "--length",
        "100000st",
        "--log.checkpoint_every",
        "50000st",
        "--input.workers",
        "1",
        "--out",
        str(out),
    )
    process = torchrun(2, *plans.WORLD_FLAGS, *flags)
    ranks = working(process, out)
    children = [
        int(child)
        for rank in ranks
        for child in Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
    ]
    process.kill()
    process.communicate(timeout=600)
    deadline = time.monotonic() + 600
    while any(Path("/proc", str(pid)).exists() for pid in ranks + children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    assert passed_over == []
    assert saved.step < 50000
