"""Runs whose images go bad, that are stopped, or whose data move: they go on, and their weights can be used."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from normfree.cli import main
from normfree.data.source import Source
from normfree.data.sources.open import open_source
from normfree.data.substituting import Substituting
from normfree.data.transforms.decode import ImageError
from normfree.pretrained import from_pretrained
from normfree.training import loop
from normfree.training.config import Config
from normfree.training.config_io import with_overrides
from normfree.training.run_data import located, run_of

FLAGS = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --length 6st --device cpu "
    "--optim.warmup 1st --log.every 1 --log.evaluate_every 3st --log.checkpoint_every 2st --input.test_fraction 0.2"
)


def photos(root: Path, count: int = 10) -> Path:
    for k, name in enumerate(("a", "b")):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def config(data: Path, *flags: str) -> Config:
    return with_overrides(Config(), ["--data", str(data), *FLAGS, *flags])


def train(run: Config, out: Path) -> str:
    console = Console(file=io.StringIO())
    loop.train(run, out, console=console)
    return console.file.getvalue()


def test_another_image_of_the_class_replaces_a_bad_one(tmp_path: Path) -> None:
    source: Source = open_source(photos(tmp_path, 3), val_fraction=0.3).train
    before = [source.image(i).tobytes() for i in range(len(source))]
    Path(source.name(1)).write_bytes(b"")
    other = Substituting(source)
    assert other.image(1).tobytes() == before[0]  # the next one of the class, from the start again
    assert [other.label(i) for i in range(4)] == [0, 0, 1, 1]
    assert list(other.bad) == [source.name(1)]
    Path(source.name(0)).unlink()
    with pytest.raises(ImageError, match="the file is empty"):
        other.image(1)


def test_a_run_skips_bad_images_when_told_and_its_card_counts_them(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos")
    for i in range(2):
        (data / "a" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="2 of 20 images cannot be used"):
        train(config(data), tmp_path / "stop")
    assert not (tmp_path / "stop").exists()
    train(config(data, "--input.bad_images", "skip"), tmp_path / "skip")
    assert len((tmp_path / "skip" / "bad_images.txt").read_text().splitlines()) == 2
    assert (
        "2 images could not be read and were left out"
        in (tmp_path / "skip" / "model" / "README.md").read_text()
    )


def test_an_image_that_goes_bad_ends_the_run_saved_and_it_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    split = open_source(data, test_fraction=0.2)
    lost = [Path(split.train.name(i)) for i in range(0, len(split.train), 2)]
    original = loop.Trainer.step

    def stepping(self: loop.Trainer, batch: object, step: int) -> object:
        if step == 2:
            for path in lost:
                path.write_bytes(b"")
        return original(self, batch, step)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "step", stepping)
        with pytest.raises(
            ValueError, match=r"the file is empty\. Fix: restore the image and resume, or resume with --input"
        ):
            train(config(data), out)
    assert (out / "checkpoints" / "last").read_text() == "step-00000003\n"
    # The run that was stopped can be used, with its classes and its preprocessing.
    model = from_pretrained(out)
    assert model.classes == ("a", "b")
    assert model.preprocessing.image_size == 16
    assert "is not finished; these are the averaged weights of its best checkpoint, step 3" in model.note
    other = ("--weights", str(out), "--input.image_size", "1x16x16")
    gray = config(data, "--input.bad_images", "skip", "--length", "1st", *other)
    text = train(gray, tmp_path / "gray")
    assert model.note in text
    assert f"the first convolution of {out} is adapted from 3 to 1 channels" in text
    text = train(config(data, "--input.bad_images", "skip"), out)
    assert f"continuing {out} after step 3" in text
    assert json.loads((out / "results.json").read_text())["steps"] == 6
    assert from_pretrained(out).note == ""


def test_a_run_finds_its_data_from_elsewhere_and_after_they_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    run = config(Path("photos"), "--length", "2st")
    train(run, Path("run"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    out = tmp_path / "run"
    assert located(run, out).data == str(tmp_path / "photos")
    assert run_of(str(out / "model")) == out
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    with pytest.raises(
        ValueError, match=r"are not there\. Allowed: the same images in any folder\. Fix: .* --data"
    ):
        located(run, out)
    for verb in ("eval", "diagnose", "export"):
        assert main([verb, str(out)]) == 2
        error = capsys.readouterr().err
        assert f"are not there. Allowed: the same images in any folder. Fix: normfree {verb} {out} " in error
        assert error.count("\n") == 1
    moved = config(tmp_path / "moved", "--length", "2st")
    assert "is finished" in train(moved, out)
    (tmp_path / "moved" / "a" / "0.png").write_bytes((tmp_path / "moved" / "b" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="1 have changed, such as"):
        train(moved, out)
    shutil.move(tmp_path / "moved", tmp_path / "photos")
    assert located(moved, out).data == str(tmp_path / "photos")


def test_images_that_are_trained_on_and_scored_are_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = photos(tmp_path / "photos"), tmp_path / "run"
    text = train(config(data, "--input.val_fraction", "0", "--input.test_fraction", "0.2"), out)
    assert f"{data}: 16 images to train on, 4 to test, 2 classes" in text
    for options, count, note in (
        (
            [],
            4,
            "scored on the test part of the run's data, 4 images; left out: 16 that it was trained on (--part all",
        ),
        (["--part", "all"], 20, ""),
    ):
        assert main(["eval", str(out), *options, "--json"]) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out)["images"] == count
        assert note in printed.err
    assert main(["eval", str(out), "--part", "val"]) == 2
    assert "--part is val. Allowed: train, test or all" in capsys.readouterr().err
    assert main(["audit", str(data), "--out", str(tmp_path / "a.csv")]) == 0
    assert capsys.readouterr().err == f"normfree: {data}: 20 images to train on, 2 classes\n"
