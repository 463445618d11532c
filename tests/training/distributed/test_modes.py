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
    """Return the sha256 of the weights, averaged weights and momenta of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())
    found = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "state.json"}
    assert set(found) == {"model.safetensors", "ema.safetensors", "optim.safetensors"}
    return found


def tensors(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}:{k}": v for f in files for k, v in load_file(f).items()}


def distance(one: Path, other: Path, *, least: int = 1, step: int = 6) -> float:
    """Return the largest relative L2 difference of weights, averages and momenta with at least `least` elements."""
    a, b = tensors(one, step), tensors(other, step)
    assert a.keys() == b.keys()
    far = {k: float((a[k].double() - b[k].double()).norm()) for k in a}
    compared = [k for k in a if far[k] > 1e-8 and b[k].numel() >= least]
    return max((far[k] / float(b[k].double().norm()) for k in compared), default=0.0)


# --- exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exact2", "exact4", "changing"])
def test_exact_gives_the_same_bits_in_any_world(folder, name):
    """With dropout, stochastic depth, mixing and RandAugment. "changing" ran on 1, then on 4, then on 2 processes."""
    assert hashes(folder / name) == hashes(folder / "exact1")


def test_replicated_does_not_give_the_same_bits(folder):
    runs = [hashes(folder / f"replicated{size}") for size in (1, 2)]
    assert all(runs[0][file] != runs[1][file] for file in runs[0])


def test_a_contrastive_run_gives_the_same_bits_in_any_world_and_the_same_numbers_in_any_mode(folder):
    """The loss compares the views of both processes; dropout and stochastic depth are on."""
    assert hashes(folder / "simclr_exact2", 3) == hashes(folder / "simclr_exact1", 3)
    for mode in ("sharded", "replicated"):
        # Rounding changes the momentum of scalars most: it is a sum of products that nearly cancel.
        far = distance(folder / f"simclr_{mode}2", folder / "simclr_exact1", step=3, least=2)
        assert far < 1e-5, mode
    scores = [
        json.loads((folder / f"simclr_{name}" / "results.json").read_text()) for name in ("exact1", "exact2")
    ]
    assert scores[0]["average"]["loss"] == pytest.approx(scores[1]["average"]["loss"], rel=1e-4)
    assert scores[0]["knn_top1"] == scores[1]["knn_top1"]


@pytest.mark.slow
def test_exact_gives_the_same_bits_after_fifty_steps_on_eight(start_worlds, plans, tmp_path):
    start_worlds(plans.fifty_steps(tmp_path))
    names = ("exact1", "exact2", "exact4", "exact8", "changing")
    found = {name: hashes(tmp_path / name, 51) for name in names}
    assert len(set(map(str, found.values()))) == 1, found


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_sums_are_those_of_one_tree_for_any_number_of_processes(count):
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
    if count > 4:  # with fewer, another order may give the same bits
        assert not torch.equal(sum(v[0] for v in values), expected[0])


def test_the_settings_of_exact_are_restored():
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


def test_exact_gives_the_same_bits_with_an_optimizer_of_torch(folder):
    assert hashes(folder / "muon2") == hashes(folder / "muon1")


@pytest.mark.parametrize("mode", ["exact", "sharded", "replicated"])
def test_every_mode_freezes_parts_and_has_factors_on_the_learning_rate(folder, mode):
    run, replicated = folder / f"frozen_{mode}", folder / "frozen_replicated"
    assert distance(run, replicated) < 2e-5 or mode == "exact"  # its micro-batches draw other numbers
    first, last = tensors(run, 2), tensors(run)
    kept = {k.partition(":")[2] for k in first if k.startswith("model:") and torch.equal(first[k], last[k])}
    assert kept == {k for k in kept if k.startswith(("stem.", "stages.0.0."))}
    assert "stem.conv0.weight" in kept
    assert not any(k.startswith(("optim:stem.", "optim:stages.0.0.")) for k in last)


# --- sharded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_a_sharded_run_is_the_replicated_one_up_to_rounding(folder, size):
    """Compiled kernels update whole weights and PyTorch ops update shards, so all sums are rounded differently.

    Scalars differ most: the momentum of a skip gain is a sum over feature maps in which the terms nearly cancel.
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
    """On 2 processes sharded, on 2 replicated, on 1.

    The random mixing in each process depends on the number of processes, so the runs differ after the third step.
    """
    assert hashes(folder / name, 3) == hashes(folder / "sharded4", 3)
    assert tensors(folder / name).keys() == tensors(folder / "sharded4").keys()


@pytest.mark.parametrize(("of", "size", "to"), [
    ("sharded4", 2, "sharded"), ("sharded4", 2, "replicated"), ("replicated4", 2, "sharded"),
    ("replicated4", 2, "replicated"), ("sharded4", 1, "replicated"),
])  # fmt: skip
def test_checkpoints_of_sharded_and_replicated_runs_are_interchangeable(folder, of, size, to):
    same, count, rows = torch.load(folder / f"restored-{of}-{size}-{to}.pt")
    assert len(same) == count == len(tensors(folder / of))
    assert all(same.values()), [name for name, equal in same.items() if not equal]
    assert rows == (2 if to == "sharded" else 3)  # rank 0 has two of the three classes


