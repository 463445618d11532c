"""A disk that refuses: the run goes on or ends in one line, and the previous checkpoint stays intact."""

import errno
import io
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError

from normfree import files
from normfree.cli import main
from normfree.diagnose.metrics_file import read_metrics
from normfree.training import checkpoint, loop, metrics, resume, run_folder
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.divergence import DivergedError
from normfree.training.early_stopping import Best
from normfree.training.metrics import MetricsWriter
from normfree.training.trainer import Trainer
from normfree.weights import tensor_file

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=24,val=9 --model nf_resnet_nano --input.image_size 16 --device cpu "
    "--input.batch_size 8 --input.workers 0 --length 6st --optim.warmup 1st --log.every 1 --log.evaluate_every 6st "
    "--log.checkpoint_every 2st --optim.ema_decay 0.5"
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)


def train(out: Path, *flags: str) -> Console:
    console, path = Console(file=io.StringIO(), width=500), out / "config.toml"
    loop.train(
        load_config(path) if path.exists() else with_overrides(Config(), [*FLAGS, *flags]),
        out,
        console=console,
    )
    return console


class Disk:
    """Refuses the writes of safetensors files, fsyncs or renames while `broken` is set."""

    def __init__(self, patch: pytest.MonkeyPatch, operation: str, number: int) -> None:
        self.broken = False

        def refuse(original, error):
            def call(*args, **kwargs):
                if self.broken:
                    raise error
                return original(*args, **kwargs)

            return call

        error = OSError(number, os.strerror(number))
        if operation == "write":
            import safetensors.torch

            told = SafetensorError(f"Error while serializing: IoError(Os {{ code: {number} }})")
            patch.setattr(safetensors.torch, "save_file", refuse(safetensors.torch.save_file, told))
        elif operation == "fsync":
            patch.setattr(files.os, "fsync", refuse(os.fsync, error))
        else:
            patch.setattr(Path, "replace", refuse(Path.replace, error))


def at(monkeypatch, step: int, act) -> None:
    """Call `act()` once, at the end of step `step`."""
    original, calls = Trainer.step, [act]

    def stepping(self, batch, index):
        result = original(self, batch, index)
        if index + 1 == step and calls:
            calls.pop()()
        return result

    monkeypatch.setattr(Trainer, "step", stepping)


