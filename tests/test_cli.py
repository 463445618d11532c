"""The command: verbs, messages, exit codes and the files that it writes."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normfree._version import __version__
from normfree.cli import HELP, VERBS, main
from normfree.commands.arguments import parse_arguments
from normfree.commands.eval_command import EvalArguments
from normfree.commands.export_command import ExportArguments
from normfree.commands.predict_command import PredictArguments
from normfree.commands.serve_command import ServeArguments
from normfree.commands.train_command import TrainArguments, parse
from normfree.commands.usage import UsageError
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained
from normfree.scores import shown_top1
from normfree.training.config_io import keys
from normfree.training.gradient import BatchGradient

TINY = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --length 4st "
    "--log.evaluate_every 2st --log.checkpoint_every 2st --optim.warmup 1st"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder with two classes of small images, red and blue."""
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


def test_a_run_folder_contains_the_documented_files(trained):
    assert {p.name for p in trained.iterdir()} - {".lock"} == {
        "config.toml", "metrics.jsonl", "log.txt", "environment.txt", "results.json", "curves.png",
        "checkpoints", "model", "samples.csv",
    }  # fmt: skip
    assert {p.name for p in (trained / "model").iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "README.md",
    }
    config = json.loads((trained / "model" / "config.json").read_text())
    assert config["label_names"] == ["blue", "red"]
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    scores = json.loads((trained / "results.json").read_text())
    card = (trained / "model" / "README.md").read_text()
    assert f"| averaged weights | 2 test | {shown_top1(scores['test'])} |" in card
    assert f"| averaged weights | 2 validation | {shown_top1(scores['average'])} |" in card
    assert "top-5" not in card  # of two classes
    low, high = scores["test"]["top1_interval"]
    assert 0 <= low < scores["test"]["top1"] < high <= 100 or scores["test"]["top1"] in (low, high)
    assert scores["test"]["majority"] == 50.0
    assert [x for x in (trained / "config.toml").read_text().splitlines() if '"auto"' in x] == [
        'device = "auto"'
    ]


def test_eval_leaves_out_the_images_that_the_run_was_trained_on(trained, photos, tmp_path, capsys):
    def images(*args: str) -> tuple[int, str]:
        assert main(["eval", str(trained), *args, "--json"]) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["images"], printed.err

    assert images(str(photos)) == (
        2,
        "normfree: scored on the test part of the run's data, 2 images; left out: 8 that it was trained on, 2 that "
        "chose the best step (--part all scores them too)\n",
    )
    assert images() == images(str(photos))
    assert images(str(photos), "--part", "val") == (
        2,
        "normfree: scored on the validation part of the run's data, 2 images; left out: 8 that it was trained on, 2 of "
        "the test part (--part all scores them too)\n",
    )
    assert images(str(photos), "--part", "all") == (12, "")
    copied = tmp_path / "copied"  # found by content, not by path
    shutil.copytree(photos, copied)
    Image.new("RGB", (8, 8), "red").save(copied / "red" / "new.png")
    count, told = images(str(copied))
    assert count == 5
    assert f"8 of the 13 images of {copied} are left out because {trained} was trained on them" in told
    cut = tmp_path / "cut"
    shutil.copytree(trained, cut)
    lines = (cut / "samples.csv").read_text().splitlines(keepends=True)
    (cut / "samples.csv").write_text("".join(lines[:6]))
    assert main(["eval", str(cut), str(copied)]) == 2
    assert capsys.readouterr().err == (
        f"normfree: {cut / 'samples.csv'} is damaged: it has 5 of the 8 training images. "
        "Fix: restore it, or delete it and score with --part all.\n"
    )
    for file in copied.glob("*/*.png"):
        if file.name == "new.png" or file.read_bytes() not in _trained_bytes(trained, photos):
            file.unlink()
    count, told = images(str(copied))
    assert count == 8
    assert f"WARNING: {trained} was trained on all 8 images of {copied}" in told


def _trained_bytes(trained: Path, photos: Path) -> list[bytes]:
    rows = list(csv.DictReader((trained / "samples.csv").read_text().splitlines()))
    return [(photos / row["name"]).read_bytes() for row in rows if row["part"] == "train"]


