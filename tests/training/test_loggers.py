"""Loggers: copies of metrics.jsonl, without a step twice or missing, and never the end of a run."""

import importlib.util
import io
import json
import os
import shlex
import signal
import struct
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from normfree.cli import main
from normfree.training import loggers, loop, run_folder
from normfree.training.config import Config, ConfigError, loggers_in
from normfree.training.config_io import with_overrides
from normfree.training.console import RunLog
from normfree.training.loggers import Logs, TensorBoard, WandB, open_logs, require, scalars
from normfree.training.metrics import Meter, MetricsWriter
from normfree.training.recipes import RECIPES

FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=48,val=12 --model nf_resnet_nano --input.image_size 16 "
    "--input.batch_size 8 --input.workers 0 --length 8st --optim.warmup 1st --log.every 2 --log.evaluate_every 4st "
    "--log.checkpoint_every 3st"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(run_folder, "draw_curves", lambda *args, **kwargs: None)
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def run_log() -> tuple[RunLog, io.StringIO]:
    text = io.StringIO()
    return RunLog(Console(file=text)), text


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by tag and step, as TensorBoard shows them; each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    found = {}
    for name in board.Tags()["scalars"]:
        points = [(e.step, e.value) for e in board.Scalars(name)]
        assert len({step for step, _ in points}) == len(points), name
        found[name] = dict(points)
    return found


