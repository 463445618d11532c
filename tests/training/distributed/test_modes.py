"""The modes of `parallel`: exact gives the same bits in any world, sharded the same run up to rounding; both continue
each other's runs. The runs are made by tests/workers/modes_worker.py; the tests read the run folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normfree.training.config import AugmentConfig, Config, InputConfig, OptimConfig
from normfree.training.distributed.exact import TreeSum, same_kernels
from normfree.training.distributed.modes import check_mode, exact_sizes
from normfree.training.resolve import resolve


@pytest.fixture(scope="module")
def folder(worlds) -> Path:
    return worlds / "modes"


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
def test_exact_gives_the_same_bits_after_fifty_steps_on_eight(start_worlds, plans, tmp_path):
    start_worlds(plans.fifty_steps(tmp_path))
    names = ("exact1", "exact2", "exact4", "exact8", "changing")
    found = {name: hashes(tmp_path / name, 51) for name in names}
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
        check_mode(resolve(config(mode, **more)), world_size=2)
    assert str(error.value) == message
    check_mode(resolve(config("replicated", **more)), world_size=2)


def test_all_that_is_refused_is_told_at_once():
    with pytest.raises(ValueError, match=r"sam_rho: .*\n.*compile: .*\n.*patience: "):
        check_mode(
            resolve(config("exact", optim=OptimConfig(sam_rho=0.1), compile=True, patience=1)), world_size=1
        )


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
        check_mode(resolve(config("exact", batch_size=batch_size, micro_batch=micro_batch)), world_size=size)
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
            check_mode(resolve(config("exact", batch_size=batch_size, micro_batch=n)), world_size=world)


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
    trainer = Trainer(resolve(half), num_classes=8, samples=8)
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
        with pytest.raises(
            ValueError, match=rf"{run} was started with another parallel\. Fix: drop the change"
        ):
            loop.train(other, folder / run)