def test_eval_finds_classes_by_name_and_writes_answers(trained, tmp_path, capsys):
    (tmp_path / "t" / "red").mkdir(parents=True)
    (tmp_path / "t" / "blue").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (250, i, i)).save(tmp_path / "t" / "red" / f"{i}.png")
    out, matrix, plot = (tmp_path / name for name in ("a.csv", "m.csv", "m.png"))
    args = ["eval", str(trained), str(tmp_path / "t"), "--out", str(out)]
    assert main([*args, "--confusion", str(matrix), "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["images"] == 3
    assert score["per_class_top1"].keys() == {"red"}
    assert score["classes"]["blue"]["recall"] is None
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["class"] for row in rows] == ["red"] * 3
    assert sum(row["right"] == "True" for row in rows) == round(score["top1"] * 3 / 100)
    table = list(csv.reader(matrix.read_text().splitlines()))
    assert table[0] == ["class", "blue", "red"]
    assert sum(int(cell) for row in table[1:] for cell in row[1:]) == 3
    (tmp_path / "t" / "blue").rmdir()  # a class without a folder
    assert main([*args, "--confusion", str(plot)]) == 0
    assert "precision %" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(trained), "synthetic:classes=3,size=16,train=6,val=3"]) == 2
    assert capsys.readouterr().err == (
        "normfree: synthetic:classes=3,size=16,train=6,val=3 has the classes 'disk', 'ring', 'square', which the model "
        "does not have. Allowed: the model's classes, 'blue', 'red'. Fix: rename the class folders, or remove them.\n"
    )


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
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert main(["predict", str(trained), str(photos / "red"), str(tmp_path / "bad.png"), "--out",
                 str(tmp_path / "x.jsonl")]) == 2  # fmt: skip
    entries = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [("error" in e) for e in entries] == [False] * 6 + [True]
    assert main(["predict", str(trained), str(photos), "--out", "x.txt"]) == 2
    assert (
        "--out is 'x.txt'. Allowed: a name that ends in .csv or .jsonl or .json or .html. Fix: --out x.csv."
        in capsys.readouterr().err
    )


def test_a_resumed_run_understands_the_keys_of_other_programs(trained, capsys):
    for options, message in (
        (["--resume"], f"--resume is given with a run. Fix: normfree train {trained}."),
        (["--epochs", "9"], "unknown key 'epochs'. Use --length 9ep"),
        (["--optim.lr", "1"], "--optim.lr cannot change when a run is resumed. Allowed: --data, --length, "),
        (["--on-divergence", "other"], "on_divergence='other'. Allowed: stop; rollback:lr=0.3,times=3."),
    ):
        assert main(["train", str(trained), *options]) == 2
        assert capsys.readouterr().err.startswith(f"normfree: {message}")
    assert main([str(trained)]) == 2
    assert (
        capsys.readouterr().err == f"normfree: unknown verb {str(trained)!r}. Use normfree train {trained}\n"
    )