def history(file: Path) -> dict[int, dict[str, float]]:
    """Rows by step of a W&B transaction log: records in blocks of 32 KiB, each part behind crc, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                step = items.pop("_step")
                assert step not in found
                found[step] = {k: v for k, v in items.items() if not k.startswith("_")}
    return found


def expected(out: Path) -> dict[int, dict[str, float]]:
    """What metrics.jsonl says, by step and tag."""
    found: dict[int, dict[str, float]] = {}
    for row in rows(out):
        found.setdefault(row["step"], {}).update(scalars(row))
    return found


def by_step(board: dict[str, dict[int, float]]) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for name, points in board.items():
        for step, value in points.items():
            found.setdefault(step, {})[name] = value
    return found


def assert_copies(out: Path) -> None:
    board = by_step(events(out / "tensorboard"))
    assert board.keys() == expected(out).keys()
    for step, values in expected(out).items():
        assert board[step] == pytest.approx(values, rel=1e-6)  # event files hold float32
    newest = max((out / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    for _ in range(300):  # W&B's own process writes it, and may come to that after the run has ended
        if history(newest) == expected(out):
            break
        time.sleep(0.1)
    assert history(newest) == expected(out)


def stop_after(monkeypatch, step: int) -> None:
    original = loop.Trainer.step

    def stepping(self, batch, at):
        result = original(self, batch, at)
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(loop.Trainer, "step", stepping)


def test_a_stopped_and_continued_run_has_each_row_once_everywhere(tmp_path, monkeypatch):
    args = ["train", "scratch", *FLAGS, "--log.to", "tensorboard,wandb", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(args) == 143
    assert_copies(tmp_path / "run")
    assert main(["train", str(tmp_path / "run")]) == 0
    assert_copies(tmp_path / "run")
    assert sorted(expected(tmp_path / "run")) == [2, 4, 6, 8]
    # offline-run-TIME-ID, and a number behind it if both parts began in the same second
    names = {p.name.split("-")[3] for p in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert names == {(tmp_path / "run" / "wandb" / "id").read_text().strip()}  # one run of W&B's
    before = sorted(p.name for p in (tmp_path / "run" / "tensorboard").iterdir())
    assert main(["train", str(tmp_path / "run")]) == 0  # finished: nothing is opened
    assert sorted(p.name for p in (tmp_path / "run" / "tensorboard").iterdir()) == before


ROWS = [{"step": s, "epoch": s / 10, "loss": 1.0 / s} for s in (2, 4, 6, 8)]


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_void(tmp_path):
    board = TensorBoard(tmp_path)
    for row in ROWS:
        board.write(row)  # and killed, without closing; what was written is on the disk
    assert sorted(events(tmp_path)["train/loss"]) == [2, 4, 6, 8]
    again = TensorBoard(tmp_path, rows=ROWS[:2], step=5)
    again.write({"step": 6, "loss": 7.0})
    assert events(tmp_path)["train/loss"] == pytest.approx({2: 0.5, 4: 0.25, 6: 7.0})
    again.close()
    board.close()


def test_a_logger_that_joins_later_gets_what_was_before(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(["train", "scratch", *FLAGS, "--out", str(tmp_path / "run")]) == 143
    assert main(["train", str(tmp_path / "run"), "--log.to", "tensorboard,wandb"]) == 0
    assert_copies(tmp_path / "run")


def test_wandb_sends_no_step_that_the_server_has(tmp_path, monkeypatch):
    import wandb

    sent = []

    class Run:
        step = 5  # as after resuming a run online

        def log(self, values, *, step):
            sent.append(step)

    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Run())
    monkeypatch.setenv("WANDB_MODE", "online")
    logger = WandB(tmp_path, config=Config(), rows=ROWS[:3])
    logger.write(ROWS[3])
    assert sent == [6, 8]
    assert (asked["mode"], asked["resume"]) == ("online", "allow")
    monkeypatch.delenv("WANDB_MODE")
    first = asked["id"]
    WandB(tmp_path, config=Config())
    assert (asked["mode"], asked["id"]) == ("offline", first)


# --- what may go wrong -------------------------------------------------------------------------------


class Failing:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, row):
        self.calls += 1
        raise OSError("no space left\non the device")

    def close(self):
        self.calls += 1


def test_a_logger_that_fails_is_reported_once_and_the_others_continue(tmp_path):
    speaker, text = run_log()
    failing, board = Failing(), TensorBoard(tmp_path / "board")
    log = Logs(
        MetricsWriter(tmp_path / "metrics.jsonl", step=0), {"wandb": failing, "tensorboard": board}, speaker
    )
    for row in ROWS:
        log.write(**row)
    log.close()
    assert failing.calls == 1
    assert text.getvalue() == (
        "wandb failed and is disabled (OSError: no space left); metrics.jsonl is still written. A continued run tries "
        "it again.\n"
    )
    assert rows(tmp_path) == ROWS
    assert sorted(events(tmp_path / "board")["train/loss"]) == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_the_data(tmp_path, monkeypatch, capsys, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == name else real(n, *a))
    args = ["train", *FLAGS, "--log.to", name, "--out", str(tmp_path / "run")]
    assert main(args) == 2
    assert capsys.readouterr().err == (
        f"normfree: log.to='{name}' needs {name}, which is not installed. "
        f'Fix: pip install "normfree[{name}]", or --log.to "".\n'
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # W&B makes one where it works
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ModuleNotFoundError, match="needs wandb, which"):
        require("wandb")


def test_a_logger_that_cannot_be_opened_stops_before_the_first_step(tmp_path, monkeypatch):
    def refused(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(loggers, "TensorBoard", refused)
    config = with_overrides(RECIPES["scratch"](), [*FLAGS, "--log.to", "tensorboard"])
    with pytest.raises(ValueError, match="cannot be opened") as error:
        loop.train(config, tmp_path / "run", console=Console(file=io.StringIO()))
    assert str(error.value) == (
        "log.to='tensorboard': tensorboard cannot be opened (PermissionError: read-only). Fix: remove the "
        'cause, or disable it with --log.to "".'
    )
    assert rows(tmp_path / "run") == []


def test_the_names_in_log_to():
    for to, names in {
        "": (), "wandb": ("wandb",), "wandb, tensorboard": ("tensorboard", "wandb"), "tensorboard,tensorboard":
        ("tensorboard",),
    }.items():  # fmt: skip
        assert loggers_in(with_overrides(Config(), ["--log.to", to]).log.to) == names
    with pytest.raises(ConfigError) as error:
        with_overrides(Config(), ["--log.to", "tensorboard,wanda"])
    assert str(error.value) == (
        "log.to='tensorboard,wanda'. Allowed: tensorboard, wandb, profile=STEPS, or several separated by commas. "
        "Did you mean 'wandb'?"
    )


def test_no_logger_opens_nothing(tmp_path):
    speaker, _ = run_log()
    open_logs(tmp_path, Config(), step=0, run_log=speaker).close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_names():
    values = {"loss": 1.5, "train_top1": 2.0, "lr": 3.0, "clipped": 4.0, "note": "x", "ratio/stage1": 5.0}
    assert scalars({"step": 7, "epoch": 0.5, **values}) == {
        "train/epoch": 0.5, "train/loss": 1.5, "train/top1": 2.0, "train/lr": 3.0, "train/clipped": 4.0,
        "ratio/stage1": 5.0,
    }  # fmt: skip
    values = {"top1": 1.0, "val_loss": 2.0, "ema_top5": 3.0, "ema_val_loss": 4.0}
    assert scalars({"step": 7, "epoch": 0.5, **values}) == {
        "val/epoch": 0.5, "val/top1": 1.0, "val/loss": 2.0, "val/ema_top5": 3.0, "val/ema_loss": 4.0,
    }  # fmt: skip
    assert scalars({"step": 7, "epoch": 0.5, "ratio/stage1": 5.0}) == {"ratio/stage1": 5.0}


def test_a_meter_goes_on_where_its_state_was_taken():
    import torch

    losses = torch.rand(7, generator=torch.Generator().manual_seed(0))
    whole, first = Meter(), Meter()
    for meter in (whole, first):
        for loss in losses[:4]:
            meter.add(loss, torch.tensor(3.0), 8)
    second = Meter(json.loads(json.dumps(first.state())))
    for meter in (whole, second):
        for loss in losses[4:]:
            meter.add(loss, torch.tensor(2.0), 8)
    a, b = whole.read(), second.read()
    assert (
        (a["loss"], a["train_top1"]) == (b["loss"], b["train_top1"]) == (float(losses.mean()), 100 * 18 / 56)
    )
    assert second.state()["losses"] == []
    third = Meter({"losses": [], "corrects": [], "images": 0, "seconds": 100.0})
    third.add(losses[0], torch.tensor(1.0), 1000)
    assert third.read()["images_per_s"] == pytest.approx(10.0, rel=0.05)  # the time before counts as well
