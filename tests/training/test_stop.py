"""A signal at any moment saves and ends with 128 + its number; a dead worker or a bad image saves and ends too."""

import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from normfree.data.supervision import LoaderError
from normfree.diagnose.metrics_file import read_metrics
from normfree.training import checkpoint, loop, run_folder, stop
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.stop import StoppedBySignal, stop_signals
from normfree.training.trainer import Trainer

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=24,val=9 --precision float32 --model nf_resnet_nano "
    "--input.image_size 16 --input.batch_size 8 --input.workers 0 --length 6st --optim.warmup 1st "
    "--log.every 2 --log.evaluate_every 3st --log.checkpoint_every 100st --optim.ema_decay 0.5"
)
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _usual_handlers(monkeypatch):
    """Background jobs ignore SIGINT, and a run leaves ignored signals alone. Nothing is plotted, which takes long."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(out: Path, *flags: str) -> Console:
    console = Console(file=io.StringIO(), width=200)
    path = out / "config.toml"
    loop.train(
        load_config(path) if path.exists() else with_overrides(Config(), [*FLAGS, *flags]),
        out,
        console=console,
    )
    return console


def after(monkeypatch, step: int, act) -> None:
    """Call `act()` at the end of step `step`."""
    original = Trainer.step

    def stepping(self, batch, at):
        result = original(self, batch, at)
        if at + 1 == step:
            act()
        return result

    monkeypatch.setattr(Trainer, "step", stepping)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
        train(out)
    return out


def assert_same(a: Path, b: Path) -> None:
    """Check that two finished runs have the same tensors, model and results, and no leftovers."""
    for name in ("model", "ema", "optim"):
        one, two = (load_file(out / f"checkpoints/step-00000006/{name}.safetensors") for out in (a, b))
        assert one.keys() == two.keys()
        assert [k for k in one if not torch.equal(one[k], two[k])] == []
    for name in ("results.json", "model/model.safetensors", "checkpoints/last", "checkpoints/best"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in read_metrics(out / "metrics.jsonl")]
        for out in (a, b)
    ]
    assert rows[0] == rows[1]
    assert list(b.rglob("*.partial")) == []


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_saves_after_the_step_and_ends_with_its_exit_code(
    uninterrupted, tmp_path, monkeypatch, number
):
    out = tmp_path / "run"
    after(monkeypatch, 2, lambda: signal.raise_signal(number))
    with pytest.raises(StoppedBySignal) as stopped:
        train(out)
    assert (stopped.value.step, stopped.value.exit_code) == (2, 128 + number)
    assert checkpoint.newest(out / "checkpoints")[0].step == 2
    monkeypatch.undo()
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    train(out)
    assert_same(uninterrupted, out)


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_again(
    uninterrupted, tmp_path, monkeypatch, step
):
    out, original, images = tmp_path / "run", loop.evaluate, []

    def evaluate(net, source, **options):
        images.append(len(source))
        if len(images) == step // 3 * 2:  # the average, whose scores would be the second
            signal.raise_signal(signal.SIGTERM)
        return original(net, source, **options)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(StoppedBySignal) as stopped:
        train(out)
    assert stopped.value.step == step
    state = checkpoint.newest(out / "checkpoints")[0].state
    assert (state["evaluated"], state["best"]["step"]) == (False, 0 if step == 3 else 3)
    monkeypatch.setattr(loop, "evaluate", original)
    train(out)
    assert_same(uninterrupted, out)


def test_a_signal_before_the_first_step_ends_at_once_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_data", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StoppedBySignal) as stopped:
        train(tmp_path / "run")
    assert (stopped.value.step, stopped.value.exit_code) == (None, 143)
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_while_the_model_folder_is_written_loses_nothing(uninterrupted, tmp_path, monkeypatch):
    original = run_folder.save_pretrained

    def interrupted(model, folder, **options):
        original(model, folder, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run_folder, "save_pretrained", interrupted)
    with pytest.raises(StoppedBySignal):
        train(tmp_path / "run")
    assert list((tmp_path / "run").rglob("*.partial")) == []
    monkeypatch.setattr(run_folder, "save_pretrained", original)
    train(tmp_path / "run")
    assert_same(uninterrupted, tmp_path / "run")


def test_a_second_signal_acts_as_usual():
    with stop_signals() as stopping, stopping.deferred():
        signal.raise_signal(signal.SIGINT)
        assert stopping.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_the_caller_ignores_or_handles_stay_so():
    """nohup ignores SIGHUP, and shells let background jobs ignore SIGINT."""
    heard = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    with stop_signals() as stopping:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
            signal.raise_signal(number)
        with stop_signals() as inner, inner.deferred():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        assert (inner.number, stopping.number) == (signal.SIGTERM, 0)
    assert heard == [signal.SIGUSR1, signal.SIGUSR1]


@pytest.mark.skipif(not Path("/proc").exists(), reason="the handled signals of a process are found in /proc")
def test_a_signal_while_the_command_starts_ends_with_one_line(tmp_path):
    command = [sys.executable, "-m", "normfree", "train", *FLAGS, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def caught() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("SigCgt:")[2].split()[0], 16)

    while process.poll() is None and not caught() >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=600)[0]
    assert (process.returncode, text) == (143, "\nstopped before the first step; nothing is lost.\n")
    assert not (tmp_path / "run").exists()


CLOSING = """
import os, signal, sys
from normfree.cli import main
from normfree.training.trainer import Trainer
original, reading = Trainer.step, int(sys.argv[1])
def stepping(self, batch, at):
    if at == 1:
        os.close(reading)
        os.kill(os.getpid(), signal.SIGHUP)
    return original(self, batch, at)
