"""Any number of processes computes the same function: gradients, runs, scores; and they stop, fail and continue as one.

Each world of 1, 2 and 4 gloo processes is started once and works through WORK; the tests read what it left behind.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normfree.training import checkpoint
from normfree.training.distributed.world import World, device_of, start_world

FLAGS = (
    "--data synthetic:classes=3,size=16,train=48,val=13 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.micro_batch 2 --input.workers 0 --length 6st --optim.warmup 2st --optim.lr 0.05 "
    "--log.every 2 --log.evaluate_every 3st --log.checkpoint_every 2st --optim.ema_decay 0.9 --augment.mixup 0.2 "
    "--augment.cutmix 1.0 --augment.mix_with fresh --net.drop_rate 0.3 --net.stochdepth_rate 0.5 --device cpu"
)
WORLDS = (1, 2, 4)
# Processes -> into how many micro-batches each cuts its part of 32 images; not every number up to 8 can be had.
LAYOUTS = {1: (1, 2, 3, 4, 5, 6, 7, 8), 2: (1, 2, 3, 4, 6, 8), 4: (1, 2, 3, 4, 8)}

WORK = '''
import io, multiprocessing, os, shutil, signal, socket, sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from normfree.data.transforms.train import train_transform
from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.sources.open import open_source
from normfree.inference import evaluate
from normfree.preprocessing import Preprocessing
from normfree.training import loop, run_folder
from normfree.training.resolve import open_data, resolve
from normfree.training.config_io import load_config, with_overrides
from normfree.training.distributed.world import ElsewhereError, start_world
from normfree.training.recipes import RECIPES
from normfree.training.trainer import Diverged, Trainer

folder, flags = Path(sys.argv[1]), sys.argv[2:]
torch.set_num_threads(1)
run_folder.draw_curves = lambda *args, **kwargs: None  # a third of such a short run's time
quiet = Console(file=io.StringIO())


def work(size, rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    world = start_world("cpu")
    found = {"rank": (world.rank, world.size, world.backend)}

    def config(*more):
        return resolve(with_overrides(RECIPES["scratch"](), [*flags, *more]))


    def gradient(model, dtype, micro_batches):
        """The whole world's gradient of one batch of 32, cut into so many micro-batches in each process."""
        off = ("--model", model, "--input.batch_size", "32", "--net.drop_rate", "0", "--net.stochdepth_rate", "0",
               "--input.micro_batch", str(-(-(32 // world.size) // micro_batches)),
               "--augment.mixup", "0", "--augment.cutmix", "0")
        trainer = Trainer(config(*off), num_classes=3, samples=48, world=world)
        trainer.net.to(dtype)
        batch = next(train_batches(open_source("synthetic:classes=3,size=16,train=48,val=13").train,
            train_transform(image_size=16), batch_size=32, seed=0, num_steps=1, rank=world.rank, world_size=world.size))
        images, targets = trainer.prepare(batch, 0)
        assert len(images.split(trainer.config.input.micro_batch)) == micro_batches
        trainer.gradients(images.to(dtype), targets.to(dtype), 0)
        grads = [p.grad for p in trainer.net.parameters()]
        world.sum_(grads)
        return grads


    for model in ("nf_resnet_nano", "resnet_nano"):
        for dtype in (torch.float64, torch.float32):
            for m in {1: (1, 2, 3, 4, 5, 6, 7, 8), 2: (1, 2, 3, 4, 6, 8), 3: (), 4: (1, 2, 3, 4, 8)}[world.size]:
                if model == "nf_resnet_nano" or m in (1, 4):
                    found["gradient", model, dtype, m] = gradient(model, dtype, m)

    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    for p in net.parameters():
        p.data.normal_(generator=generator)
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 255, (17, 8, 8, 3), dtype=np.uint8), [int(x) for x in random.integers(0, 7, 17)]
    for n in range(1, 18):
        source = ArraySource(pixels[:n], labels[:n], classes=tuple("abcdefg"), names=[str(i) for i in range(n)])
        found["score", n] = evaluate(net, source, preprocessing=Preprocessing(image_size=8, crop="squash"),
            batch_size=3, device="cpu", rank=world.rank, world_size=world.size, gather=world.gather)
    net[1].bias.data[2] = float("nan")
    try:
        evaluate(net, source, preprocessing=Preprocessing(image_size=8, crop="squash"), device="cpu", rank=world.rank,
                 world_size=world.size, gather=world.gather)
    except ValueError as error:
        found["no score"] = str(error)

    if world.size in (1, 3):
        loop.train(config("--input.batch_size", "12"), folder / f"twelve{world.size}", console=quiet)
    if world.size == 3:
        torch.save(found, folder / f"found-{world.size}-{world.rank}.pt")
        return world.close()

    mine = torch.full((3, 2), float(world.rank)).t()
    both = [mine, torch.tensor(world.rank)]
    world.sum_(both)
    found["sum"] = both
    ones = [torch.tensor([2.0 * world.rank, 4.0])]
    world.mean_(ones)
    found["mean"] = ones[0]
    first = [torch.tensor([world.rank + 5.0]), torch.tensor(world.rank + 7)]
    world.copy_first_(first)
    found["first"] = first
    found["largest"] = world.largest(10 * world.rank), world.any(world.rank == world.size - 1), world.any(False)
    world.barrier()
    for failing in ("last", "all", "none"):
        try:
            with world.together():
                if failing == "all" or (failing == "last" and world.rank == world.size - 1):
                    raise KeyError(f"process {world.rank}")
            found[failing] = "passed"
        except Exception as error:
            found[failing] = type(error).__name__, str(error)

    loop.train(config(), folder / f"run{world.size}", console=quiet)
    if world.size == 2:
        loop.train(config(), folder / "again2", console=quiet)
    split = open_source("synthetic:classes=3,size=16,train=48,val=13")
    twin = Trainer(config("--model", "resnet_nano"), num_classes=3, samples=48, world=world)
    for batch in train_batches(split.train, twin.transform, batch_size=8, seed=0, num_steps=1, rank=world.rank,
                               world_size=world.size, pairs=twin.pairs):
        twin.step(batch, 0)
    def statistics():
        return [torch.cat([b.flatten().clone() for b in net.buffers() if b.is_floating_point()])
                for net in (twin.net, twin.ema.module)]
    found["statistics"] = statistics()
    loop.score(twin, split)
    found["aligned"] = statistics()
    original = Trainer.step
    if world.size == 4:
        def stepping(self, batch, at):
            if at == 2 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)  # one of the four
            return original(self, batch, at)

        Trainer.step = stepping
        try:
            loop.train(config(), folder / "stopped", console=quiet)
        except loop.Stopped as stopped:
            found["stopped"] = stopped.step, stopped.exit_code
        Trainer.step = original
        if world.first:
            shutil.rmtree(folder / "stopped" / "checkpoints" / "step-00000002")  # so that the third is what continues
    else:
        if world.first:
            shutil.copytree(folder / "stopped", folder / f"continued{world.size}")
        world.barrier()
        loop.train(load_config(folder / "stopped" / "config.toml"), folder / f"continued{world.size}", console=quiet)

    original_gradients = Trainer.gradients
    def poisoned(self, images, targets, step):
        result = original_gradients(self, images, targets, step)
        if step == 1 and world.rank == world.size - 1:
            self.net.head.bias.grad[0] = float("nan")
        return result

    Trainer.gradients = poisoned
    try:
        loop.train(config(), folder / f"diverged{world.size}", console=quiet)
    except Diverged as error:
        found["diverged"] = str(error)
    found["console"] = quiet.file.getvalue()
    torch.save(found, folder / f"found-{world.size}-{world.rank}.pt")
    world.close()


for size in (4, 3, 2, 1):  # the four leave a stopped run for the others
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # one import of torch for all
    processes = [fork.Process(target=work, args=(size, rank, port)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"world of {size}: {[process.exitcode for process in processes]}")
'''


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER", "TORCHELASTIC"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("worlds")
    process = subprocess.run(
        [sys.executable, "-c", WORK, str(place), *shlex.split(FLAGS)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    # Nothing is printed: the first process of each world speaks to the console that it was given.
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    return place


@pytest.fixture(scope="module")
def found(folder) -> dict[tuple[int, int], dict]:
    return {(size, rank): torch.load(folder / f"found-{size}-{rank}.pt", weights_only=False)
            for size in (*WORLDS, 3) for rank in range(size)}  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_batch_of_32_has_one_gradient_however_it_is_cut(found, dtype, bound):
    def cut(model: str, size: int, m: int) -> list[torch.Tensor]:
        return found[size, 0]["gradient", model, dtype, m]

    whole = cut("nf_resnet_nano", 1, 1)
    worst = {
        (size, m): max(map(distance, cut("nf_resnet_nano", size, m), whole))  # of any one parameter
        for size in WORLDS
        for m in LAYOUTS[size]
    }
    assert len(worst) == 19
    assert max(worst.values()) <= bound, worst
    assert worst[4, 8] > 0  # another order of the same sum, not the same computation
    flat = torch.cat([g.flatten() for g in cut("resnet_nano", 1, 1)])
    for size, m in ((1, 4), (2, 1), (2, 4), (4, 1), (4, 4)):  # batch statistics: the very same test fails
        other = torch.cat([g.flatten() for g in cut("resnet_nano", size, m)])
        assert distance(other, flat) > 0.1, (size, m)


@pytest.mark.parametrize("size", [2, 4])
def test_all_processes_hold_the_same_bits_of_the_gradient(found, size):
    for name, value in found[size, 0].items():
        if name[0] == "gradient":
            assert all(map(torch.equal, found[size, 1][name], value)), name
            assert all(map(torch.equal, found[size, size - 1][name], value)), name


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
    """With dropout, stochastic depth and mixing of fresh pairs, all keyed by place in the global batch."""
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
    assert {found[4, rank]["stopped"] for rank in range(4)} == {(3, 143)}  # only one of them got the signal
    assert "continuing" in found[size, 0]["console"]
    assert "after step 3" in found[size, 0]["console"]
    assert_same_run(folder / f"continued{size}", folder / "run1", 1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_a_twins_running_statistics_are_averaged_for_scores(found, size):
    for which in (0, 1):  # of the weights, of their average
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


def test_no_process_scores_what_another_cannot(found):
    expected = (
        "logits are not finite for '0' and others; the data has 7 classes. There is no score to report."
    )
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
def test_where_one_process_fails_all_know_why(found, size):
    for rank in range(size):
        values = found[size, rank]
        own = ("KeyError", f"'process {rank}'")
        told = ("ElsewhereError", f"process {size - 1} of {size}: 'process {size - 1}'")
        assert values["last"] == (own if rank == size - 1 else told)
        assert values["all"] == (
            own if rank == 0 else ("ElsewhereError", f"process 0 of {size}: \"'process 0'\"".replace('"', ""))
        )
        assert values["none"] == "passed"


@pytest.mark.parametrize("size", WORLDS)
def test_a_gradient_that_is_not_finite_anywhere_stops_all(folder, found, size):
    for rank in range(size):
        text = found[size, rank]["diverged"]
        assert text.startswith("step 1: 1 of ")
        assert "'head.bias'" in text
    assert not (folder / f"diverged{size}" / "checkpoints").exists()


def test_a_world_of_one_exchanges_nothing(monkeypatch):
    for word in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(word, raising=False)
    with start_world("cpu") as world:
        assert (world.rank, world.size, world.backend, world.device) == (0, 1, "", torch.device("cpu"))
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("device", "local", "gpus", "expected"), [
    ("cpu", 3, 0, "cpu"), ("cpu", 0, 8, "cpu"), ("auto", 3, 0, "cpu"), ("auto", 3, 4, "cuda:3"),
    ("cuda", 0, 1, "cuda:0"),
])  # fmt: skip
def test_each_process_has_a_device_of_its_own(device, local, gpus, expected):
    assert device_of(device, local=local, gpus=gpus) == torch.device(expected)


@pytest.mark.parametrize(("device", "local", "gpus", "message"), [
    ("cuda", 0, 0, "process 1 of this machine has no GPU of its own: there are 0. Use --device cpu."),
    ("auto", 4, 4, "process 5 of this machine has no GPU of its own: there are 4. Use --nproc-per-node 4."),
    ("cuda:1", 0, 4, "device 'cuda:1' for several processes. Allowed: auto, cuda (one GPU each), cpu. "
     "Use --device auto."),
    ("mps", 0, 0, "device 'mps' for several processes. Allowed: auto, cuda (one GPU each), cpu. Use --device auto."),
])  # fmt: skip
def test_a_device_that_cannot_be_shared_is_refused(device, local, gpus, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        device_of(device, local=local, gpus=gpus)
    assert str(error.value) == message


def test_a_batch_that_cannot_be_divided_is_refused():
    assert World(size=4).part(32) == 8
    message = (
        r"^input\.batch_size=30 for 4 processes: expected a multiple of 4, as each takes an equal part\. "
    )
    with pytest.raises(ValueError, match=message + r"Nearest: 28 or 32\.$"):
        World(size=4).part(30)
    with pytest.raises(ValueError, match=r"Nearest: 4\.$"):
        World(size=4).part(3)


@pytest.mark.parametrize(("words", "message"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without a usable RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Several "
     "processes are started by torchrun: torchrun --nproc-per-node N -m normfree train ..."),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment. Allowed: a whole number, as torchrun sets it."),
])  # fmt: skip
def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch, words, message):
    for word in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(word, raising=False)
    for word, value in words.items():
        monkeypatch.setenv(word, value)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        start_world("cpu")
    assert str(error.value) == message


# --- from the command line ----------------------------------------------------------------------------


def torchrun(size: int, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port",
         str(free_port()), "-m", "normfree", "train", *words],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_torchrun_from_the_command_line(folder, tmp_path):
    out = tmp_path / "run"
    process = torchrun(2, *shlex.split(FLAGS), "--out", str(out))
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    assert text.count("top-1 on 13 validation images") == 1  # the first process alone speaks
    assert_same_run(out, folder / "run1", 1e-5)


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    refused = torchrun(2, *shlex.split(FLAGS), "--input.batch_size", "9", "--out", str(tmp_path / "other"))
    text = refused.communicate(timeout=300)[0]
    assert text.count("normfree: input.batch_size=9 for 2 processes: expected a multiple of 2") == 1
    assert not (tmp_path / "other").exists()


def members(agent: int) -> list[int]:
    """The processes that torchrun started, in order of rank."""
    children = [int(word) for word in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    ranks = {}
    for child in children:
        for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if entry.startswith(b"RANK="):
                ranks[int(entry[5:])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def working(process: subprocess.Popen[str], out: Path) -> list[int]:
    while process.poll() is None and not (out / "checkpoints" / "last").exists():
        time.sleep(0.05)
    return members(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["torchrun", "0", "1"])
def test_sigterm_to_one_or_all_saves_once(tmp_path, target):
    out = tmp_path / "run"
    process = torchrun(
        2, *shlex.split(FLAGS), "--length", "100000st", "--input.workers", "2", "--out", str(out)
    )
    ranks = working(process, out)
    begun = time.monotonic()
    os.kill(process.pid if target == "torchrun" else ranks[int(target)], signal.SIGTERM)
    text = process.communicate(timeout=300)[0]
    assert time.monotonic() - begun < 10
    assert process.returncode != 0
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    assert passed_over == []
    assert (
        text.count(f"stopped after step {saved.step}, everything is saved. Continue: normfree train {out}\n")
        == 1
    )
    assert "Terminated" not in text  # no worker died of it
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicated", "sharded", "exact"])
def test_a_killed_process_ends_all_and_the_run_continues(tmp_path, mode):
    out = tmp_path / "run"
    words = ("--parallel", mode, "--length", "1000st", "--out", str(out))
    process = torchrun(2, *shlex.split(FLAGS), *words)
    ranks = working(process, out)
    begun = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    text = process.communicate(timeout=300)[0]
    assert time.monotonic() - begun < 30
    assert process.returncode != 0
    assert text.count("normfree: another process of this run has ended") <= 1  # torchrun may be faster
    assert "in _steps" not in text, text  # no traceback of ours
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)
    step = checkpoint.newest(out / "checkpoints")[0].step
    again = torchrun(2, str(out))
    while again.poll() is None and f"after step {step}" not in (out / "log.txt").read_text():
        time.sleep(0.05)
    working(again, out)
    again.terminate()
    assert f"continuing {out} after step {step}" in again.communicate(timeout=300)[0]
    shutil.rmtree(out)