def test_a_resumed_run_keeps_its_config(trained, photos, capsys):
    assert main(["train", str(trained)]) == 0  # the run is finished, so this only evaluates it
    assert main(["train", str(trained), "--optim.lr", "1"]) == 2
    assert capsys.readouterr().err.startswith(
        "normfree: --optim.lr cannot change when a run is resumed. Allowed: --data, --length, "
    )
    assert main(["train", "--data", str(photos), *TINY, "--out", str(trained)]) == 2
    assert "Fix: resume it with `normfree train" in capsys.readouterr().err


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
    ("line", "message"),
    [
        (
            "resume",
            "unknown verb 'resume'. Use normfree train RUN\n",
        ),
        ("continue runs/x --length 9ep", "unknown verb 'continue'. Use normfree train runs/x\n"),
        ("validate runs/x", "unknown verb 'validate'. Use normfree eval runs/x\n"),
        ("fine_tune a/", "unknown verb 'fine_tune'. Use normfree train finetune --data a/ --weights RUN\n"),
        ("scratch --data a", "unknown verb 'scratch'. Use normfree train scratch --data a\n"),
        ("train --resume r2", "unknown key 'resume'. Use normfree train r2\n"),
        ("train --resume=runs/x/checkpoints/last", "unknown key 'resume'. Use normfree train runs/x\n"),
        ("train --resume", "unknown key 'resume'. Use normfree train RUN\n"),
        ("train --resume true", "unknown key 'resume'. Use normfree train RUN\n"),
        (
            "train data=a",
            "'data=a' is not a recipe, a run folder or a .toml file. Allowed: the recipes demo, scratch, finetune, "
            "simclr, metric, private, cifar, those of `normfree list recipes`. Fix: write each option as --data a.",
        ),
        (
            "trian",
            "unknown verb 'trian'. Did you mean 'train'? Allowed: 'list', 'show', 'train', 'audit', 'eval', "
            "'predict', 'diagnose', 'convert', 'export', 'serve', 'bench'.",
        ),
        (
            "train dmo",
            "'dmo' is not a recipe, a run folder or a .toml file. Did you mean 'demo'? Allowed: the recipes demo, ",
        ),
        (
            "train --model nfnet-f0",
            "unknown model 'nfnet-f0'. Did you mean 'nfnet_f0'? All names: normfree list models",
        ),
        (
            "train --data nowhere/ --model nf_resnet_nano",
            "'nowhere' is neither a folder nor a known data set. Allowed: ",
        ),
        (
            "train --data emojis --model nf_resnet_nano",
            "'emojis' is neither a folder nor a known data set. Allowed: ",
        ),
        (
            "train --lr 1 --length 5",
            "unknown key 'lr'. Did you mean 'optim.lr'?\nnormfree: length='5'. Allowed: ",
        ),
        (
            "list vgg*",
            "no model matches 'vgg*'. Allowed: models, recipes, or a shell pattern such as 'nf_*'. "
            "Fix: see all names with `normfree list models`.",
        ),
        ("show vgg", "unknown model 'vgg'."),
        (
            "predict nowhere x.png",
            "'nowhere' is not a model folder. Allowed: a folder with config.json and model.safetensors",
        ),
        ("train --out", "--out has no value. Fix: --out FOLDER."),
        ("train --out --optim.lr 1", "--out has no value. Fix: --out FOLDER."),
        (
            "train --data synthetic:classes=99 --model nf_resnet_nano",
            "'synthetic:classes=99' gives classes=99. Allowed: a whole number from 2 to 10. Fix: classes=10",
        ),
        (
            "train --data synthetic --model nf_resnet_nano --device gpu",
            "device is 'gpu'. Allowed: auto, cpu, cuda, cuda:N or mps. Fix: use 'auto'.",
        ),
        (
            "train --data synthetic --model nf_resnet_nano --weights nowhere",
            "'nowhere' is not a model folder. Allowed: a folder with config.json and model.safetensors",
        ),
        (
            "eval nowhere emoji",
            "'nowhere' is not a model folder. Allowed: a folder with config.json and model.safetensors",
        ),
        ("train missing.toml", "missing.toml does not exist."),
        ("bench", "no model name was given. Allowed: one or more."),
        ("predict runs", "no path was given. Allowed: one or more."),
        ("list recipes vgg*", "no recipe matches 'vgg*'."),
        ("list recipe", "no model matches 'recipe'. Did you mean 'recipes'?"),
        (
            "train --data synthetic --precision float16",
            "precision='float16'. Did you mean 'bfloat16'? Allowed: 'auto', 'float32' or 'bfloat16'.",
        ),
        (
            "train --input.val_fraction 2",
            "input.val_fraction='2'. Allowed: a number from 0 to below 1, or fold:2/5,",
        ),
        ("train --data synthetic --augment.repeats 7", "augment.repeats=7 with input.batch_size="),
    ],
)
def test_each_mistake_prints_one_line_and_exits_with_2(line, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"normfree: {message}")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_a_process():
    wrong = subprocess.run([sys.executable, "-m", "normfree", "show", "vgg"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)


def test_traceback_raises_the_error():
    with pytest.raises(UsageError, match=r"^unknown model 'vgg'"):
        main(["show", "vgg", "--traceback"])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("list --bogus", "unknown option '--bogus'. All options: normfree list --help"),
        ("eval", "normfree eval needs MODEL. Fix: normfree eval MODEL DATA, see normfree eval --help."),
        ("eval a b --batch-size x", "--batch-size is 'x'. Allowed: a whole number."),
        ("eval a b --batch_size", "--batch-size has no value. Allowed: a whole number. Fix: --batch-size 128."),
        ("predict m p --heatmap", "--heatmap has no value. Fix: --heatmap FOLDER."),
        ("predict m --heatmap p", "no path was given, and 'p' is the folder of --heatmap. Fix: normfree predict m p "
                                  "--heatmap FOLDER."),
        ("predict m p --format", "--format has no value. Allowed: table, csv, jsonl, json. Fix: --format table."),
        ("export m --images", "--images has no value. Fix: --images PATH..."),
        ("predict m p --embeddings e.npy", "--embeddings is 'e.npy'. Allowed: a name that ends in .npz. Fix: "
                                           "--embeddings e.npz."),
        ("eval a b --bach-size=3", "unknown option '--bach-size'. Did you mean '--batch-size'? "
                                   "All options: normfree eval --help"),
        ("show a b", "unexpected argument 'b'. Allowed: normfree show NAME."),
        ("predict m p --format xml", "--format is 'xml'. Allowed: table, csv, jsonl, json."),
        ("export m --format onx", "--format is 'onx'. Did you mean 'onnx'? Allowed: onnx, openvino, pt2."),
        ("eval a b --json=maybe", "--json is 'maybe'. Allowed: true or false."),
        ("bench --threads 3", "unknown option '--threads'. All options: normfree bench --help"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(line, text, capsys):
    assert main(line.split()) == 2
    assert capsys.readouterr().err == f"normfree: {text}\n"


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "train"])
def test_every_option_without_its_value_names_the_value(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    options = set(re.findall(r"(--[a-z][a-z-]*) (?!--)[A-Z{\[]", shown))
    assert options or verb in ("list", "show")
    for option in options:
        assert main([verb, "a", "b", option]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"normfree: {option} has no value.")
        example = re.search(rf"Fix: {option} (\S+)\n$", error)
        assert example, error
        assert example[1] not in ("", "STR.", "TEXT."), error


def test_arguments_are_values_of_the_types_of_their_fields():
    parsed = parse_arguments(
        "serve", ServeArguments, ["r", "--max-delay-ms=2.5", "--port", "80", "--device", "cpu"]
    )
    assert (parsed.model, parsed.max_delay_ms, parsed.port, parsed.device) == ("r", 2.5, 80, "cpu")
    parsed = parse_arguments("predict", PredictArguments, ["m", "a", "--top", "2", "b", "--", "--c"])
    assert (parsed.model, parsed.paths, parsed.top) == ("m", ("a", "b", "--c"), 2)
    parsed = parse_arguments("export", ExportArguments, ["m", "--images", "a", "b", "--unfolded"])
    assert (parsed.images, parsed.unfolded, parsed.format) == (("a", "b"), True, "onnx")
    assert parse_arguments("eval", EvalArguments, ["m", "d", "--json", "--no-json"]).json is False


def test_the_help_of_a_verb_is_printed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--help"])
    assert exit.value.code == 0
    assert "--batch-size" in capsys.readouterr().out


def test_the_help_fits_on_a_screen():
    lines = HELP.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_a_written_config_trains_the_same_model_again(trained, tmp_path, capsys):
    assert main(["train", str(trained / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    first, second = (run / "model" / "model.safetensors" for run in (trained, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_shell_command_runs_from_the_command_line_and_never_from_a_config(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for i, path in enumerate(sorted(photos.rglob("*.png"))):
            tar.add(path, f"{i:03}.png")
            label = tarfile.TarInfo(f"{i:03}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"01"[i % 2 : i % 2 + 1]))
    data, out = f"pipe:cat {tmp_path / 'photos.tar'}; echo once >> {tmp_path / 'runs'}", tmp_path / "run"
    assert main(["train", "scratch", "--data", data, *TINY, "--out", str(out)]) == 0
    assert main(["train", str(out)]) == 0  # reads the file that the shell command wrote
    assert main(["eval", str(out), data]) == 0
    assert (tmp_path / "runs").read_text() == "once\n"
    (kept,) = (tmp_path / "cache" / "normfree" / "pipes").iterdir()
    kept.unlink()
    capsys.readouterr()
    for args in (["train", str(out)], ["train", str(out / "config.toml"), "--out", str(tmp_path / "other")]):
        assert main(args) == 2
        assert "is a shell command, and was not typed here" in capsys.readouterr().err
    assert (tmp_path / "runs").read_text() == "once\n"


def test_a_diverged_run_has_its_own_exit_code(tmp_path, monkeypatch, capsys):
    def poisoned(self, images, targets, step):
        result = original(self, images, targets, step)
        if step == 2:
            self.net.head.bias.grad[0] = float("nan")
        return result

    original = BatchGradient.__call__
    monkeypatch.setattr(BatchGradient, "__call__", poisoned)
    data = "synthetic:classes=2,size=16,train=8,val=4"
    assert main(["train", "--data", data, *TINY, "--out", str(tmp_path / "run")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("normfree: step 2: 1 of ")
    assert "gradients are not finite: 'head.bias'" in error
    assert error.count("\n") == 1
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step-00000002\n"


@pytest.fixture
def model(tmp_path):
    """Return a model folder with class names that need quoting in a table, a CSV file and on a terminal."""
    net = create_model("nf_resnet_nano", num_classes=3).eval()
    pre = Preprocessing(image_size=16, crop="squash")
    save_pretrained(TrainedModel(net, pre, ("[/red]", 'a,"b"', "snö")), tmp_path / "model")
    return tmp_path / "model"


def test_csv_and_json_lines_contain_the_same_predictions(model, photos, tmp_path, capsys):
    odd = tmp_path / "a, b.png"
    odd.write_bytes((photos / "red" / "0.png").read_bytes())
    args = ["predict", str(model), str(odd), str(photos / "blue" / "1.png")]
    assert main([*args, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))
    assert main([*args, "--format", "jsonl"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["path"] for r in rows] == [str(odd)] * 3 + [str(photos / "blue" / "1.png")] * 3
    assert [r["rank"] for r in rows] == ["1", "2", "3"] * 2
    assert {r["class"] for r in rows} == {"[/red]", 'a,"b"', "snö"}
    flat = [(e["path"], t["class"], t["probability"]) for e in entries for t in e["top"]]
    assert flat == [(r["path"], r["class"], float(r["probability"])) for r in rows]


def test_a_file_name_need_not_be_utf8(model, photos, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"\xff.png", b"z.png"):
        (folder / os.fsdecode(name)).write_bytes((photos / "red" / "0.png").read_bytes())
    for kind in ("csv", "jsonl"):
        out = tmp_path / f"x.{kind}"
        assert main(["predict", str(model), str(folder), "--top", "1", "--out", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        assert "z.png" in text
        assert "udcff.png" in text
    capsys.readouterr()
    assert main(["predict", str(model), str(folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_class_names_are_not_read_as_markup(model, tmp_path, capsys):
    for name in ("[", 'a,"b"', "snö"):  # a folder name cannot contain "/"
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "data" / name / "0.png")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "label_names": ["[bold]", 'a,"b"', "snö"]}))
    (model / "SHA256SUMS").unlink()
    (tmp_path / "data" / "[").rename(tmp_path / "data" / "[bold]")
    assert main(["eval", str(model), str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["[bold]", 'a,"b"', "snö"]
    assert out.splitlines()[-1].endswith(" on 3 images, in float32")


def test_a_failed_prediction_leaves_no_file(model, tmp_path, capsys):
    out = tmp_path / "x.csv"
    assert main(["predict", str(model), str(tmp_path / "gone.png"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"normfree: '{tmp_path}/gone.png' does not exist. Allowed: ")
    assert main(["predict", str(model), str(model), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"normfree: '{model}' contains no images. Allowed: ")
    assert main(["predict", str(model), str(tmp_path), "--top", "0", "--out", str(out)]) == 2
    assert capsys.readouterr().err == "normfree: top is 0. Allowed: 1 or more.\n"
    assert not out.exists()


def test_an_operating_system_error_is_one_line(model, photos, tmp_path, capsys):
    out = tmp_path / "x.csv"
    out.mkdir()
    assert main(["predict", str(model), str(photos), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"normfree: [Errno 21] Is a directory: '{out}'\n"
    with pytest.raises(IsADirectoryError):
        main(["predict", str(model), str(photos), "--out", str(out), "--traceback"])


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "train", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "normfree: interrupted\n"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("row", "nf_resnet_nanoo", "unknown model 'nf_resnet_nanoo'. Did you mean 'nf_resnet_nano'?"),
        ("label_names", ["a", "b"], "config.json has 2 class names for 3 outputs."),
        ("preprocessing", {}, "config.json does not describe a network: "),
        ("preprocessing", None, "config.json does not describe a network: "),
        ("num_classes", 4, "config.json has 3 class names for 4 outputs."),
        ("model_args", None, "config.json does not describe a network: "),
        ("model_args", {"weights": "x"}, "'weights' in 'model_args' is no field of a variant"),
        ("model_args", {"features_only": True}, "'features_only' in 'model_args' is no field of a variant"),
        ("model_args", {"wdths": [1]}, "wdths"),
        ("label_names", 3, "config.json does not describe a network: 'label_names' is not a list."),
        ("row", ["x"], "config.json does not describe a network: "),
        ("normfree", 3, "config.json does not describe a network: "),
    ],
)  # fmt: skip
def test_a_model_folder_that_contradicts_itself(model, photos, key, value, message, capsys):
    config = json.loads((model / "config.json").read_text())
    inside = config["normfree"] if key in config["normfree"] else config
    inside[key] = value
    (model / "config.json").write_text(json.dumps(config))
    (model / "SHA256SUMS").unlink()
    assert main(["predict", str(model), str(photos)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_foreign_model_folder_without_its_preprocessing(model, photos, capsys):
    config = json.loads((model / "config.json").read_text())
    del config["normfree"]
    config |= {"architecture": "test_nfnet", "pretrained_cfg": {}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "SHA256SUMS").unlink()
    assert main(["predict", str(model), str(photos)]) == 2
    assert "has a missing or invalid entry: 'input_size'." in capsys.readouterr().err


def test_help_and_version(capsys):
    for args in ([], ["--help"], ["-h"], ["help"]):
        assert main(args) == 0
        assert capsys.readouterr().out == HELP
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"normfree {__version__}\n"
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{key.replace('_', '-')}" in out or f"--{key}" in out for key in keys())
    assert "nf_resnet_micro_64" in out  # the default of the recipe "demo", which runs without arguments


def test_the_arguments_of_train():
    assert parse([]) == TrainArguments("", "", find_lr=False, folds=0, overrides=())
    args = ["demo", "--optim.lr", "1", "--out", "x", "--exact", "--find-lr"]
    parsed = parse(args)
    assert parsed == TrainArguments(
        "demo", "x", find_lr=True, folds=0, overrides=("--optim.lr", "1", "--parallel", "exact")
    )
    assert parsed.keys == ["optim.lr", "parallel"]
    assert parse(["--out=x", "--data=photos"]) == TrainArguments("", "x", False, 0, ("--data=photos",))
    assert parse(["--folds=5"]).folds == parse(["--folds", "5"]).folds == 5


def test_names_of_files_are_printed_escaped_and_no_formula_reaches_a_table(
    model, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("=1+1.png", "\x1b[31m.png"):
        Image.new("RGB", (16, 16)).save(name, "PNG")
    (tmp_path / "\x1b[2J.png").write_text("no image")
    names = ["=1+1.png", "\x1b[31m.png", "\x1b[2J.png"]
    assert main(["predict", str(model), *names, "--out", "a.csv"]) == 2
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert {row[0] for row in rows[1:]} == {"'=1+1.png", "\\x1b[31m.png", "\\x1b[2J.png"}
    for arguments in (["predict", str(model), *names], ["predict", str(model), "\x1b[3J.png"]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
