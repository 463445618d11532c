"""Images with several classes: targets, scores, and a run from folders within folders."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from normfree import Config, evaluate, from_pretrained, open_source, predict, train
from normfree.cli import main
from normfree.commands.usage import UsageError, with_classes
from normfree.data.loader import eval_batches, train_batches
from normfree.data.multilabel import as_multilabel, targets_of
from normfree.data.sources.open import open_labeled
from normfree.data.subset import Relabeled
from normfree.data.transforms.mixing import FreshPairs, mix
from normfree.data.transforms.train import train_transform
from normfree.multilabel_scores import multilabel_scores


def write(root: Path, count: int = 8) -> None:
    """Write images of two attributes: red or not, with stripes or not."""
    rng = np.random.default_rng(0)
    for red in (False, True):
        for stripes in (False, True):
            folder = root / ("red" if red else "blue") / ("stripes" if stripes else "")
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = np.full((16, 16, 3), (200, 40, 40) if red else (40, 40, 200), np.uint8)
                if stripes:
                    pixels[::4] = 255
                pixels = (pixels * rng.uniform(0.7, 1.0)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "images"
    write(root)
    return root


def test_the_folders_above_an_image_are_its_classes(folder):
    split = open_source(f"nested:{folder}")
    assert split.classes == ("blue", "red", "stripes")
    assert as_multilabel(split.train) is not None
    for source in (split.train, split.val):
        targets = targets_of(source, range(len(source)))
        for index, row in enumerate(targets.tolist()):
            parts = Path(source.name(index)).relative_to(folder).parts[:-1]
            assert row == [float(c in parts) for c in split.classes]
    assert len(split.train) + len(split.val) == 32


def test_batches_have_targets_and_fresh_pairs_mix_them(folder):
    source = open_source(f"nested:{folder}").train
    batch = next(iter(eval_batches(source, train_transform(image_size=8), batch_size=4)))
    assert torch.equal(batch.targets, targets_of(source, batch.indices.tolist()))
    pairs = FreshPairs(mixup=1.0)
    stream = train_batches(
        source, train_transform(image_size=8), batch_size=4, seed=0, num_steps=1, pairs=pairs
    )
    batch = next(stream)
    stream.close()
    own = targets_of(source, batch.indices.tolist())
    share = batch.share[:, None]
    rest = (batch.targets - share * own) / (1 - share)
    assert torch.allclose(rest, rest.round(), atol=1e-4)  # the targets of the second images
    assert rest.round().unique().tolist() == [0.0, 1.0]


def test_mixing_is_linear_in_the_targets():
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    options = {"num_classes": 3, "mixup": 0.5, "cutmix": 1.0, "label_smoothing": 0.1}
    one_hot = torch.eye(3)[labels]
    first = mix(images, labels, generator=torch.Generator().manual_seed(1), **options)
    second = mix(images, one_hot, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_average_precision_and_f1_by_their_definitions():
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.rand(40, 3, generator=rng).mul(10).round() / 10  # with ties
    targets = (torch.rand(40, 3, generator=rng) < 0.3).float()
    targets[:, 2] = 0
    scores = multilabel_scores(probabilities, targets, ("a", "b", "none"))
    assert scores.average_precision.keys() == {"a", "b"}
    for k, name in enumerate("ab"):
        p, y = probabilities[:, k], targets[:, k]
        area = recall_before = 0.0
        for threshold in sorted(set(p.tolist()), reverse=True):  # the sum of recall steps times precision
            chosen = p >= threshold
            recall = float(y[chosen].sum() / y.sum())
            area += (recall - recall_before) * float(y[chosen].mean())
            recall_before = recall
        assert scores.average_precision[name] == pytest.approx(100 * area)
        tp = float(((p >= 0.5) & (y > 0)).sum())
        assert scores.f1[name] == pytest.approx(200 * tp / float((p >= 0.5).sum() + y.sum()))
    assert scores.mean_average_precision == pytest.approx(sum(scores.average_precision.values()) / 2)
    perfect = multilabel_scores(targets, targets, ("a", "b", "none"))
    assert (perfect.mean_average_precision, perfect.micro_f1, perfect.macro_f1) == (100.0, 100.0, 100.0)


def config(folder: Path, **changes: object) -> Config:
    values = {
        "data": f"nested:{folder}", "model": "nf_resnet_nano", "objective": "bce", "length": "30st", "device": "cpu",
        "input": {"image_size": 16, "batch_size": 8, "workers": 0, "val_fraction": 0.3},
        "augment": {"crop_min": 0.8, "label_smoothing": 0.0}, "net": {"skip_gain": 1.0},
        "optim": {"lr": 0.2, "warmup": "3st", "ema_decay": 0.9, "clipping": 0.1},
        "log": {"evaluate_every": "15st"},
    }  # fmt: skip
    return Config.model_validate(values | changes)


def test_a_run_learns_several_classes_and_everything_reports_them(folder, tmp_path, capsys):
    result = train(config(folder), tmp_path / "run", console=Console(file=io.StringIO()))
    scores = result.average.several
    assert scores is not None
    assert scores.mean_average_precision > 90  # chance: 50
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["ema_map"] for row in rows if "ema_map" in row][-1] == scores.mean_average_precision
    saved = json.loads((tmp_path / "run/results.json").read_text())["average"]
    assert saved["mean_average_precision"] == scores.mean_average_precision
    assert saved["average_precision"].keys() == {"blue", "red", "stripes"}
    assert (
        "| class | average precision % on the validation images |"
        in (tmp_path / "run/model/README.md").read_text()
    )
    assert "mAP " in (tmp_path / "run/log.txt").read_text()
    model = from_pretrained(tmp_path / "run")
    val = open_source(f"nested:{folder}", val_fraction=0.3).val
    again = evaluate(model.net, val, preprocessing=model.preprocessing, device="cpu", sigmoid=True)
    assert again.several == scores
    (prediction,) = predict(model, [folder / "red" / "stripes" / "0.png"], top=3, device="cpu")
    assert set(prediction.classes[:2]) == {"red", "stripes"}
    assert prediction.probabilities[1] > 0.5 > prediction.probabilities[2]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), f"nested:{folder}", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_average_precision"] > 90
    assert main(["eval", str(tmp_path / "run"), f"nested:{folder}", "--device", "cpu"]) == 0
    assert "average precision %" in capsys.readouterr().out


def test_one_class_for_each_image_is_refused(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"has the classes .*, and objective='classify'.* Fix: --objective bce"
    ):
        train(config(folder, objective="classify"), tmp_path / "run", console=Console(file=io.StringIO()))


def test_an_objective_for_one_class_is_refused_where_each_image_has_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(
                tmp_path / "data" / name / f"{i}.png"
            )
    with pytest.raises(
        ValueError, match=r"^images may have several classes, and objective='classify'.* --objective bce"
    ):
        train(
            config(tmp_path / "data", objective="classify"),
            tmp_path / "run",
            console=Console(file=io.StringIO()),
        )


def test_parts_have_the_same_classes(folder, tmp_path):
    write(tmp_path / "train", 2)
    write(tmp_path / "val", 1)
    split = open_source(f"nested:{tmp_path}")
    assert (len(split.train), len(split.val), split.classes) == (8, 4, ("blue", "red", "stripes"))
    (tmp_path / "val" / "green").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "val" / "green" / "x.png")
    with pytest.raises(ValueError, match=r"in the folder 'green', which the training images do not have"):
        open_source(f"nested:{tmp_path}")


@pytest.mark.parametrize("form", ["joined", "columns"])
def test_a_table_gives_several_classes(folder, tmp_path, form):
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    names = ("blue", "red", "stripes")
    lines = []
    for file in files:
        has = [name in file.split("/") for name in names]
        if file == files[0]:
            has = [False] * 3  # an image without classes
        joined = "|".join(name for name, yes in zip(names, has, strict=True) if yes)
        lines.append(
            f"{file},{joined}" if form == "joined" else f"{file},{','.join(str(int(yes)) for yes in has)}"
        )
    head = "path,labels" if form == "joined" else "path,blue,red,stripes"
    table = tmp_path / "table.csv"
    table.write_text("\n".join([head, *lines]) + "\n")
    split = open_source(
        f"csv:{table},root={folder},label=labels" if form == "joined" else f"csv:{table},root={folder}"
    )
    assert split.classes == names
    found = {}
    for source in (split.train, split.val):
        for i, row in enumerate(targets_of(source, range(len(source))).tolist()):
            found[Path(source.name(i)).relative_to(folder).as_posix()] = row
    assert found.pop(files[0]) == [0.0, 0.0, 0.0]
    assert found == {file: [float(name in file.split("/")) for name in names] for file in files[1:]}
    relabeled = Relabeled(split.train, ("stripes", "red", "blue"))
    assert torch.equal(targets_of(relabeled, range(5)), targets_of(split.train, range(5)).flip(1))
    assert as_multilabel(relabeled) is not None


def test_without_held_out_images_everything_is_trained_on(folder, tmp_path):
    split = open_source(f"nested:{folder}", val_fraction=0.0)
    assert (len(split.train), len(split.val), split.held_out) == (32, 3, False)
    everything = {"image_size": 16, "batch_size": 8, "workers": 0, "val_fraction": 0.0}
    with pytest.raises(ValueError, match=r"patience=2 with input.val_fraction=0.* Fix: --patience 0"):
        train(
            config(folder, input=everything, patience=2), tmp_path / "a", console=Console(file=io.StringIO())
        )
    out = io.StringIO()
    train(
        config(folder, input=everything, length="2st"), tmp_path / "run", console=Console(file=out, width=300)
    )
    assert "no image is held out for validation" in out.getvalue()
    assert "on 3 training images" in out.getvalue()
    assert "two parts" not in out.getvalue()
    assert "3 training" in (tmp_path / "run/model/README.md").read_text()


@pytest.mark.parametrize(
    ("head", "cells", "options"),
    [
        ("image,tags", ('"red, stripes"', "blue"), ""),
        ("image,label", ("red;stripes", "blue"), ""),
        ("image,label", ("red stripes red", "blue"), ",separator=space"),
        ("image,label,note", ('"red,stripes"', "blue"), ",separator=comma"),
    ],
)
def test_labels_of_a_cell_are_separated_as_usual_or_as_stated(folder, tmp_path, head, cells, options):
    table = tmp_path / "table.csv"
    note = ",x" if head.endswith("note") else ""
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))[:8]]
    rows = [f"{file},{cells[i % 2]}{note}" for i, file in enumerate(files)]
    table.write_text("\n".join([head, *rows]) + "\n")
    split = open_source(f"csv:{table},root={folder}{options}")
    assert split.classes == ("blue", "red", "stripes")
    for source in (split.train, split.val):
        for i, row in enumerate(targets_of(source, range(len(source))).tolist()):
            number = files.index(Path(source.name(i)).relative_to(folder).as_posix())
            assert row == ([1, 0, 0] if number % 2 else [0, 1, 1])


def test_a_class_whose_name_has_a_comma_stays_whole(folder, tmp_path):
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.png"))[:8]]
    rows = [f'{file},"{("tench, Tinca tinca", "goldfish")[i % 2]}"' for i, file in enumerate(files)]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    assert open_source(f"csv:{tmp_path}/t.csv,root={folder}").classes == ("goldfish", "tench, Tinca tinca")


def test_a_table_without_one_of_the_classes_is_scored_by_name(folder, tmp_path):
    files = sorted(path.relative_to(folder).as_posix() for path in (folder / "red").rglob("*.png"))
    rows = [f"{file},{'stripes|red' if 'stripes' in file else 'red'}" for file in files]
    (tmp_path / "t.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    source = open_labeled(f"csv:{tmp_path}/t.csv,root={folder}")
    assert source.classes == ("red", "stripes")
    known = ("blue", "stripes", "red")
    same = with_classes("t.csv", source, known)
    assert as_multilabel(same) is not None
    for index, row in enumerate(targets_of(same, range(len(same))).tolist()):
        assert row == [0, float("stripes" in same.name(index)), 1]
    with pytest.raises(UsageError, match="has the classes 'stripes', which the model does not have"):
        with_classes("t.csv", source, ("blue", "red"))