Trainer.step = stepping
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.exit(main(["train", *sys.argv[2:]]))
"""


def test_a_closed_terminal_does_not_spoil_the_exit_code(tmp_path):
    """SIGHUP comes with a terminal that takes no more output."""
    reading, writing = os.pipe()
    command = [sys.executable, "-c", CLOSING, str(reading), *FLAGS, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, pass_fds=(reading,)
    )
    os.close(reading)
    os.close(writing)
    error = process.communicate(timeout=600)[1]
    assert (process.returncode, error) == (129, "")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_killed_worker_saves_and_ends_in_one_line(uninterrupted, tmp_path, monkeypatch):
    out, workers = tmp_path / "run", []

    def kill():
        children = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children")
        workers.extend(int(pid) for pid in children.read_text().split())
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        for worker in workers:
            os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)

    after(monkeypatch, 2, kill)
    with pytest.raises(
        LoaderError, match=r"^a process that loads images has ended \(killed by SIGKILL\)\. Fix: resume"
    ):
        train(out, "--input.workers", "2")
    assert len(workers) >= 2
    assert checkpoint.newest(out / "checkpoints")[0].step >= 2
    assert "everything is saved\n" in (out / "log.txt").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    train(out)
    assert_same(uninterrupted, out)


def test_an_image_that_goes_bad_in_mid_run_saves_and_is_named(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16)).save(data / name / f"{i}.png")
    after(monkeypatch, 2, lambda: [p.write_bytes(b"gone") for p in data.rglob("*.png")])
    with pytest.raises(ValueError, match=r"b/\d\.png: not an image|a/\d\.png: not an image"):
        train(tmp_path / "run", "--data", str(data))
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 2


def test_a_process_of_torchrun_stops_when_its_launcher_is_gone(monkeypatch):
    """Its new parent shows it. Without torchrun nothing is watched."""
    sent, parents = [], iter([1, 1, 2])
    monkeypatch.setattr(stop.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(stop.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(stop, "_INTERVAL", 0.0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    threads = threading.active_count()
    stop.stop_with_launcher()
    assert threading.active_count() == threads
    stop._watch(next(parents))
    assert sent == [(os.getpid(), signal.SIGTERM)]
