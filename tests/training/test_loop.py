"""Laws of training: a resumed run equals an uninterrupted one, micro-batches are exact, updates are finite."""

import io
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from normfree.data.loader import Batch, train_batches
from normfree.data.sources.open import open_source
from normfree.data.transforms.train import train_transform
from normfree.training import checkpoint, loop, run_folder
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.divergence import DivergedError
from normfree.training.gradient import BatchGradient
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.stop import StoppedBySignal
from normfree.training.trainer import Trainer

DATA = "synthetic:classes=3,size=16,train=48,val=12"
FLAGS = shlex.split(
    f"--data {DATA} --precision float32 --model nf_resnet_nano --input.image_size 16 --input.batch_size 10 "
    "--input.workers 0 --length 12st --optim.warmup 3st --optim.lr 0.05 --log.every 2 --log.evaluate_every 6st "
    "--log.checkpoint_every 5st --augment.mixup 0.2 --augment.cutmix 1.0 --augment.randaugment trivial "
    "--net.drop_rate 0.3 --net.stochdepth_rate 0.5 --optim.ema_decay 0.9"
)
LAST = "checkpoints/step-00000012"


@pytest.fixture(autouse=True, scope="module")
def _no_plots() -> Iterator[None]:
    """Do not plot the curves, which takes a third of the time of such a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
        yield


def config(*flags: str) -> Config:
    return with_overrides(RECIPES["scratch"](), [*FLAGS, *flags])


def quiet() -> Console:
    return Console(file=io.StringIO())


def state(out: Path) -> dict[str, torch.Tensor]:
    files = sorted((out / LAST).glob("*.safetensors"))
    assert [f.stem for f in files] == ["ema", "model", "optim"]
    return {f"{f.stem}:{k}": v for f in files for k, v in load_file(f).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_log(a: Path, b: Path) -> None:
    """Check that each line is there once and equal except the speed; also means over steps before and after a stop."""
    first, second = (
        [{k: v for k, v in r.items() if k != "images_per_s"} for r in rows(out)] for out in (a, b)
    )
    assert first == second


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    loop.train(config(), out, console=quiet())
    return out


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send a signal to this process after `step` steps."""
    original = Trainer.step

    def stepping(self, batch, at):
        result = original(self, batch, at)
        if at + 1 == step:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, "step", stepping)


# In the default run: the first step, between and at evaluations and checkpoints, the last but one.
STEPS = [
    step if step in (1, 5, 7, 11) else pytest.param(step, marks=pytest.mark.slow) for step in range(1, 12)
]


@pytest.mark.parametrize("step", STEPS)
def test_stopped_at_any_step_and_continued_gives_the_same_bits(uninterrupted, tmp_path, monkeypatch, step):
    stop_after(monkeypatch, step)
    with pytest.raises(StoppedBySignal) as stopped:
        loop.train(config(), tmp_path / "run", console=quiet())
    assert (stopped.value.step, stopped.value.exit_code) == (step, 143)
    monkeypatch.undo()
    loop.train(load_config(tmp_path / "run" / "config.toml"), tmp_path / "run", console=quiet())
    assert_same_bits(uninterrupted, tmp_path / "run")
    assert_same_log(uninterrupted, tmp_path / "run")
    assert [r["step"] for r in rows(tmp_path / "run")] == [2, 4, 6, 6, 8, 10, 12, 12]


def test_a_run_with_all_random_parts_stops_and_continues_too(tmp_path, monkeypatch):
    """Fresh pairs of images, RandAugment after mixing and SAM: their random numbers depend on the step too."""
    flags = ("--augment.mix_with", "fresh", "--augment.randaugment", "2x3", "--optim.sam_rho", "0.05")
    loop.train(config(*flags), tmp_path / "whole", console=quiet())
    stop_after(monkeypatch, 7)
    with pytest.raises(StoppedBySignal):
        loop.train(config(*flags), tmp_path / "run", console=quiet())
    monkeypatch.undo()
    continued = load_config(tmp_path / "run" / "config.toml")
    loop.train(continued, tmp_path / "run", console=quiet())
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    loop.train(config(*flags, "--input.workers", "2"), tmp_path / "other", console=quiet())
    assert_same_bits(tmp_path / "whole", tmp_path / "other")


