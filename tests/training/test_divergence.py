"""Gradients that are not finite: images are named, and a run may go back to its last checkpoint, which is counted."""

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from normfree.diagnose.metrics_file import read_metrics
from normfree.training import checkpoint, loop, run_folder
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.divergence import DivergedError
from normfree.training.gradient import BatchGradient
from normfree.training.trainer import Trainer

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=24,val=9 --model nf_resnet_nano --input.image_size 16 --device cpu "
    "--input.batch_size 8 --input.workers 0 --length 9st --optim.warmup 1st --log.every 1 --log.evaluate_every 3st "
    "--log.checkpoint_every 3st --optim.ema_decay 0.5 --optim.schedule constant"
)
ROLLBACK = ("--on-divergence", "rollback:lr=0.5,times=2")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)


def train(out: Path, *flags: str) -> str:
    console, path = Console(file=io.StringIO(), width=500), out / "config.toml"
    config = load_config(path) if path.exists() else with_overrides(Config(), [*FLAGS, *flags])
    loop.train(with_overrides(config, flags), out, console=console)
    return console.file.getvalue()


def diverge(monkeypatch, *, step: int, above: float) -> list[float]:
    """Let the gradient of a step be infinite while the learning rate is above a bound; return the rates of steps."""
    original, stepping, rates = BatchGradient.__call__, Trainer.step, []

    def recording(self, batch, index):
        rates.append(self.rate_at(index))
        return stepping(self, batch, index)

    def poisoned(self, images, targets, index):
        result = original(self, images, targets, index)
        if index == step and rates[-1] > above:
            self.net.head.bias.grad[0] = float("inf")
        return result

    monkeypatch.setattr(Trainer, "step", recording)
    monkeypatch.setattr(BatchGradient, "__call__", poisoned)
    return rates


@pytest.mark.parametrize(("step", "last"), [(7, 6), (1, 0)])
def test_a_run_goes_back_to_its_last_checkpoint_with_a_lower_rate(tmp_path, monkeypatch, step, last):
    """With `last` 0 there is none yet, and it starts again."""
    rates = diverge(monkeypatch, step=step, above=0.03)
    text = train(tmp_path / "run", *ROLLBACK)
    steps = [*range(step + 1), *range(last, step + 1), *range(last, 9)]
    factors = [1.0] * (step + 1) + [0.5] * (step + 1 - last) + [0.25] * (9 - last)
    warm = [0.0 if index == 0 else 0.1 for index in steps]
    assert rates == pytest.approx([f * rate for f, rate in zip(factors, warm, strict=True)])
    assert text.count("to the last checkpoint; the learning rate is multiplied by") == 2
    assert "Return 2 of 2 to the last checkpoint; the learning rate is multiplied by 0.25." in text
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rollbacks"] == 2
    assert "not finite 2 times" in (tmp_path / "run" / "model" / "README.md").read_text()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 10))


def test_the_number_of_returns_has_a_limit(tmp_path, monkeypatch):
    diverge(monkeypatch, step=4, above=0.0)
    with pytest.raises(
        DivergedError, match=r"^after 2 returns to the last checkpoint: step 4: 1 of "
    ) as error:
        train(tmp_path / "run", *ROLLBACK)
    assert str(error.value).endswith("Fix: start another run with --optim.lr 0.033.")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 3


def test_a_run_that_was_killed_after_it_went_back_takes_the_same_steps(tmp_path, monkeypatch):
    diverge(monkeypatch, step=4, above=0.09)
    train(tmp_path / "whole", *ROLLBACK)
    out, stepping, calls, fatal = tmp_path / "run", Trainer.step, [], []

    class Killed(BaseException):
        pass

    def killed(self, batch, index):
        calls.append(index)
        if [calls.count(4), index] == fatal:
            raise Killed
        return stepping(self, batch, index)

    monkeypatch.setattr(Trainer, "step", killed)
    for moment in ((2, 4), (2, 8)):  # before and after the first checkpoint with the lower rate
        calls.clear()
        fatal[:] = moment
        with pytest.raises(Killed):
            train(out, *ROLLBACK)
    monkeypatch.setattr(Trainer, "step", stepping)
    train(out)
    for name in ("model", "ema", "optim"):
        one, two = (
            load_file(run / f"checkpoints/step-00000009/{name}.safetensors")
            for run in (out, tmp_path / "whole")
        )
        assert all(torch.equal(one[k], two[k]) for k in two)
    assert json.loads((out / "results.json").read_text())["rollbacks"] == 1


def test_a_run_that_has_stopped_so_goes_on_when_it_is_told_to_go_back(tmp_path, monkeypatch):
    diverge(monkeypatch, step=4, above=0.09)
    with pytest.raises(DivergedError, match="Fix: resume with --on-divergence rollback"):
        train(tmp_path / "run")
    train(tmp_path / "run", "--on-divergence", "rollback")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 9


def test_the_image_with_outputs_that_are_not_finite_is_named(small_trainer, some_batch):
    trainer, batch = small_trainer(), some_batch(0)
    names = tuple(f"{i}.png" for i in range(len(batch)))
    prepare = trainer.prepare

    def spoiled(batch, step):
        images, targets = prepare(batch, step)
        images[3, 0, 5, 5] = float("nan")
        return images, targets

    trainer.prepare = spoiled
    with pytest.raises(
        DivergedError, match=r"; the outputs for '3\.png' are not finite; the last checkpoint"
    ):
        trainer.step(replace(batch, names=names), 0)
