"""bfloat16 concerns the forward and backward pass alone: weights, statistics, update and average stay float32.

"auto" measures which of the two is faster, and a run keeps the answer. The tests inject both answers.
"""

import io
import math
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from normfree import adaptive_clip_grad_, create_model
from normfree.training import loop, run_folder
from normfree.training.config import Config, ConfigError
from normfree.training.config_io import load_config, with_overrides
from normfree.training.folds import train_folds
from normfree.training.gradient import BatchGradient
from normfree.training.precision import LEAST_GAIN, cpu_gain, native_precision, ratio_of_medians
from normfree.training.recipes import RECIPES
from normfree.training.stop import StoppedBySignal

OFF = {"drop_rate": 0.0, "stochdepth_rate": 0.0, "skip_gain": 1.0}
# Measured cosine similarity of the two gradients: NFNet 0.99992, NF-RegNet and the small variant 0.99995, NF-ResNet-50
# 0.9972 to 0.9984, since the gradients of ReLU and max pooling jump where rounding changes a sign or a maximum.
FAMILIES = {
    "nfnet_f0": ({"widths": (32, 64, 96, 96), "depths": (1, 2, 3, 2), "group_width": 8, **OFF}, 0.999),
    "nf_regnet_b0": ({"widths": (24, 48, 96, 176), "depths": (1, 2, 3, 2), **OFF}, 0.999),
    "nf_resnet_micro": ({"widths": (16, 32, 64), **OFF}, 0.999),
    "nf_resnet50": ({"widths": (32, 64, 128, 256), "depths": (2, 2, 2, 2), **OFF}, 0.99),
}


def gradient(net: torch.nn.Module, images: Tensor, labels: Tensor, *, half: bool) -> Tensor:
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = net(images)
    assert logits.dtype == (torch.bfloat16 if half else torch.float32)
    F.cross_entropy(logits.float(), labels).backward()
    return torch.cat([p.grad.flatten().double() for p in net.parameters()])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_in_bfloat16_and_float32_have_the_same_direction(name):
    changes, least = FAMILIES[name]
    torch.manual_seed(0)
    net = create_model(name, num_classes=10, **changes).to(memory_format=torch.channels_last)
    images, labels = torch.randn(12, 3, 64, 64), torch.arange(12) % 10
    for _ in range(2):  # at the start, and after ten steps
        exact, half = (gradient(net, images, labels, half=h) for h in (False, True))
        assert not torch.equal(exact, half)
        assert F.cosine_similarity(exact, half, dim=0) > least
        for _ in range(10):
            gradient(net, images, labels, half=False)
            adaptive_clip_grad_(net, 0.05)
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.05 * p.grad


FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=40,val=8 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.workers 0 --length 4st --optim.warmup 1st --log.checkpoint_every 2st --device cpu"
)


def config(*flags: str) -> Config:
    return with_overrides(RECIPES["scratch"](), [*FLAGS, *flags])


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)


def train(out: Path, *flags: str, precision: str = "auto") -> str:
    """Train, or continue the run in `out`; return what was printed."""
    console = Console(file=io.StringIO(), width=300)
    loop.train(config("--precision", precision, *flags), out, console=console)
    return console.file.getvalue()


def state(out: Path) -> dict[str, Tensor]:
    files = sorted((out / "checkpoints" / "step-00000004").glob("*.safetensors"))
    assert [f.stem for f in files] == ["ema", "model", "optim"]
    return {f"{f.stem}:{k}": v for f in files for k, v in load_file(f).items()}


def same_bits(a: Path, b: Path) -> bool:
    one, other = state(a), state(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def measures(monkeypatch, gain: float) -> None:
    """Let bfloat16 be `gain` times as fast as float32."""
    monkeypatch.setattr("normfree.training.precision.cpu_gain", lambda: gain)


def test_weights_momentum_average_gradients_and_loss_stay_float32(tmp_path, monkeypatch):
    seen, original = [], BatchGradient.__call__

    def recording(self, images, targets, step):
        found = original(self, images, targets, step)
        seen.append({t.dtype for t in (images, targets, *found, *(p.grad for p in self.net.parameters()))})
        return found

    monkeypatch.setattr(BatchGradient, "__call__", recording)
    train(tmp_path / "run", precision="bfloat16")
    assert seen == [{torch.float32}] * 4
    assert {t.dtype for t in state(tmp_path / "run").values()} == {torch.float32}


# --- auto -------------------------------------------------------------------------------------------------------


def test_auto_is_the_faster_one_and_the_run_records_it(tmp_path, monkeypatch):
    text = "convolutions in bfloat16 take {} times as long as in float32 on this CPU"
    for gain, name, ratio in ((2.0, "bfloat16", "0.50"), (0.1, "float32", "10.00")):
        measures(monkeypatch, gain)
        out = tmp_path / name
        printed = train(out)
        line = f"precision {name}: {text.format(ratio)}\n"
        assert line in printed
        assert line in (out / "log.txt").read_text(encoding="utf-8")
        assert load_config(out / "config.toml").precision == name
        train(tmp_path / f"given {name}", precision=name)
        assert same_bits(out, tmp_path / f"given {name}")
    assert not same_bits(tmp_path / "float32", tmp_path / "bfloat16")


def test_a_run_keeps_what_it_began_with_on_another_machine(tmp_path, monkeypatch):
    for gain, other in ((2.0, 0.1), (0.1, 2.0)):
        whole, stopped = tmp_path / f"whole {gain}", tmp_path / f"stopped {gain}"
        measures(monkeypatch, gain)
        train(whole)
        original = loop.Trainer.step

        def step(self, batch, number, original=original):
            found = original(self, batch, number)
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "step", step)
            with pytest.raises(StoppedBySignal):
                train(stopped)
        measures(monkeypatch, other)
        printed = train(stopped)  # with "auto", as a program in Python passes it again
        began = "bfloat16" if gain > 1 else "float32"
        assert f"precision {began}: as when {stopped} was started" in printed.replace("\n", " ")
        assert f"continuing {stopped} after step 2" in printed
        assert same_bits(whole, stopped)