def test_the_model_of_a_sharded_run_is_whole(folder):
    from normfree.pretrained import from_pretrained

    average = load_file(folder / "sharded4" / "checkpoints" / "step-00000006" / "ema.safetensors")
    state = from_pretrained(folder / "sharded4").net.state_dict()
    assert all(torch.equal(average[k], v) for k, v in state.items())


# --- unsupported settings ----------------------------------------------------------------------------------


def config(mode: str, *, batch_size: int = 8, micro_batch: int = 2, **more: object) -> Config:
    inputs = InputConfig(batch_size=batch_size, micro_batch=micro_batch, image_size=8)
    return Config.model_validate({"parallel": mode, "input": inputs, "model": "nf_resnet_nano", **more})


@pytest.mark.parametrize(("mode", "more", "message"), [
    ("exact", {"model": "resnet_nano"}, "parallel='exact' with a batch-norm twin: its running statistics depend on "
     "which images each process sees. Fix: use a normalizer-free model."),
    ("exact", {"optim": OptimConfig(sam_rho=0.05)}, "parallel='exact' with optim.sam_rho: SAM perturbs the weights "
     "with the gradient of the part of the batch in each process. Fix: use --optim.sam_rho 0."),
    ("exact", {"compile": True}, "parallel='exact' with compile: compiled kernels may add in another order in each "
     "process. Fix: use --compile false."),
    ("exact", {"patience": 3}, "parallel='exact' with patience: evaluation batches depend on the number of processes. "
     "Fix: use --patience 0."),
    ("sharded", {"model": "resnet_nano"}, "parallel='sharded' with a batch-norm twin: its statistics would differ "
     "between processes. Fix: use --parallel replicated."),
    ("sharded", {"optim": OptimConfig(sam_rho=0.05)}, "parallel='sharded' with optim.sam_rho: SAM needs the gradient "
     "of each process, and FSDP2 provides only the sum. Fix: use --optim.sam_rho 0."),
    ("sharded", {"compile": True}, "parallel='sharded' with compile: FSDP2 moves parameters between the compiled "
     "blocks. Fix: use --compile false."),
])  # fmt: skip
def test_unsupported_settings_are_refused_with_the_reason(mode, more, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        check_mode(resolve(config(mode, **more)), world_size=2)
    assert str(error.value) == message
    check_mode(resolve(config("replicated", **more)), world_size=2)


def test_all_unsupported_settings_are_reported_at_once():
    with pytest.raises(ValueError, match=r"sam_rho: .*\n.*compile: .*\n.*patience: "):
        check_mode(
            resolve(config("exact", optim=OptimConfig(sam_rho=0.1), compile=True, patience=1)), world_size=1
        )


@pytest.mark.parametrize(("batch_size", "micro_batch", "size", "message"), [
    (24, 4, 3, "parallel='exact' in 3 processes. Allowed: 1, 2, 4, 8 or another power of two, because sums are added "
     "in pairs. Fix: use 2 or 4."),
    (6, 1, 4, "input.batch_size=6 with parallel='exact' in 4 processes. Allowed: a multiple of 4. Fix: use 8."),
    (24, 4, 2, "input.micro_batch=4 with parallel='exact', input.batch_size=24 and 2 processes. Allowed: 12, 6, 3 "
     "(the batch size divided by a power of two). Fix: use 3, with which up to 8 processes can share the batch."),
    (64, 0, 1, "input.micro_batch=0 with parallel='exact', input.batch_size=64 and 1 process. Allowed: 64, 32, 16, 8, "
     "4, 2, 1 (the batch size divided by a power of two). Fix: use 8, with which up to 8 processes can share the "
     "batch."),
])  # fmt: skip
def test_exact_reports_the_allowed_micro_batches(batch_size, micro_batch, size, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        check_mode(resolve(config("exact", batch_size=batch_size, micro_batch=micro_batch)), world_size=size)
    assert str(error.value) == message


@pytest.mark.parametrize("batch_size", [1, 2, 12, 48, 64, 4096])
def test_exact_sizes_are_all_powers_of_two_parts_of_the_batch(batch_size):
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
    assert not torch.equal(targets[:4, :4], targets[4:, 4:])  # each micro-batch has its own random numbers


@pytest.mark.parametrize("flag", ["--exact", "--parallel=exact"])
def test_the_short_flag_for_exact(monkeypatch, tmp_path, flag):
    from normfree.commands import train_command as command

    monkeypatch.setattr(command, "_train", lambda config, folder: config.parallel)
    assert command.train(["--data", "synthetic", flag, "--out", str(tmp_path / "run")]) == "exact"


def test_a_run_does_not_enter_or_leave_exact(folder):
    """A run may change between the other two modes, which agree up to rounding."""
    from normfree.training import loop
    from normfree.training.config_io import load_config, with_overrides

    for run, mode in (("exact1", "replicated"), ("replicated1", "exact")):
        other = with_overrides(load_config(folder / run / "config.toml"), ["--parallel", mode])
        with pytest.raises(
            ValueError, match=rf"{run} was started with another parallel\. Fix: drop the change"
        ):
            loop.train(other, folder / run)
