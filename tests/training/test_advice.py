"""Settings that hardly do what they seem to are named, networks fit in memory, and the remaining time is printed."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from normfree.models.cost import count
from normfree.models.variants import variant_of
from normfree.models.zoo import create_model
from normfree.training import advice as advice_module
from normfree.training import console, default_network, loop, memory, memory_checks
from normfree.training.advice import RunSize, advice
from normfree.training.config import Config
from normfree.training.config_io import with_overrides
from normfree.training.console import ProgressLine, RunLog
from normfree.training.default_network import chosen_network
from normfree.training.loading import MOST, cores, loading
from normfree.training.recipes import RECIPES

GPU = torch.device("cuda")
FINE = "--input.batch_size 10 --length 50ep --optim.warmup 5ep --input.workers 1"


def found(flags: str, *, samples: int = 100, parameters: int = 1_000_000) -> list[str]:
    config = with_overrides(Config(), [*FINE.split(), *flags.split()])
    steps = max(1, loop.steps_of(config.length, samples=samples, batch_size=config.input.batch_size))
    return advice(config, RunSize(samples, steps, parameters))


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("", ""),
        ("--input.batch_size 101 --optim.warmup 0st", "a batch of 101 is more than the 100 training images"),
        (
            "--input.batch_size 202 --augment.repeats 2 --length 120ep --optim.warmup 0st --objective simclr",
            "some of them more than once, and simclr pushes copies of an image apart; --input.batch_size 100",
        ),
        ("--input.batch_size 100 --length 60ep --optim.warmup 0st", ""),
        ("--length 0.01ep --optim.warmup 0st", "a length of 0.01ep is less than half a step of 10 images"),
        (
            "--length 49st --optim.warmup 0st",
            "a length of 49st gives only 49 x 10 images; a longer --length gives more steps",
        ),
        ("--optim.warmup 50ep", "the warm-up of 50ep takes all 500 steps"),
        ("--patience 49", "patience 49 cannot end the run early, because it is evaluated 50 times"),
        ("--patience 48", ""),
        ("--patience 1 --log.evaluate_every 500ep", "because it is evaluated once"),
        ("--input.workers 99", "99 processes load images on 2 cores; --input.workers 2"),
    ],
)
def test_each_of_these_settings_is_named_alone(
    flags: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice_module, "cores", lambda: 2)
    lines = found(flags)
    assert len(lines) == bool(text), lines
    assert text in "".join(lines)


def test_a_large_network_on_few_images_is_better_fine_tuned() -> None:
    few = found("--data photos", parameters=70_000_000)
    assert "70 M parameters start from random weights on 100 images" in few[0]
    assert "normfree train finetune --data photos --weights FOLDER" in few[0]
    assert found("--weights runs/x", parameters=70_000_000) == []
    assert found("--length 9st --optim.warmup 0st", samples=20_000, parameters=70_000_000)[1:] == []


@pytest.mark.parametrize("patience", [3, 4])
def test_a_patience_that_cannot_end_a_run_early_is_told_by_the_rule_of_the_loop(patience: int) -> None:
    """Of five evaluations, the first is the best one: what the loop does decides what is right."""
    from normfree.training.early_stopping import Best

    best = Best().after(50.0, 1.0, 10)
    ended = 5
    for evaluation in range(2, 6):
        best = best.after(40.0, 1.0, 10 * evaluation)
        if best.plateau(patience):
            ended = evaluation
            break
    lines = found(f"--length 10ep --log.evaluate_every 2ep --patience {patience} --optim.warmup 1ep")
    assert (ended == 5) == bool(lines) == (patience == 4)


def test_images_are_loaded_by_no_more_processes_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for usable, workers in ((1, 1), (3, 3), (64, MOST)):
        monkeypatch.setattr("normfree.training.loading.cores", lambda usable=usable: usable)
        for name in ("scratch", "finetune", "cifar", "simclr"):
            assert loading(RECIPES[name]()).workers == workers
    config = with_overrides(Config(), ["--input.workers", "3:deadline=7.5"])
    assert loading(config) == (3, 7.5)
    assert loading(Config()) == (1, 600.0)


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * alone))
    assert cores() == 1


# --- memory -----------------------------------------------------------------------------------------------------


def test_a_cpu_gets_a_network_that_it_can_train_and_a_gpu_the_largest_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = RECIPES["scratch"]()
    name, reason = chosen_network(scratch, torch.device("cpu"))
    assert name == "nf_resnet_micro_64"
    assert reason.startswith("no --model was given: nf_resnet_micro_64 at 64 px, because there is no GPU")
    assert count(variant_of(name)).macs < count(variant_of("nfnet_f0")).macs / 200
    needs = {"nfnet_f0": 9e9, "nf_regnet_b0": 2e9, "nf_resnet_micro_64": 1e8}
    monkeypatch.setattr(default_network, "_needs", lambda config, network: int(needs[network]))
    for free, expected in ((10e9, "nfnet_f0"), (8.9e9, "nf_regnet_b0"), (1e9, "nf_resnet_micro_64")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: int(free))
        name, reason = chosen_network(scratch, GPU)
        assert name == expected
        assert f"of the {free / 1e9:.1f} GB that are free on cuda" in reason


def test_what_a_network_needs_grows_with_the_images_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "line", lambda net, **options: (1000, 10))
    config = RECIPES["scratch"]()
    small = config.model_copy(update={"input": config.input.model_copy(update={"micro_batch": 8})})
    whole, part = (default_network._needs(c, "nf_resnet_nano") for c in (config, small))
    assert whole - part == 10 * (32 - 8)
    # weights, gradients, average and momentum in float32
    assert part - 1000 - 8 * 10 == 4 * 4 * count(variant_of("nf_resnet_nano")).parameters


RUN = (
    "--data synthetic:classes=2,size=16,train=8,val=4 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 4 --input.workers 0 --length 2st --device cpu"
)


def run(tmp_path, flags: str = "") -> str:
    out = Console(file=io.StringIO(), width=300)
    loop.train(with_overrides(Config(), [*RUN.split(), *flags.split()]), tmp_path / "run", console=out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_network_that_does_not_fit_is_refused_before_it_is_built(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 6_000_000)  # the state alone needs 7.3 MB
    monkeypatch.setattr(loop.Trainer, "_network", lambda *args, **options: pytest.fail("built"))
    with pytest.raises(
        ValueError, match=r"nf_resnet_nano has 0\.4 M parameters, .* need 0\.0 GB.*smaller --model"
    ):
        run(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_pass_that_does_not_fit_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 8_000_000)  # the state needs 6.2 MB
    monkeypatch.setattr(memory_checks, "MOST_BYTES_PER_MAC", 1e3)
    monkeypatch.setattr(memory, "line", lambda net, **options: (100_000, 1_000_000))
    with pytest.raises(ValueError, match=r"4 images of 16 x 16 at once .* --input\.micro_batch auto"):
        run(tmp_path)
    monkeypatch.setattr(memory, "line", lambda net, **options: (100_000, 9_000_000))
    with pytest.raises(
        ValueError, match=r"1 image of 16 x 16 at once .* smaller --input\.image_size or --model"
    ):
        run(tmp_path, "--input.micro_batch 1")


def test_the_bound_that_saves_the_prediction_is_above_what_is_predicted() -> None:
    for name, size in (("nf_resnet_nano", 32), ("nf_resnet_micro_64", 64)):
        _, each = memory.line(create_model(name), image_size=size)
        assert each < memory_checks.MOST_BYTES_PER_MAC * count(variant_of(name), image_size=size).macs


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_full_memory_in_a_step_is_one_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def full(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("normfree.training.gradient.BatchGradient.__call__", full)
    with pytest.raises(
        ValueError, match=r"^the memory of cpu is full: nf_resnet_nano with micro-batches of 4 images"
    ):
        run(tmp_path)


# --- the remaining time -----------------------------------------------------------------------------------------


def test_the_remaining_time_is_printed_into_a_pipe_also_between_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    values = {"loss": 1.0, "train_top1": 50.0, "images_per_s": 9.0, "clipped": 0.1}
    with ProgressLine(RunLog(Console(file=out, width=300)), step=100, total_steps=200) as line:
        for step in range(101, 121):  # 5 seconds for each step
            clock[0] += 5.0
            if step == 110:
                line.update(step, **values)
            else:
                line.advance(step)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 102/200  8 min left"  # 98 steps of 5 s
    assert re.fullmatch(r"step 110/200  loss 1\.000 .* 8 min left", lines[1])
    assert len(lines) == 2


def test_fast_steps_print_scores_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    values = {"loss": 1.0, "train_top1": 50.0, "images_per_s": 9.0, "clipped": 0.1}
    with ProgressLine(RunLog(Console(file=out, width=300)), step=0, total_steps=1000) as line:
        for step in range(1, 241):
            clock[0] += 0.125
            if step % 8:
                line.advance(step)
            else:
                line.update(step, **values)
    assert [text.partition("  ")[2][:4] for text in out.getvalue().splitlines()] == ["loss"] * 3
