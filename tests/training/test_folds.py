"""Cross-validation: the folds divide the images, each is a run that can be resumed, and the summary adds them up."""

from __future__ import annotations

import io
import json
import math
import shlex
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from normfree.cli import main
from normfree.data.source import Source
from normfree.data.sources.open import open_source
from normfree.data.subset import in_folds
from normfree.training import loop
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.folds import FoldsResult, train_folds
from normfree.training.stop import StoppedBySignal
from normfree.uncertainty import accuracy_text

COUNTS = {"ant": 11, "bee": 7, "cat": 5}
FLAGS = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --length 3st --device cpu "
    "--optim.warmup 1st --log.every 1 --log.evaluate_every 3st --log.checkpoint_every 1st --input.test_fraction 0.1"
)


def photos(root: Path) -> Path:
    for k, (name, count) in enumerate(COUNTS.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([k, i]).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def config(data: Path, *flags: str) -> Config:
    return with_overrides(Config(), ["--data", str(data), *FLAGS, *flags])


def quiet() -> Console:
    return Console(file=io.StringIO())


def names(source: Source, root: Path) -> list[str]:
    return [Path(source.name(i)).relative_to(root).as_posix() for i in range(len(source))]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_image_is_in_one_fold_and_no_test_image_in_any(tmp_path: Path, count: int) -> None:
    root = photos(tmp_path / "photos")
    split = open_source(root, test_fraction=0.1)
    assert split.test is not None
    pool = {*names(split.train, root), *names(split.val, root)}
    seen: list[str] = []
    sizes, of_class = [], []
    for fold in range(1, count + 1):
        one = in_folds(split, fold=fold, count=count, seed=0)
        train, val = names(one.train, root), names(one.val, root)
        assert {*train} | {*val} == pool
        assert not {*train} & {*val}
        assert one.test is split.test
        assert [one.val.label(i) for i in range(len(val))] == [
            list(COUNTS).index(n.split("/")[0]) for n in val
        ]
        assert one.val.image(0).tobytes() == Image.open(root / val[0]).tobytes()
        seen += val
        sizes.append(len(val))
        of_class.append(Counter(name.split("/")[0] for name in val))
    assert sorted(seen) == sorted(pool)
    assert not pool & {*names(split.test, root)}
    assert max(sizes) - min(sizes) <= 1
    for name in COUNTS:
        assert max(c[name] for c in of_class) - min(c[name] for c in of_class) <= 1


def test_folds_do_not_depend_on_where_the_images_are_and_depend_on_the_seed(tmp_path: Path) -> None:
    found = []
    for folder, seed in (("one", 0), ("two/deep", 0), ("three", 1)):
        root = photos(tmp_path / folder)
        found.append(names(in_folds(open_source(root), fold=1, count=3, seed=seed).val, root))
    assert found[0] == found[1] != found[2]


def test_what_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos")
    with pytest.raises(ValueError, match="24 folds of 23 images"):
        in_folds(open_source(root), fold=1, count=24, seed=0)
    with pytest.raises(ValueError, match="folds of data without a validation part"):
        in_folds(open_source(root, val_fraction=0), fold=1, count=2, seed=0)
    for path in sorted((root / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="the class 'cat' has one image outside the test part"):
        in_folds(open_source(root), fold=1, count=2, seed=0)
    with pytest.raises(ValueError, match="folds with objective='simclr'"):
        train_folds(config(root, "--objective", "simclr"), tmp_path / "out", console=quiet())
    with pytest.raises(
        ValueError, match=r"folds with --privacy\. .* --input\.val_fraction fold:1/5 for a single run"
    ):
        train_folds(config(root, "--optim.clip", "private"), tmp_path / "out", console=quiet())
    with pytest.raises(ValueError, match=r"1 folds\. Allowed: 2 to 100"):
        train_folds(config(root), tmp_path / "out", folds=1, console=quiet())
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FoldsResult, str]:
    """A cross-validation with three folds: the folder of the images, the result, and what was printed."""
    path = tmp_path_factory.mktemp("folds")
    console = Console(file=io.StringIO(), width=300)
    result = train_folds(config(photos(path / "photos")), path / "out", folds=3, console=console)
    assert isinstance(console.file, io.StringIO)
    return path / "photos", result, console.file.getvalue()


def test_the_summary_adds_up_the_runs(whole: tuple[Path, FoldsResult, str]) -> None:
    _, result, text = whole
    saved = [json.loads((result.out / f"fold-{k}/results.json").read_text()) for k in (1, 2, 3)]
    tops = [one["average"]["top1"] for one in saved]
    assert [one.top1 for one in result.folds] == tops
    mean = sum(tops) / 3
    deviation = math.sqrt(sum((top - mean) ** 2 for top in tops) / 2)
    assert result.mean_and_deviation() == pytest.approx((mean, deviation))
    confusion = sum(np.array(one["average"]["confusion"]) for one in saved)
    assert result.confusion == confusion.tolist()
    images = sum(COUNTS.values()) - saved[0]["test"]["images"]
    assert result.hits_and_images == (int(np.trace(confusion)), images)
    assert f"top-1 {mean:.2f} ± {deviation:.2f} %" in text
    assert f"top-1 {accuracy_text(*result.hits_and_images)} %" in text
    tests = [one["test"]["top1"] for one in saved]
    assert [one.test_top1 for one in result.folds] == tests
    page = (result.out / "folds.md").read_text()
    for one in result.folds:
        assert f"| {one.fold} | {one.images} | 3 | {one.top1:.3f} |" in page
    assert "| ant | " in page
    assert load_config(result.out / "fold-2/config.toml").input.val_fraction == "fold:2/3"
    assert load_config(result.out / "folds.toml").input.val_fraction == 0.1


def test_a_stopped_cross_validation_goes_on_where_it_was(
    whole: tuple[Path, FoldsResult, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, result, _ = whole
    original, steps = loop.Trainer.step, []

    def stepping(self: loop.Trainer, batch: object, step: int) -> object:
        steps.append(step)
        if len(steps) == 5:  # the second step of the second fold
            signal.raise_signal(signal.SIGTERM)
        return original(self, batch, step)  # type: ignore[arg-type]

    out = tmp_path / "out"
    monkeypatch.setattr(loop.Trainer, "step", stepping)
    with pytest.raises(StoppedBySignal):
        train_folds(config(data), out, folds=3, console=quiet())
    assert not (out / "fold-3").exists()
    assert main(["predict", str(out), str(data)]) == 2
    assert (
        "holds the runs of a cross-validation. Allowed: one of them, for example" in capsys.readouterr().err
    )
    assert main(["train", str(out)]) == 0
    text = capsys.readouterr().out
    assert "fold 1 of 3: finished" in text
    assert f"continuing {out}/fold-2 after step 2" in text.replace("\n", "")
    assert steps == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    for fold in (1, 2, 3):
        mine, theirs = (folder / f"fold-{fold}/model/model.safetensors" for folder in (out, result.out))
        assert mine.read_bytes() == theirs.read_bytes()
    assert json.loads((out / "folds.json").read_text()) == json.loads((result.out / "folds.json").read_text())
    # Naming it again trains nothing; a longer length goes on with every fold.
    assert main(["train", str(out)]) == 0
    assert len(steps) == 9
    assert main(["train", str(out), "--length", "4st"]) == 0
    assert steps[9:] == [3, 3, 3]
    # Images that have changed are no longer those of the finished folds.
    assert main(["train", str(out), "--seed", "1"]) == 2
    assert "--seed cannot change when a run is resumed" in capsys.readouterr().err
    assert main(["train", str(out), "--folds", "4"]) == 2
    assert "has 3 folds, and --folds is 4" in capsys.readouterr().err


def test_other_images_are_noticed_before_the_next_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, original = photos(tmp_path / "photos"), loop.Trainer.step

    def stepping(self: loop.Trainer, batch: object, step: int) -> object:
        if step == 2:
            (data / "ant" / "new.png").write_bytes((data / "ant" / "0.png").read_bytes())
        return original(self, batch, step)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.Trainer, "step", stepping)
    with pytest.raises(ValueError, match=r"are not those of .*fold-1: 0 are gone, 1 are new"):
        train_folds(config(data), tmp_path / "out", folds=2, console=quiet())