@pytest.mark.parametrize("operation", ["write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_a_refused_checkpoint_is_one_error_and_leaves_the_previous_one(tmp_path, operation, number):
    tensors = {"model": {"w": torch.ones(3)}}
    checkpoint.save(tmp_path, 1, tensors=tensors, state={}, keep=2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, operation, number).broken = True
        with pytest.raises(OSError):  # noqa: PT011  the text depends on the operation
            checkpoint.save(tmp_path, 2, tensors=tensors, state={}, keep=2)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert checkpoint.newest(tmp_path)[0].step == 1


def test_training_goes_on_without_a_checkpoint_until_there_is_space(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    out, disk = tmp_path / "run", Disk(monkeypatch, "write", errno.ENOSPC)
    monkeypatch.setattr(resume, "RETRY_STEPS", 1)
    at(monkeypatch, 3, lambda: setattr(disk, "broken", True))
    at(monkeypatch, 5, lambda: setattr(disk, "broken", False))
    printed = train(out).file.getvalue()
    assert printed.count("training goes on") == 1
    assert "the checkpoint of step 4 could not be written: model.safetensors cannot be written" in printed
    assert "; the last one is step-00000002; training goes on. Fix: make " in printed
    assert checkpoint.read(out / "checkpoints" / "step-00000005").state["metrics"]["bytes"] > 0  # tried again
    mine, theirs = (
        checkpoint.newest(folder / "checkpoints")[0].tensors for folder in (out, tmp_path / "whole")
    )
    assert all(torch.equal(mine["model"][k], theirs["model"][k]) for k in theirs["model"])


def test_a_disk_that_refuses_once_costs_no_checkpoint(tmp_path, monkeypatch):
    out, disk, original = tmp_path / "run", Disk(monkeypatch, "write", errno.EIO), checkpoint.save

    def save(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        finally:
            disk.broken = False

    monkeypatch.setattr(checkpoint, "save", save)
    at(monkeypatch, 4, lambda: setattr(disk, "broken", True))
    assert "could not be written" not in train(out).file.getvalue()
    assert (out / "checkpoints" / "step-00000004").is_dir()


def test_a_lost_best_checkpoint_does_not_cost_the_run(tmp_path, monkeypatch):
    """A disk that was full when the scores were best."""
    out, scores = tmp_path / "run", iter([(30.0, 1.0), (20.0, 1.0), (20.0, 1.0)])

    def after(self, score, loss, step):
        return original(self, *next(scores), step)

    original = Best.after
    monkeypatch.setattr(Best, "after", after)
    at(monkeypatch, 6, lambda: shutil.rmtree(out / "checkpoints" / "step-00000002"))
    flags = ("--patience", "9", "--log.evaluate_every", "2st")
    printed = train(out, *flags).file.getvalue()
    assert (
        "step-00000002: no readable MANIFEST.json (UnreadableFileError). The model is that of the last step."
        in printed
    )
    assert json.loads((out / "results.json").read_text())["step"] == 6


def test_a_refused_last_checkpoint_ends_in_one_line_and_the_run_resumes(tmp_path, monkeypatch, capsys):
    out, disk = tmp_path / "run", Disk(monkeypatch, "write", errno.ENOSPC)
    at(monkeypatch, 5, lambda: setattr(disk, "broken", True))
    assert main(["train", *FLAGS, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "normfree: the checkpoint of step 6 could not be written: model.safetensors cannot"
    )
    assert error.count("\n") == 1
    assert checkpoint.newest(out / "checkpoints")[0].step == 4
    disk.broken = False
    train(out)
    assert checkpoint.newest(out / "checkpoints")[0].step == 6


def test_a_full_disk_while_the_model_folder_is_written_is_one_line(tmp_path, monkeypatch, capsys):
    out, disk = tmp_path / "run", Disk(monkeypatch, "write", errno.ENOSPC)
    original = checkpoint.save

    def save(*args, **kwargs):
        result = original(*args, **kwargs)
        disk.broken = args[1] == 6
        return result

    monkeypatch.setattr(checkpoint, "save", save)
    assert main(["train", *FLAGS, "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(out.rglob("*.partial")) == []
    disk.broken = False
    train(out)
    assert (out / "model" / "model.safetensors").is_file()


def test_the_model_of_a_finished_run_is_never_a_mixture(tmp_path, monkeypatch):
    """A finished run that is named again leaves its model alone, and a new one replaces it as a whole."""
    out = tmp_path / "run"
    train(out)
    (out / "model" / "notes.txt").write_text("mine")
    before = {p.name: (p.stat().st_ino, p.read_bytes()) for p in (out / "model").iterdir()}
    train(out)
    assert {p.name: (p.stat().st_ino, p.read_bytes()) for p in (out / "model").iterdir()} == before
    original = run_folder.save_pretrained

    def other(model, folder, *, card):
        with torch.no_grad():
            model.net.head.bias += 1
        return original(model, folder, card=card)

    monkeypatch.setattr(run_folder, "save_pretrained", other)
    moved = Path.rename

    def failing(self, target):
        if ".new." in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return moved(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            train(out)
    assert {p.name: p.read_bytes() for p in (out / "model").iterdir()} == {
        k: v for k, (_, v) in before.items()
    }
    train(out)
    after = {p.name: p.read_bytes() for p in (out / "model").iterdir()}
    assert after.keys() == before.keys()
    assert after["notes.txt"] == b"mine"
    assert after["model.safetensors"] != before["model.safetensors"][1]


def test_the_config_is_replaced_as_a_whole(tmp_path):
    """A kill while it is written leaves the old one, which no longer has its name."""
    out = tmp_path / "run"
    train(out)
    with (out / "config.toml").open() as old:
        train(out)
        assert os.stat(out / "config.toml").st_ino != os.fstat(old.fileno()).st_ino
        assert old.read() == (out / "config.toml").read_text()


def test_pointers_and_leftovers_are_mended_at_the_next_start(tmp_path, monkeypatch):
    """As after a kill between the checkpoint and the file `last`."""
    out = tmp_path / "run"
    train(out)
    for name, text in (("last", "step-00000002\n"), ("best", "step-0000\x00")):
        (out / "checkpoints" / name).write_text(text)
    left = [out / "checkpoints" / ".step-00000008.1.partial", out / ".config.toml.4194305.partial"]
    left[0].mkdir()
    left[1].write_text("half")
    monkeypatch.setattr(files.os, "kill", lambda pid, number: (_ for _ in ()).throw(ProcessLookupError))
    train(out)
    assert (out / "checkpoints" / "last").read_text() == "step-00000006\n"
    assert (out / "checkpoints" / "best").read_text() == "step-00000006\n"
    assert [path for path in left if path.exists()] == []


def test_a_run_folder_that_is_moved_in_mid_run_does_not_become_two(tmp_path, monkeypatch):
    out, moved, step = tmp_path / "run", tmp_path / "moved", Trainer.step

    def stepping(trainer, batch, index):
        if index == 3:
            out.rename(moved)
        return step(trainer, batch, index)

    monkeypatch.setattr(Trainer, "step", stepping)
    with pytest.raises(
        ValueError, match=r"checkpoint of step 6 could not be written: the run folder was moved or"
    ):
        train(out)
    assert not out.exists()
    assert (moved / "checkpoints" / "last").read_text() == "step-00000002\n"
    monkeypatch.setattr(Trainer, "step", step)
    train(moved)
    assert (moved / "checkpoints" / "last").read_text() == "step-00000006\n"


def test_the_deletion_of_old_checkpoints_is_finished_at_the_next_start(tmp_path):
    """As after a kill while the last step's save was deleting one, of which a part is left."""
    out = tmp_path / "run"
    train(out)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    half, damaged = (out / "checkpoints" / f"step-{step:08d}" for step in (1, 9))
    for path in (half, damaged):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    train(out)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [*kept, damaged.name]


def test_a_damaged_best_pointer_does_not_cost_the_best_checkpoint(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, tensors={"m": {"w": torch.ones(1)}}, state={}, keep=2, best=1)
        (tmp_path / "best").write_bytes(b"step-0000000\xb1\n")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000001",
        "step-00000003",
        "step-00000004",
    ]


def test_lines_of_metrics_wait_for_space(tmp_path, monkeypatch):
    """A full disk takes half of a line; later the whole line is there once."""
    writer = MetricsWriter(tmp_path / "m.jsonl", step=0)
    writer.write(step=1, loss=1.0)

    class Full:
        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, data):
            return self.file.write(data[: len(data) // 2] if self.full else data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    writer._file = full = Full(writer._file)
    writer.write(step=2, loss=2.0)
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 1.0}]
    full.full = False
    writer.write(step=3, loss=3.0)
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2, 3]
    text = (tmp_path / "m.jsonl").read_bytes()
    assert writer.state() == {"bytes": len(text), "sha256": metrics.hashlib.sha256(text).hexdigest()}
    writer.close()


def test_tensors_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    def poison(self, batch, index):
        result = original(self, batch, index)
        if index + 1 == 4:
            self.optimizer.named_state()["head.weight"][0, 0] = float("nan")
        return result

    original = Trainer.step
    monkeypatch.setattr(Trainer, "step", poison)
    with pytest.raises(
        DivergedError, match=r"^step 4: 1 tensors are not finite: 'optim:head\.weight'\. Fix: resume"
    ):
        train(tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 2


def test_a_checkpoint_with_values_that_are_not_finite_is_passed_over(tmp_path):
    for step, value in ((1, 0.0), (2, float("inf"))):
        checkpoint.save(tmp_path, step, tensors={"optim": {"w": torch.tensor([value])}}, state={}, keep=2)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert passed_over == [f"{tmp_path}/step-00000002: values are not finite: 'optim:w'."]


def test_an_error_of_the_safetensors_library_is_one_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"^x cannot be written: "):
        tensor_file.write_tensors(tmp_path / "none" / "x", {"w": torch.ones(1)})
