"""The command as a newcomer meets it: verbs, messages, exit codes, files."""

import csv
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from normfree.cli import HELP, main

TINY = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --length 4st "
    "--log.evaluate_every 2st --log.checkpoint_every 2st --optim.warmup 1st"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of little pictures, red and blue."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (root / name).mkdir()
        for i in range(6):
            pixels = random.integers(0, 60, (24, 20, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "run"
    assert main(["train", "--data", str(photos), *TINY, "--out", str(out)]) == 0
    return out


def test_a_run_folder_holds_what_is_documented(trained):
    assert {p.name for p in trained.iterdir()} - {".lock"} == {
        "config.toml", "metrics.jsonl", "log.txt", "environment.txt", "results.json", "curves.png",
        "checkpoints", "model",
    }  # fmt: skip
    assert {p.name for p in (trained / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    scores = json.loads((trained / "results.json").read_text())
    card = (trained / "model" / "README.md").read_text()
    assert f"| averaged weights | {scores['average']['top1']:.2f} |" in card
    assert [x for x in (trained / "config.toml").read_text().splitlines() if '"auto"' in x] == [
        'device = "auto"'
    ]


def test_eval_scores_every_image_of_a_plain_folder(trained, photos, capsys):
    assert main(["eval", str(trained), str(photos), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["images"] == 12
    assert score["per_class_top1"].keys() == {"blue", "red"}
    assert main(["eval", str(trained), "synthetic:classes=3,size=16,train=6,val=3"]) == 2
    assert "has classes disk, ring, square, ...; the model knows blue, red" in capsys.readouterr().err


def test_predict_writes_table_csv_and_json_lines(trained, photos, tmp_path, capsys):
    assert main(["predict", str(trained), str(photos / "red"), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all("%" in line and ".png" in line for line in lines)
    assert main(["predict", str(trained), str(photos), "--out", str(tmp_path / "x.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len(rows) == 24
    assert {row["class"] for row in rows} == {"red", "blue"}
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(12, abs=1e-4)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert main(["predict", str(trained), str(photos / "red"), str(tmp_path / "bad.png"), "--out",
                 str(tmp_path / "x.jsonl")]) == 2  # fmt: skip
    entries = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [("error" in e) for e in entries] == [False] * 6 + [True]
    assert main(["predict", str(trained), str(photos), "--out", "x.txt"]) == 2
    assert "--out 'x.txt': expected a name that ends in .csv or .jsonl." in capsys.readouterr().err


def test_a_run_continues_only_as_it_began(trained, photos, capsys):
    assert main(["train", str(trained)]) == 0  # finished: scores again
    assert main(["train", str(trained), "--optim.lr", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "normfree: --optim.lr: a run continues as it was started; only "
    )
    assert main(["train", "--data", str(photos), *TINY, "--out", str(trained)]) == 2
    assert "Continue it with `normfree train" in capsys.readouterr().err


def test_list_and_show(trained, capsys):
    assert main(["list", "nf_regnet_b[01]"]) == 0
    assert "8,595,372" in capsys.readouterr().out
    assert main(["list", "recipes"]) == 0
    assert capsys.readouterr().out.count("\n") >= 3
    assert main(["show", "nfnet_f0"]) == 0
    out = capsys.readouterr().out
    assert "151 tensors" in out
    assert "1 tensors, 3,072,000 numbers, decayed, not clipped" in out
    assert "81 tensors" in out
    assert main(["show", "demo"]) == 0
    assert 'data = "emoji"' in capsys.readouterr().out
    assert main(["show", str(trained)]) == 0
    assert "after 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "unknown verb 'trian'. Did you mean 'train'? Verbs: list, show, train, eval, predict."),
        ("train dmo", "'dmo' is no recipe, run folder or .toml file. Did you mean 'demo'? Recipes: "),
        (
            "train --model nfnet-f0",
            "unknown model 'nfnet-f0'. Did you mean 'nfnet_f0'? All names: normfree list models",
        ),
        (
            "train --data nowhere/ --model nf_resnet_nano",
            "'nowhere/' is neither a folder nor a known data set. Allowed: ",
        ),
        (
            "train --data emojis --model nf_resnet_nano",
            "'emojis' is neither a folder nor a known data set. Allowed: ",
        ),
        (
            "train --lr 1 --length 5",
            "unknown key 'lr'. Did you mean 'optim.lr'?\nnormfree: length='5': expected ",
        ),
        ("list vgg*", "no model matches 'vgg*'. All names: normfree list models"),
        ("show vgg", "unknown model 'vgg'."),
        ("predict nowhere x.png", "'nowhere' is no model folder: it needs config.json and model.safetensors"),
        ("train --out", "--out: a value is missing."),
        ("train missing.toml", "missing.toml cannot be read as TOML: "),
    ],
)
def test_mistakes_get_one_line_each_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normfree: {message}")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_as_a_process():
    run = [sys.executable, "-m", "normfree"]
    wrong = subprocess.run([*run, "show", "vgg"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    shown = subprocess.run([*run, "show", "vgg", "--traceback"], capture_output=True, text=True)
    assert "Traceback" in shown.stderr
    assert subprocess.run([*run, "list", "--bogus"], capture_output=True).returncode == 2


def test_the_help_fits_a_screen():
    lines = HELP.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