@pytest.mark.parametrize("optimizer", ["adamw", "nadam", "muon"])
def test_a_run_with_an_optimizer_of_torch_stops_and_continues_too(tmp_path, monkeypatch, optimizer):
    flags = ("--optim.optimizer", optimizer, "--optim.body", "train:layer_decay=0.8")
    loop.train(config(*flags), tmp_path / "whole", console=quiet())
    stop_after(monkeypatch, 7)
    with pytest.raises(StoppedBySignal):
        loop.train(config(*flags), tmp_path / "run", console=quiet())
    monkeypatch.undo()
    loop.train(load_config(tmp_path / "run" / "config.toml"), tmp_path / "run", console=quiet())
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    assert_same_log(tmp_path / "whole", tmp_path / "run")
    assert (
        f"optimizer {optimizer}: learning rate 0.05, weight decay 0.05"
        in (tmp_path / "run/log.txt").read_text()
    )


def test_workers_do_not_change_a_bit(uninterrupted, tmp_path):
    loop.train(config("--input.workers", "2"), tmp_path / "run", console=quiet())
    assert_same_bits(uninterrupted, tmp_path / "run")


def test_the_written_config_reproduces_the_run(uninterrupted, tmp_path):
    loop.train(load_config(uninterrupted / "config.toml"), tmp_path / "again", console=quiet())
    assert_same_bits(uninterrupted, tmp_path / "again")


def test_another_seed_is_another_run(uninterrupted, tmp_path):
    loop.train(config("--seed", "1"), tmp_path / "run", console=quiet())
    first, second = state(uninterrupted), state(tmp_path / "run")
    assert not torch.equal(first["model:stem.conv0.weight"], second["model:stem.conv0.weight"])


def test_a_finished_run_does_not_change_when_it_is_continued(uninterrupted):
    before = state(uninterrupted)
    loop.train(load_config(uninterrupted / "config.toml"), uninterrupted, console=quiet())
    assert all(torch.equal(v, before[k]) for k, v in state(uninterrupted).items())


