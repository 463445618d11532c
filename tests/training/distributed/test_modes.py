"""`parallel`: exact gives the same bits in any world, sharded the same run up to rounding; both continue each other's
kind of run. Each world of gloo processes is started once and works through a plan; the tests read what it left."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normfree.training.config import AugmentConfig, Config, InputConfig, OptimConfig
from normfree.training.distributed.exact import TreeSum, same_kernels
from normfree.training.distributed.modes import check_mode, exact_sizes

# Two of four processes have no image to score: they must not be waited for.
FLAGS = (
    "--data synthetic:classes=3,size=16,train=48,val=2 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.micro_batch 1 --input.workers 0 --length 6st --optim.warmup 2st --optim.lr 0.02 "
    "--log.every 2 --log.evaluate_every 3st --log.checkpoint_every 2st --log.keep 9 --optim.ema_decay 0.9 "
    "--augment.mixup 0.2 --augment.cutmix 1.0 --augment.randaugment 2x3 --net.drop_rate 0.3 --net.stochdepth_rate 0.5 "
    "--net.skip_gain 0.5 --device cpu"
)
TWO = "--input.micro_batch 2"

WORK = '''
import io, json, multiprocessing, os, shutil, signal, socket, sys
from pathlib import Path

import torch
from rich.console import Console

from normfree.training import checkpoint, loop, run_folder
from normfree.training.resolve import resolve
from normfree.training.config_io import load_config, with_overrides
from normfree.training.distributed.world import start_world
from normfree.training.recipes import RECIPES
from normfree.training.trainer import Trainer

folder, plan, flags = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
torch.set_num_threads(1)
run_folder.draw_curves = lambda *args, **kwargs: None
step_of = Trainer.step


def config(out, more):
    path = folder / out / "config.toml"
    base = load_config(path) if path.exists() else with_overrides(RECIPES["scratch"](), flags)
    return with_overrides(base, more)


def train(world, out, *more, stop=0, copy=""):
    """One run of the plan; `stop`: ends by a signal after that step; `copy`: continues a copy of that run."""
    if copy and world.first:
        shutil.copytree(folder / copy, folder / out)
    world.barrier()

    def step(self, batch, at):
        result = step_of(self, batch, at)
        if at + 1 == stop and world.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Trainer.step = step
    try:
        loop.train(config(out, more), folder / out, console=Console(file=io.StringIO()))
    except loop.Stopped as stopped:
        assert stopped.step == stop
    Trainer.step = step_of


def restore(world, out, *more):
    """What a fresh trainer of the given mode holds after restoring the newest checkpoint of a run, beside it."""
    trainer = Trainer(resolve(config(out, more)), num_classes=3, samples=48, world=world)
    saved, _ = checkpoint.newest(folder / out / "checkpoints")
    trainer.restore_(saved if world.first else None)
    rows = trainer.optimizer.named_state()["head.weight"]
    here = (rows.to_local() if hasattr(rows, "to_local") else rows).shape[0]
    held = trainer.tensors()
    if world.first:
        same = {f"{file}:{k}": torch.equal(t, held[file][k])
                for file, part in saved.tensors.items() for k, t in part.items()}
        name = f"restored-{out}-{world.size}-{trainer.config.parallel}.pt"
        torch.save((same, sum(map(len, held.values())), here), folder / name)


def work(size, rank, port, tasks):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    world = start_world("cpu")
    for name, words, options in tasks:
        {"train": train, "restore": restore}[name](world, *words, **options)
    world.close()


for size, tasks in plan:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # one import of torch for all
    processes = [fork.Process(target=work, args=(size, rank, port, tasks)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"world of {size}: {[process.exitcode for process in processes]}")
'''


def work(folder: Path, plan: list, *flags: str) -> Path:
    dropped = ("RANK", "WORLD", "LOCAL_", "MASTER", "TORCHELASTIC")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    process = subprocess.run(
        [sys.executable, "-c", WORK, str(folder), json.dumps(plan), *shlex.split(FLAGS), *flags],
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


def train(mode: str, out: str, *more: str, **options: object) -> tuple:
    words = [] if mode == "as before" else ["--parallel", mode]
    return "train", [out, *words, *more], options


def restore(mode: str, out: str) -> tuple:
    return "restore", [out, "--parallel", mode], {}


def changing(steps: int) -> list[list[tuple]]:
    """A run in exact mode that changes its size: on 1, 4 and 2 processes, a third of its steps each."""
    return [
        [train("exact", "changing", stop=steps // 3)],
        [train("as before", "changing", stop=2 * steps // 3)],
        [train("as before", "changing")],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    first, second, third = changing(6)
    one = [*first, train("exact", "exact1"), train("replicated", "replicated1")]
    four = [*second, train("exact", "exact4")]
    four += [
        train("sharded", "sharded4", *shlex.split(TWO)),
        train("replicated", "replicated4", *shlex.split(TWO)),
    ]
    four += [
        train("sharded", "broken4", *shlex.split(TWO), stop=3),
        train("as before", "resumed4", copy="broken4"),
    ]
    two = [*third, train("exact", "exact2"), train("sharded", "sharded2"), train("replicated", "replicated2")]
    two += [train("sharded", "from4", copy="broken4"), train("replicated", "plain2", copy="broken4")]
    two += [restore(to, f"{of}4") for of in ("sharded", "replicated") for to in ("sharded", "replicated")]
    last = [train("sharded", "alone", copy="broken4"), restore("replicated", "sharded4")]
    return work(tmp_path_factory.mktemp("modes"), [(1, one), (4, four), (2, two), (1, last)])


def hashes(run: Path, step: int = 6) -> dict[str, str]:
    """sha256 of weights, average and momentum in a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
    found = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "state.json"}
    assert set(found) == {"model.safetensors", "ema.safetensors", "optim.safetensors"}
    return found


def tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}:{k}": v for f in files for k, v in load_file(f).items()}


def distance(one: Path, other: Path, *, least: int = 1) -> float:
    """Largest relative difference (L2) of any one tensor of `least` elements among weights, average and momentum."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    far = {k: float((a[k].double() - b[k].double()).norm()) for k in a}
    return max(far[k] / float(b[k].double().norm()) for k in a if far[k] > 1e-8 and b[k].numel() >= least)


# --- exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact2", "exact4", "changing"])
def test_exact_gives_the_same_bits_in_any_world(folder, name):
    """With dropout, stochastic depth, mixing and RandAugment; "changing" moved from 1 process to 4 and then to 2."""
    assert hashes(folder / name) == hashes(folder / "exact1")


def test_the_same_test_fails_without_exact(folder):
    runs = [hashes(folder / f"replicated{size}") for size in (1, 2)]
    assert all(runs[0][file] != runs[1][file] for file in runs[0])


@pytest.mark.slow
def test_exact_gives_the_same_bits_after_fifty_steps_on_eight(tmp_path):
    first, second, third = changing(51)
    plan = [(1, [*first, train("exact", "exact1")]), (4, [*second, train("exact", "exact4")])]
    plan += [(2, [*third, train("exact", "exact2")]), (8, [train("exact", "exact8")])]
    work(tmp_path, plan, "--length", "51st", "--log.evaluate_every", "51st", "--log.checkpoint_every", "51st")
    found = {
        name: hashes(tmp_path / name, 51) for name in ("exact1", "exact2", "exact4", "exact8", "changing")
    }
    assert len(set(map(str, found.values()))) == 1, found


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_sums_are_those_of_one_tree_however_the_list_is_dealt_out(count):
    torch.manual_seed(0)
    values = [[torch.randn(1000) * 10**i, torch.randn(())] for i in torch.rand(count)]

    def tree(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        if len(parts) == 1:
            return [t.clone() for t in parts[0]]
        half = len(parts) // 2
        return [a + b for a, b in zip(tree(parts[:half]), tree(parts[half:]), strict=True)]

    def counter(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        total = TreeSum()
        for part in parts:
            total.add([t.clone() for t in part])
            assert len(total._partial) <= count.bit_length()
        return total.total()

    expected = tree(values)
    for world in (w for w in (1, 2, 4, 8, 16) if w <= count):
        share = count // world
        dealt = [counter(values[r * share : (r + 1) * share]) for r in range(world)]
        assert all(map(torch.equal, tree(dealt), expected))
    if count > 4:  # else the bits would have been those of any order
        assert not torch.equal(sum(v[0] for v in values), expected[0])


def test_the_settings_of_exact_are_put_back():
    torch.backends.cudnn.benchmark = True
    try:
        with same_kernels():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
            assert torch.get_num_threads() == 1
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False


# --- sharded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_run_is_the_replicated_one_up_to_rounding(folder, size):
    """Compiled kernels take whole weights, torch's operations what is sharded, so that every sum is rounded otherwise.
    The largest difference is that of single numbers: the momentum of a skip gain, a sum over maps that nearly cancels.
    """
    assert 0 < distance(folder / f"sharded{size}", folder / f"replicated{size}") < 2e-5
    assert distance(folder / f"sharded{size}", folder / f"replicated{size}", least=2) < 5e-6
    rows = [[json.loads(line) for line in (folder / f"{mode}{size}" / "metrics.jsonl").read_text().splitlines()]
            for mode in ("sharded", "replicated")]  # fmt: skip
    for one, other in zip(*rows, strict=True):
        values = {k: v for k, v in one.items() if k != "images_per_s"}
        assert values == pytest.approx({k: v for k, v in other.items() if k != "images_per_s"}, rel=1e-4)


def test_a_sharded_run_that_was_stopped_continues_to_the_same_bits(folder):
    assert hashes(folder / "resumed4") == hashes(folder / "sharded4")


@pytest.mark.parametrize("name", ["from4", "plain2", "alone"])
def test_a_sharded_run_of_four_continues_on_fewer_and_in_another_mode(folder, name):
    """On 2 processes sharded, on 2 replicated, on 1. Mixing within a process's part differs after the third step, so
    the runs go on apart; up to there they are one."""
    assert hashes(folder / name, 3) == hashes(folder / "sharded4", 3)
    assert tensors(folder / name).keys() == tensors(folder / "sharded4").keys()


@pytest.mark.parametrize(("of", "size", "to"), [
    ("sharded4", 2, "sharded"), ("sharded4", 2, "replicated"), ("replicated4", 2, "sharded"),
    ("replicated4", 2, "replicated"), ("sharded4", 1, "replicated"),
])  # fmt: skip
def test_checkpoints_of_both_kinds_load_into_each_other(folder, of, size, to):
    same, count, rows = torch.load(folder / f"restored-{of}-{size}-{to}.pt")
    assert len(same) == count == len(tensors(folder / of))
    assert all(same.values()), [name for name, equal in same.items() if not equal]
    assert rows == (2 if to == "sharded" else 3)  # of the three classes, the first process has two


def test_the_model_of_a_sharded_run_is_whole(folder):
    from normfree.pretrained import from_pretrained

    average = load_file(folder / "sharded4" / "checkpoints" / "step-00000006" / "ema.safetensors")
    state = from_pretrained(folder / "sharded4").net.state_dict()
    assert all(torch.equal(average[k], v) for k, v in state.items())


# --- what is refused ----------------------------------------------------------------------------------


def config(mode: str, *, batch_size: int = 8, micro_batch: int = 2, **more: object) -> Config:
    inputs = InputConfig(batch_size=batch_size, micro_batch=micro_batch, image_size=8)
    return Config.model_validate({"parallel": mode, "input": inputs, "model": "nf_resnet_nano", **more})


@pytest.mark.parametrize(("mode", "more", "message"), [
    ("exact", {"model": "resnet_nano"}, "parallel='exact' with a batch-norm twin: its running statistics are of the "
     "images that a process has seen. Use a normalizer-free model."),
    ("exact", {"optim": OptimConfig(sam_rho=0.05)}, "parallel='exact' with optim.sam_rho: SAM climbs on the part of the "  # noqa: E501
     "batch that a process has. Use --optim.sam_rho 0."),
    ("exact", {"compile": True}, "parallel='exact' with compile: compiled kernels may add up in another order in "
     "each process. Use --compile false."),
    ("exact", {"patience": 3}, "parallel='exact' with patience: scores are computed in batches that depend on the "
     "number of processes. Use --patience 0."),
    ("sharded", {"model": "resnet_nano"}, "parallel='sharded' with a batch-norm twin: its statistics are of a "
     "process's own images, and it is small. Use --parallel replicated."),
    ("sharded", {"optim": OptimConfig(sam_rho=0.05)}, "parallel='sharded' with optim.sam_rho: SAM climbs on a process's "  # noqa: E501
     "own gradient, and FSDP2 only knows the sum. Use --optim.sam_rho 0."),
    ("sharded", {"compile": True}, "parallel='sharded' with compile: FSDP2 moves parameters between the blocks. Use "
     "--compile false."),
])  # fmt: skip
def test_what_a_mode_cannot_keep_is_refused_by_name(mode, more, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        check_mode(config(mode, **more), world_size=2)
    assert str(error.value) == message
    check_mode(config("replicated", **more), world_size=2)


def test_all_that_is_refused_is_told_at_once():
    with pytest.raises(ValueError, match=r"sam_rho: .*\n.*compile: .*\n.*patience: "):
        check_mode(config("exact", optim=OptimConfig(sam_rho=0.1), compile=True, patience=1), world_size=1)


@pytest.mark.parametrize(("batch_size", "micro_batch", "size", "message"), [
    (24, 4, 3, "parallel='exact' in 3 processes: expected 1, 2, 4, 8 or another power of two, so that sums meet in "
     "pairs. Nearest: 2 or 4."),
    (6, 1, 4, "input.batch_size=6 with parallel='exact' in 4 processes: expected a multiple of 4. Nearest: 8."),
    (24, 4, 2, "input.micro_batch=4 with parallel='exact', input.batch_size=24 and 2 processes: expected the batch "
     "over a power of two, so 12, 6, 3. Use 3: up to 8 processes can share the batch."),
    (64, 0, 1, "input.micro_batch=0 with parallel='exact', input.batch_size=64 and 1 process: expected the batch over "
     "a power of two, so 64, 32, 16, 8, 4, 2, 1. Use 8: up to 8 processes can share the batch."),
])  # fmt: skip
def test_exact_says_how_a_batch_may_be_cut(batch_size, micro_batch, size, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        check_mode(config("exact", batch_size=batch_size, micro_batch=micro_batch), world_size=size)
    assert str(error.value) == message


@pytest.mark.parametrize("batch_size", [1, 2, 12, 48, 64, 4096])
def test_the_sizes_that_exact_takes(batch_size):
    for world in (1, 2, 4, 8):
        found = exact_sizes(batch_size, world)
        cuts = [batch_size // n for n in found]
        assert all(
            n * v == batch_size and v >= world and v & (v - 1) == 0 for n, v in zip(found, cuts, strict=True)
        )
        expected = [
            n
            for n in range(batch_size, 0, -1)
            if batch_size % n == 0 and batch_size // n in {2**k for k in range(13)}
        ]
        assert found == [n for n in expected if batch_size // n >= world]
        for n in found:
            check_mode(config("exact", batch_size=batch_size, micro_batch=n), world_size=world)


def test_mixing_in_exact_stays_within_a_micro_batch():
    from normfree.data.loader import Batch
    from normfree.training.trainer import Trainer

    half = config(
        "exact",
        batch_size=8,
        micro_batch=4,
        device="cpu",
        augment=AugmentConfig(mixup=1.0, label_smoothing=0.0),
    )
    trainer = Trainer(half, num_classes=8, samples=8)
    batch = Batch(
        torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8), torch.arange(8), ("",) * 8, 0, 0
    )
    _, targets = trainer.prepare(batch, 0)
    assert targets[:4, 4:].eq(0).all() and targets[4:, :4].eq(0).all()  # noqa: PT018
    assert targets.sum(dim=1).allclose(torch.ones(8))
    assert not torch.equal(targets[:4, :4], targets[4:, 4:])  # each micro-batch has draws of its own


@pytest.mark.parametrize("word", ["--exact", "--parallel=exact"])
def test_a_short_word_for_exact(monkeypatch, tmp_path, word):
    from normfree.commands import train_command as command

    monkeypatch.setattr(command, "_train", lambda config, folder: config.parallel)
    assert command.train(["--data", "synthetic", word, "--out", str(tmp_path / "run")]) == "exact"


def test_a_run_does_not_enter_or_leave_exact(folder):
    """Between the other two it may move: they agree up to rounding."""
    from normfree.training import loop
    from normfree.training.config_io import load_config, with_overrides

    for run, mode in (("exact1", "replicated"), ("replicated1", "exact")):
        other = with_overrides(load_config(folder / run / "config.toml"), ["--parallel", mode])
        with pytest.raises(ValueError, match=rf"{run} was started with another parallel\. Drop the change"):
            loop.train(other, folder / run)
