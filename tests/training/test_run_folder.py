"""The run folder: what is refused, which files it holds, and that reported scores are the measured ones."""

import hashlib
import io
import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from normfree.data.sources.open import open_source
from normfree.diagnose.metrics_file import read_metrics
from normfree.diagnose.run_figures import draw_curves
from normfree.inference import evaluate
from normfree.models.variants import VARIANTS
from normfree.optim.schedule import schedule_multiplier
from normfree.pretrained import from_pretrained
from normfree.training import checkpoint, identity, loop, run_folder
from normfree.training.config import Config
from normfree.training.config_io import keys, load_config, to_toml, with_overrides
from normfree.training.recipes import RECIPES
from normfree.training.resolve import preprocessing, resolve
from normfree.training.run_folder import TrainResult
from normfree.training.stop import StoppedBySignal

DATA = "synthetic:classes=3,size=16,train=24,val=9"
FLAGS = shlex.split(
    f"--data {DATA} --model nf_resnet_nano --input.image_size 16 --input.batch_size 8 --input.workers 0 --length 6st "
    "--optim.warmup 1st --log.every 2 --log.evaluate_every 3st --log.checkpoint_every 2st --optim.ema_decay 0.5"
)


def config(*flags: str) -> Config:
    return with_overrides(Config(), [*FLAGS, *flags])


def quiet() -> Console:
    return Console(file=io.StringIO())


def at(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return loop.train(config(), out, console=quiet())


# --- resolving ---------------------------------------------------------------------------------------


def test_every_auto_that_does_not_depend_on_the_device_is_replaced_by_the_value_of_the_variant():
    for model, variant in VARIANTS.items():
        resolved = resolve(
            with_overrides(Config(), ["--model", model, "--augment.randaugment", "auto"])
        ).config
        assert [k for k in keys() if at(resolved, k) == "auto"] == ["device", "precision"], model
        net = resolved.net.model_dump()
        assert net == {k: getattr(variant, k) for k in net}, model
        assert (resolved.input.image_size, resolved.input.eval_size) == (
            variant.train_size,
            variant.test_size,
        ), model
        assert resolved.augment.randaugment == variant.randaugment, model
        assert resolve(resolved).config == resolved, model


@pytest.mark.parametrize(
    ("flags", "image_size", "eval_size", "eval_crop"),
    [
        ("--model nfnet_f0", 192, 256, "resize_crop_32"),  # [B] table 1
        ("--model nfnet_f0 --input.image_size 128", 128, 128, "resize_crop_32"),
        ("--model nfnet_f0 --input.image_size 64", 64, 64, "squash"),
        ("--model nfnet_f0 --input.eval_size 96", 192, 96, "squash"),
        ("--model nfnet_f0 --input.eval_size 97", 192, 97, "resize_crop_32"),
        ("--model nf_resnet_nano --input.eval_crop crop_resize", 32, 32, "crop_resize"),
    ],
)
def test_sizes(flags, image_size, eval_size, eval_crop):
    resolved = resolve(with_overrides(Config(), flags.split())).config
    assert (resolved.input.image_size, resolved.input.eval_size) == (image_size, eval_size)
    assert resolved.input.eval_crop == eval_crop
    pre = preprocessing(resolved)
    assert (pre.image_size, pre.crop) == (eval_size, eval_crop)


def test_given_values_are_kept():
    flags = "--net.alpha 0.5 --net.drop_rate=0.1 --net.activation relu --net.stochdepth_rate=0.0"
    net = resolve(with_overrides(RECIPES["cifar"](), flags.split())).config.net
    assert (net.alpha, net.drop_rate, net.activation, net.stochdepth_rate) == (0.5, 0.1, "relu", 0.0)


# --- refusals ----------------------------------------------------------------------------------------


def test_a_file_is_refused_as_run_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is a file; a run needs a folder") as error:
        loop.train(config(), tmp_path / "x", console=quiet())
    assert str(error.value) == f"'{tmp_path}/x' is a file; a run needs a folder. Fix: choose another --out."
    assert (tmp_path / "x").read_text() == "mine"


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty") as error:
        loop.train(config(), tmp_path, console=quiet())
    assert str(error.value) == (
        f"'{tmp_path}' is not empty and holds no run. Allowed: a new or empty folder, or a run. "
        "Fix: choose another --out."
    )
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time_trains_in_a_run_folder(tmp_path):
    with run_folder.locked(tmp_path / "run"), pytest.raises(ValueError, match="another process") as error:
        loop.train(config(), tmp_path / "run", console=quiet())
    assert str(error.value) == (
        f"'{tmp_path}/run' is being trained by another process. Fix: wait for it or stop it."
    )
    with run_folder.locked(tmp_path / "run"):  # unlocked again
        pass


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--optim.lr 0.2 --seed 1", "seed, optim.lr"),
        ("--augment.mixup 0.3", "augment.mixup"),
        ("--net.drop_rate 0.5", "net.drop_rate"),
        ("--input.batch_size 4", "input.batch_size"),
        ("--input.image_size 24", "input.image_size, input.eval_size"),
        ("--input.micro_batch 3", "input.micro_batch"),
        ("--precision bfloat16", "precision"),
    ],
)
def test_a_run_does_not_continue_as_another(finished, flags, what):
    before = (finished.out / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="was started with another") as error:
        loop.train(config(*flags.split()), finished.out, console=quiet())
    assert str(error.value) == (
        f"{finished.out} was started with another {what}. Fix: drop the change, or start another run with --out."
    )
    assert (finished.out / "config.toml").read_bytes() == before