def start(out: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a run in a process of its own, or continue the run in `out`."""
    args = [str(out)] if (out / "config.toml").exists() else [*FLAGS, *flags, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "normfree", "train", *args], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def killed(out: Path, ready: Callable[[], bool], delay: float = 0.0) -> bool:
    """Start or continue a run and kill it `delay` seconds after `ready`. Return True if it was still running."""
    process = start(out)
    while process.poll() is None and not ready():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def lines(out: Path) -> int:
    """Return the number of lines of metrics.jsonl."""
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").exists() else 0


def saving(out: Path) -> bool:
    """Return True from the start of the first save on."""
    return any((out / "checkpoints").glob(".step-*")) or (out / "checkpoints" / "step-00000005").exists()


def assert_finishes_like(uninterrupted: Path, out: Path) -> None:
    process = start(out)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert_same_bits(uninterrupted, out)
    assert_same_log(uninterrupted, out)


@pytest.mark.slow
def test_killed_without_warning_and_continued_gives_the_same_bits(uninterrupted, tmp_path):
    out = tmp_path / "run"
    assert killed(out, lambda: lines(out) > 0)  # between steps
    assert killed(out, lambda: saving(out))  # while the first checkpoint is saved, or just after
    assert_finishes_like(uninterrupted, out)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(8))
def test_killed_many_times(uninterrupted, tmp_path, trial):
    chance, out, kills = random.Random(trial), tmp_path / "run", 0
    points = [
        lambda: (out / ".lock").exists(),
        lambda: lines(out) > 0,
        lambda: saving(out),
        lambda: (out / "results.json").exists(),
    ]
    for ready in points:
        kills += killed(out, ready, chance.uniform(0.0, 0.4))
    assert kills >= 3  # at least 24 kills of running processes in all trials
    assert_finishes_like(uninterrupted, out)


@pytest.mark.skipif(not Path("/proc").exists(), reason="the children of a process are found in /proc")
def test_sigterm_saves_a_checkpoint_and_ends_all_processes(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--length", "100000st", "--input.workers", "2")
    while process.poll() is None and lines(out) < 2:
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.terminate()
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 143
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    assert passed_over == []
    assert text.endswith(
        f"stopped after step {saved.step}; everything is saved. Resume: normfree train {out}\n"
    )
    assert not any(Path("/proc", worker).exists() for worker in workers)


def trainer_and_batch(*flags: str) -> tuple[Trainer, Batch]:
    resolved = resolve(config(*flags))
    split = open_source(DATA)
    trainer = Trainer(resolved, num_classes=3, samples=48)
    transform = train_transform(image_size=16)
    batch = next(train_batches(split.train, transform, batch_size=10, seed=0, num_steps=1))
    return trainer, batch


def batch_gradient(model: str, micro_batch: int) -> torch.Tensor:
    off = ("--net.drop_rate", "0", "--net.stochdepth_rate", "0", "--model", model)
    trainer, batch = trainer_and_batch(*off, "--input.micro_batch", str(micro_batch))
    trainer.gradients(*trainer.prepare(batch, 0), 0)
    return torch.cat([p.grad.flatten() for p in trainer.net.parameters()])


@pytest.mark.parametrize("micro_batch", [pytest.param(1, marks=pytest.mark.slow), 3, 5])
def test_micro_batches_are_exact_without_batch_statistics(micro_batch):
    for model, low, high in (("nf_resnet_nano", 0.0, 1e-5), ("resnet_nano", 0.1, 100.0)):
        whole, cut = batch_gradient(model, 0), batch_gradient(model, micro_batch)
        assert low <= float((whole - cut).norm() / whole.norm()) <= high, model


def test_sam_takes_the_gradient_at_perturbed_weights_and_steps_from_the_original_ones():
    off = ("--net.drop_rate", "0", "--net.stochdepth_rate", "0")
    plain, batch = trainer_and_batch(*off)
    images, targets = plain.prepare(batch, 2)
    sharp, _ = trainer_and_batch(*off, "--optim.sam_rho", "0.3")
    start = [p.detach().clone() for p in sharp.net.parameters()]
    with sharp._perturbed(images, targets, 2):
        perturbed = [p.detach().clone() for p in sharp.net.parameters()]
    assert all(torch.equal(p, s) for p, s in zip(sharp.net.parameters(), start, strict=True))
    uphill = [p - s for p, s in zip(perturbed, start, strict=True)]
    plain.gradients(images[::5], targets[::5], 2)  # two of the ten images decide the direction
    gradient = torch.cat([p.grad.flatten() for p in plain.net.parameters()])
    moved = torch.cat([u.flatten() for u in uphill])
    torch.testing.assert_close(moved, 0.3 * gradient / gradient.norm(), rtol=1e-3, atol=1e-6)

    stepped, _ = trainer_and_batch(*off, "--optim.sam_rho", "0.3")
    stepped.step(batch, 2)
    by_hand, _ = trainer_and_batch(*off)  # a plain step with the gradient at the perturbed weights
    by_hand.net.load_state_dict(dict(zip(by_hand.net.state_dict(), perturbed, strict=True)))
    by_hand.gradients(images, targets, 2)
    by_hand.net.load_state_dict(dict(zip(by_hand.net.state_dict(), start, strict=True)))
    by_hand.optimizer.set_lr(stepped.optimizer.param_groups[0]["lr"])
    by_hand.update.step(2)
    for one, other in zip(stepped.net.parameters(), by_hand.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_dropout_depends_on_seed_and_step_alone():
    trainer, batch = trainer_and_batch()

    def gradient(step: int, hidden: int) -> torch.Tensor:
        torch.manual_seed(hidden)  # has no effect
        trainer.optimizer.zero_grad()
        trainer.gradients(*trainer.prepare(batch, 0), step)
        return trainer.net.head.weight.grad.clone()

    assert torch.equal(gradient(3, hidden=1), gradient(3, hidden=2))
    assert not torch.equal(gradient(3, hidden=1), gradient(4, hidden=1))


def test_the_loss_falls(tmp_path):
    flags = "--length 60st --augment.mixup 0 --augment.cutmix 0 --augment.randaugment off --augment.crop_min 0.8 " \
            "--log.evaluate_every 60st --net.drop_rate 0 --net.stochdepth_rate 0"  # fmt: skip
    loop.train(config(*flags.split()), tmp_path / "run", console=quiet())
    losses = [r["loss"] for r in rows(tmp_path / "run") if "loss" in r]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize(
    "mode", ["agc", "norm", *(pytest.param(m, marks=pytest.mark.slow) for m in ("value", "off"))]
)
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(tmp_path, monkeypatch, mode):
    original = BatchGradient.__call__

    def poisoned(self, images, targets, step):
        result = original(self, images, targets, step)
        if step == 7:
            self.net.stages[1][0].conv1.weight.grad[0, 0, 0, 0] = float("nan" if mode == "norm" else "inf")
        return result

    monkeypatch.setattr(BatchGradient, "__call__", poisoned)
    with pytest.raises(DivergedError) as error:
        loop.train(config("--optim.clip", mode), tmp_path / "run", console=quiet())
    text = str(error.value)
    assert text.startswith("step 7: 1 of ")
    assert "stages.1.0.conv1.weight" in text
    assert text.endswith(
        "Fix: resume with --on-divergence rollback, or start another run with --optim.lr 0.017."
    )
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in kept.values())


def test_the_step_is_in_the_published_order(monkeypatch):
    """Clip the raw gradient, then apply decay and momentum, then update the average."""
    trainer, batch = trainer_and_batch("--optim.warmup", "0st", "--optim.weight_decay", "0.1")
    before = {n: p.detach().clone() for n, p in trainer.net.named_parameters()}
    twin, _ = trainer_and_batch("--optim.warmup", "0st", "--optim.weight_decay", "0.1")
    twin.gradients(*twin.prepare(batch, 0), 0)
    trainer.step(batch, 0)
    for name, p in twin.net.named_parameters():
        gradient, vector = p.grad.double(), p.numel() == max(p.shape, default=1)
        flat, weights = (
            t.double().flatten() if vector else t.double().flatten(1) for t in (gradient, before[name])
        )
        norm, limit = flat.norm(dim=-1), 0.04 * weights.norm(dim=-1).clamp(min=1e-3)
        factor = torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0)
        clipped = gradient if name == "head.weight" else (flat * factor.unsqueeze(-1)).view_as(gradient)
        decayed = clipped + (0.1 * before[name].double() if name.endswith("weight") else 0.0)
        # in the first step the momentum is the gradient
        expected = before[name].double() - 0.05 * (decayed + 0.9 * decayed)
        now = dict(trainer.net.named_parameters())[name].detach().double()
        torch.testing.assert_close(now, expected, rtol=1e-5, atol=1e-8, msg=name)
        average = dict(trainer.ema.module.named_parameters())[name].double()
        torch.testing.assert_close(average, 0.1 * before[name].double() + 0.9 * now, rtol=1e-5, atol=1e-7)


def test_training_starts_from_the_weights_of_another_run(uninterrupted, tmp_path):
    """With a learning rate of almost 0, the weights of the new run are the averaged weights of the other run."""
    flags = (
        "--weights",
        str(uninterrupted),
        "--length",
        "1st",
        "--optim.lr",
        "1e-12",
        "--optim.warmup",
        "0st",
    )
    loop.train(config(*flags), tmp_path / "run", console=quiet())
    ours = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    theirs = load_file(uninterrupted / "model" / "model.safetensors")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-9, msg=name)


def test_fine_tuning_keeps_the_classifier_only_for_the_same_classes(uninterrupted, tmp_path):
    """With other classes, all weights except those of the classifier are loaded."""
    still = shlex.split(
        "--length 1st --optim.lr 1e-12 --optim.warmup 0st --input.batch_size 8 --input.workers 0 --weights"
    )
    theirs = load_file(uninterrupted / "model" / "model.safetensors")
    for classes, kept in ((3, True), (5, False)):
        out = tmp_path / str(classes)
        console = quiet()
        args = ["--data", f"synthetic:classes={classes},size=16,train=40,val=10", *still, str(uninterrupted)]
        loop.train(with_overrides(RECIPES["finetune"](), args), out, console=console)
        assert load_config(out / "config.toml").model == "nf_resnet_nano"
        ours = load_file(out / "checkpoints" / "step-00000001" / "model.safetensors")
        for name in theirs.keys() - {"head.weight", "head.bias"}:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9, msg=name)
        assert torch.allclose(ours["head.weight"][:3], theirs["head.weight"], atol=1e-9) == kept
        reported = "a new classifier for 5 classes on the network of" in console.file.getvalue()
        assert reported != kept


def test_auto_needs_weights_to_name_the_network(tmp_path):
    with pytest.raises(ValueError, match=r"^model is 'auto', the network of --weights, and no weights are given\. "
                                         r"Fix: add --weights FOLDER, or --model NAME\.$"):  # fmt: skip
        loop.train(with_overrides(RECIPES["finetune"](), ["--data", DATA]), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()