def test_a_slow_bfloat16_is_obeyed_with_a_warning(tmp_path):
    printed = train(tmp_path / "run", "--length", "1st", precision="bfloat16")
    assert "precision bfloat16: WARNING: it takes 10.0 times as long as float32 on this CPU" in printed
    assert "precision" not in train(tmp_path / "other", "--length", "1st", precision="float32")


def test_all_folds_have_the_data_type_of_the_first(tmp_path, monkeypatch):
    """Also if the others are trained on another machine."""
    measures(monkeypatch, 2.0)
    out, console = tmp_path / "folds", Console(quiet=True)
    train_folds(config("--precision", "auto"), out, folds=2, console=console)
    shutil.rmtree(out / "fold-2")
    measures(monkeypatch, 0.1)
    train_folds(config("--precision", "auto"), out, folds=2, console=console)
    for file in ("folds.toml", "fold-1/config.toml", "fold-2/config.toml"):
        assert load_config(out / file).precision == "bfloat16"
    stored = (out / "folds.toml").read_text(encoding="utf-8")  # of an earlier version
    (out / "folds.toml").write_text(stored.replace('"bfloat16"', '"auto"'), encoding="utf-8")
    shutil.rmtree(out / "fold-2")
    train_folds(config("--precision", "auto"), out, folds=2, console=console)
    assert load_config(out / "fold-2/config.toml").precision == "bfloat16"
    (out / "folds.toml").write_text(stored.replace('"bfloat16"', '"auto"'), encoding="utf-8")
    with pytest.raises(ValueError, match="precision"):
        train_folds(config("--precision", "float32"), out, folds=2, console=console)


@pytest.mark.parametrize(
    ("given", "near"),
    [("bf16", "bfloat16"), ("BFLOAT16", "bfloat16"), ("fp32", "float32"), ("float16", "bfloat16")],
)
def test_an_unknown_data_type_is_answered_with_the_nearest(given, near):
    with pytest.raises(ConfigError, match=f"precision='{given}'. Did you mean '{near}'\\? Allowed: 'auto'"):
        config("--precision", given)


def test_the_rule_for_each_device(monkeypatch):
    for gain, name in ((LEAST_GAIN - 0.01, "float32"), (LEAST_GAIN, "bfloat16")):
        measures(monkeypatch, gain)
        assert native_precision(torch.device("cpu")).name == name
    for native, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, n=native: n)
        assert native_precision(torch.device("cuda")).name == name
    assert native_precision(torch.device("mps")).name == "float32"


def test_the_measurement_is_a_ratio_of_medians_of_alternating_calls():
    now, calls = [0.0], []

    def timed(name: str, seconds: list[float]):
        each = iter(seconds)

        def run() -> None:
            calls.append(name)
            now[0] += next(each)

        return run

    slow, fast = timed("slow", [50.0, 6.0, 5.0, 90.0]), timed("fast", [70.0, 2.0, 3.0, 1.0])
    # the first call of each compiles kernels and does not count; medians are not moved by one slow call
    assert ratio_of_medians(slow, fast, rounds=3, clock=lambda: now[0]) == 3.0
    assert calls == ["slow", "fast"] * 4


def test_this_processor_is_measured_once_without_random_numbers_and_with_all_threads_left():
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    cpu_gain.cache_clear()
    gain = cpu_gain()  # imported before the fixture of conftest.py replaced it
    assert torch.get_num_threads() == 2
    assert math.isfinite(gain)
    assert gain > 0
    assert cpu_gain() == gain
    assert torch.equal(torch.get_rng_state(), before)


def test_configs_of_earlier_versions_load(tmp_path):
    for text, precision in (
        ('precision = "float32"', "float32"),
        ('precision = "bfloat16"', "bfloat16"),
        ("", "auto"),
    ):
        (tmp_path / "config.toml").write_text(f'data = "emoji"\n{text}\n', encoding="utf-8")
        assert load_config(tmp_path / "config.toml").precision == precision