def test_a_run_is_lengthened_with_its_schedule_restated_but_not_shortened(finished, tmp_path):
    out = shutil.copytree(finished.out, tmp_path / "run")
    with pytest.raises(ValueError, match=r"length=3st gives 3 steps, and .* has taken 6") as error:
        loop.train(config("--length", "3st"), out, console=quiet())
    assert str(error.value).endswith("Allowed: a longer run. Fix: --length 12st.")
    console = quiet()
    result = loop.train(config("--length", "9st"), out, console=console)
    assert (result.steps, result.step) == (9, 9)
    text = console.file.getvalue()
    assert "lengthened from 6st (6 steps) to 9st (9 steps): the learning rate goes on at" in text
    rates = {row["step"]: row["lr"] for row in read_metrics(out / "metrics.jsonl") if "lr" in row}
    whole = schedule_multiplier("warmup_cosine", 7 / 9, warmup=1 / 9, final=0.0)
    assert rates[8] == pytest.approx(config().optim.lr * whole)
    # It is now a run of nine steps: named again, it is finished.
    console = quiet()
    loop.train(config("--length", "9st"), out, console=console)
    assert f"{out} is finished" in console.file.getvalue()


@pytest.mark.parametrize(
    "flags",
    [
        "--data nowhere",
        "--model nf_resnet_nono",
        "--net.activation nothing",
        "--weights nowhere",
        "--device nothing",
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, flags):
    with pytest.raises(ValueError, match=r"nowhere|nono|nothing"):
        loop.train(config(*flags.split()), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_bad_image_is_named_before_anything_is_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / f"{i}.png")
    bad = tmp_path / "data" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(ValueError, match="images cannot be used") as error:
        loop.train(config("--data", str(tmp_path / "data")), tmp_path / "run", console=quiet())
    assert str(bad) in str(error.value)
    assert not (tmp_path / "run").exists()


# --- damage ------------------------------------------------------------------------------------------


def copy_of(finished: TrainResult, tmp_path: Path) -> Path:
    """Return a copy of the run folder."""
    out = tmp_path / "run"
    for file in finished.out.rglob("*"):
        if file.is_file():
            target = out / file.relative_to(finished.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return out


def test_a_damaged_checkpoint_is_reported_skipped_and_made_again(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    last = out / "checkpoints" / "step-00000006"
    sound = load_file(finished.out / "checkpoints" / last.name / "model.safetensors")
    data = bytearray((last / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (last / "model.safetensors").write_bytes(data)
    loop.train(load_config(out / "config.toml"), out, console=quiet())
    log = (out / "log.txt").read_text()
    assert f"passed over: {last}: model.safetensors is missing or damaged.\n" in log
    assert f"continuing {out} after step 4\n" in log
    again = load_file(last / "model.safetensors")
    assert [k for k in sound if not torch.equal(sound[k], again[k])] == []


def test_a_run_without_any_sound_checkpoint_is_refused(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    for file in (out / "checkpoints").glob("step-*/state.json"):
        file.write_text("{}")
    with pytest.raises(ValueError, match="none is sound") as error:
        loop.train(load_config(out / "config.toml"), out, console=quiet())
    assert str(error.value) == (
        f"{out} has checkpoints, but none is sound; nothing was changed. Fix: start another run with --out."
    )


# --- contents -----------------------------------------------------------------------------------


def test_the_folder_at_the_end(finished):
    out = finished.out
    assert sorted(p.name for p in out.iterdir()) == [
        ".lock", "checkpoints", "config.toml", "curves.png", "environment.txt", "log.txt", "metrics.jsonl", "model",
        "results.json", "samples.csv",
    ]  # fmt: skip
    assert load_config(out / "config.toml") == resolve(config("--precision", "float32")).config
    names = {p.name for p in (out / "checkpoints").iterdir()}
    steps = {name for name in names if name.startswith("step-")}
    assert names - steps == {"last", "best"}
    assert {"step-00000004", "step-00000006", (out / "checkpoints" / "best").read_text().strip()} == steps
    assert (out / "checkpoints" / "last").read_text() == "step-00000006\n"
    environment = dict(line.split(" ", 1) for line in (out / "environment.txt").read_text().splitlines())
    assert environment["torch"] == torch.__version__
    assert environment["device"] == "cpu"


def test_the_model_folder_holds_the_average_and_reproduces_the_reported_scores(finished):
    averaged = checkpoint.read(finished.out / "checkpoints" / "step-00000006").tensors["ema"]
    model = from_pretrained(finished.out)
    own = model.net.state_dict()
    assert [k for k in own if not torch.equal(own[k], averaged[k])] == []
    val = open_source(DATA).val
    score = evaluate(model.net, val, preprocessing=model.preprocessing, device="cpu")
    written = json.loads((finished.out / "results.json").read_text())["average"]
    assert (score.top1, score.top5, score.count) == (written["top1"], written["top5"], 9)
    assert score.loss == pytest.approx(written["loss"], rel=1e-6)
    assert score.confusion().tolist() == written["confusion"]
    assert sum(map(sum, written["confusion"])) == 9
    last = [row for row in read_metrics(finished.out / "metrics.jsonl") if "top1" in row][-1]
    assert (last["ema_top1"], last["ema_val_loss"]) == (written["top1"], pytest.approx(written["loss"]))
    card = (finished.out / "model" / "README.md").read_text()
    shown = f"| averaged weights | 9 validation | {score.top1_text()} | {score.balanced_top1:.1f} | {score.loss:.4f} |"
    assert shown in card
    assert written["top1_interval"] == list(score.top1_interval)
    assert f"The largest class has {score.majority:.1f} % of the validation images." in card


def test_metrics_hold_what_the_plot_of_the_curves_needs(finished):
    rows = read_metrics(finished.out / "metrics.jsonl")
    train, val = [r for r in rows if "loss" in r], [r for r in rows if "top1" in r]
    assert [r["step"] for r in train] == [2, 4, 6]
    assert [r["step"] for r in val] == [3, 6]
    assert [r["epoch"] for r in train] == pytest.approx([2 * 8 / 24, 4 * 8 / 24, 6 * 8 / 24], abs=1e-4)
    assert train[-1].keys() == {
        "step", "epoch", "loss", "train_top1", "images_per_s", "clipped", "lr", "grad_norm",
    }  # fmt: skip
    assert all(0 <= r["clipped"] <= 1 and r["grad_norm"] > 0 for r in train)


def folder_of(tmp_path: Path, *classes: str) -> Path:
    """Return a folder of images with these classes."""
    for name in classes:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_the_card_shows_class_names_as_text(tmp_path):
    names = ("<img src=x>", "a|b", "[l](javascript:1)")
    data = folder_of(tmp_path, *(name.replace("/", "") for name in names))
    loop.train(config("--data", str(data)), tmp_path / "run", console=quiet())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    rows = [line for line in card.partition("| class |")[2].splitlines() if line.startswith("| ")]
    assert [row.count("|") for row in rows] == [3, 3, 3, 3]
    assert "<img" not in card
    assert "](" not in card
    assert "| a&#124;b |" in card


# --- the same run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [b"\xff\xfe", "\x1b[31mred", "a\nb"])
def test_a_class_that_cannot_be_kept_is_refused_before_the_first_step(tmp_path, name):
    data = folder_of(tmp_path, "a", os.fsdecode(name) if isinstance(name, bytes) else name)
    with pytest.raises(ValueError, match=r"has a class named .*Fix: rename the class") as error:
        loop.train(config("--data", str(data)), tmp_path / "run", console=quiet())
    assert str(error.value).isprintable()
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run on a folder of images after 4 of 6 steps."""
    path = tmp_path_factory.mktemp("stopped")
    folder_of(path, "a", "b")
    with pytest.MonkeyPatch.context() as patch:
        original = loop.Trainer.step

        def stepping(self, batch, step):
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            return original(self, batch, step)

        patch.setattr(loop.Trainer, "step", stepping)
        with pytest.raises(StoppedBySignal):
            loop.train(config("--data", str(path / "data")), path / "run", console=quiet())
    return path


def resumed(path: Path) -> None:
    loop.train(load_config(path / "run" / "config.toml"), path / "run", console=quiet())


def rename(path: Path, old: str, new: str) -> None:
    (path / "data" / old).rename(path / "data" / new)


CHANGES = {
    "a class renamed": (lambda p: rename(p, "a", "c"), "missing: 'a'; new: 'c'"),
    "a class more": (
        lambda p: shutil.copytree(p / "data/a", p / "data/c"),
        "classes .* have changed .*; new: 'c'",
    ),
    "an image renamed": (
        lambda p: rename(p, "a/0.png", "a/9.png"),
        r"images of .* have changed .*\(1[01] before",
    ),
    "an image less": (lambda p: (p / "data/a/1.png").unlink(), "images of .* have changed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_continue_on_other_data(stopped, tmp_path, monkeypatch, change):
    shutil.copytree(stopped, tmp_path / "copy")
    path = tmp_path / "copy"
    text = (path / "run" / "config.toml").read_text()
    before = checkpoint.read(path / "run" / "checkpoints" / "step-00000004").state["data"]
    assert before["classes"] == ["a", "b"]
    monkeypatch.chdir(path)
    act, message = CHANGES[change]
    act(path)
    (path / "run" / "config.toml").write_text(text.replace(str(stopped), str(path)))
    with pytest.raises(
        ValueError, match=r"are not those that .* was started with \(\d+ are (gone|new), such as"
    ):
        resumed(path)
    # Without the list of samples, which runs of more than 200,000 images do not have, the checkpoint decides.
    (path / "run" / "samples.csv").unlink()
    with pytest.raises(ValueError, match=message) as error:
        resumed(path)
    assert str(error.value).endswith("Fix: restore the data, or start another run with --out.")


def test_a_folder_of_images_may_move(stopped, tmp_path):
    before = identity.data_of(open_source(str(stopped / "data")))
    shutil.copytree(stopped / "data", tmp_path / "elsewhere" / "moved")
    assert identity.data_of(open_source(str(tmp_path / "elsewhere" / "moved"))) == before


@pytest.mark.parametrize("key", ["optim.lr", "seed", "augment.flip", "input.eval_size", "log.evaluate_every"])
def test_an_edited_config_does_not_continue_as_another_run(finished, tmp_path, key):
    """Also if only config.toml was edited, or one of its bits has changed."""
    out = copy_of(finished, tmp_path)
    values = {"optim.lr": "0.2", "seed": "7", "augment.flip": "0.25", "input.eval_size": "24",
              "log.evaluate_every": "2st"}  # fmt: skip
    edited = with_overrides(load_config(out / "config.toml"), [f"--{key}", values[key]])
    (out / "config.toml").write_text(to_toml(edited))
    with pytest.raises(ValueError, match=rf"was started with another {key}\. Fix: drop the change"):
        loop.train(load_config(out / "config.toml"), out, console=quiet())


def test_damaged_metrics_are_noticed_and_cost_neither_the_run_nor_the_plot(finished, tmp_path):
    out = copy_of(finished, tmp_path)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    (out / "checkpoints" / "last").write_text("step-00000004\n")
    data = (out / "metrics.jsonl").read_bytes()
    for damaged in (data.replace(b'"loss"', b'"lo\xf3s"', 1), data.replace(b'"epoch"', b'"epocj"', 1),
                    data.replace(b'"step": 2', b'"step": [', 1)):  # fmt: skip
        (out / "metrics.jsonl").write_bytes(damaged)
        console = quiet()
        loop.train(load_config(out / "config.toml"), out, console=console)
        assert "metrics.jsonl was changed or damaged since step 4" in console.file.getvalue().replace(
            "\n", ""
        )
        for name in ("checkpoints/step-00000006", "model"):
            shutil.rmtree(out / name)


@pytest.mark.parametrize("text", ["[1, 2]", '{"total_steps": "x"}', '{"best": 3, "total_steps": 6}'])
def test_a_state_of_another_program_is_one_line(finished, tmp_path, text):
    """Its manifest is right, so it is not damaged."""
    out = copy_of(finished, tmp_path)
    for folder in (out / "checkpoints").glob("step-*"):
        (folder / "state.json").write_text(text)
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        entry = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        manifest["files"]["state.json"] = entry
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"state\.json is of another program|none is sound") as error:
        loop.train(load_config(out / "config.toml"), out, console=quiet())
    assert "\n" not in str(error.value)


# --- plots ----------------------------------------------------------------------------------------


def test_the_plot_of_the_curves(finished, tmp_path):
    rows = read_metrics(finished.out / "metrics.jsonl")
    draw_curves(rows, tmp_path / "a.png", title="a model on photos/$5_and_$6/x")  # $ starts no formula
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1430, 442)  # 11 x 3.4 inches at 130 dots
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
    draw_curves(rows[:1], tmp_path / "b.png", title="stopped early")
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_an_incomplete_line_is_skipped(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
