"""`normfree predict`: what it writes, heat maps, and inputs other than files; `normfree show` of a saved model."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normfree.cli import main
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel, save_pretrained

CLASSES = ("<b>red</b>", "=green", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model folder whose class names need escaping in HTML and in spreadsheets."""
    torch.manual_seed(0)
    net = create_model(
        "nf_resnet_nano", num_classes=3, depths=(1, 1, 1), skip_gain=0.5, classifier_std=0.3
    ).eval()
    folder = tmp_path_factory.mktemp("model")
    return str(save_pretrained(TrainedModel(net, Preprocessing(image_size=32), CLASSES), folder))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with five images, two of the same name, and a damaged one."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    random = np.random.default_rng(0)
    for i, name in enumerate(("a.png", "b.png", "<i>c&d.png", "more/a.png", "more/e.png")):
        pixels = random.integers(0, 60, (30 + 9 * i, 40, 3), dtype=np.uint8)
        pixels[..., i % 3] += 180
        Image.fromarray(pixels).save(root / name)
    (root / "more" / "bad.png").write_bytes(b"no image")
    return root


def run(*arguments: str | Path) -> int:
    return main(["predict", *map(str, arguments)])


def test_json_and_wide_csv_have_the_numbers_of_json_lines(model, photos, tmp_path, capsys):
    out = {kind: tmp_path / f"x.{kind}" for kind in ("jsonl", "json", "csv")}
    for kind, path in out.items():
        more = ["--wide", "--top", "1"] if kind == "csv" else []
        assert run(model, photos, "--out", path, *more) == 2  # one image cannot be read
        assert capsys.readouterr().out == f"{path}: 5 images\n"
    lines = [json.loads(line) for line in out["jsonl"].read_text().splitlines()]
    assert json.loads(out["json"].read_text()) == lines
    assert [Path(entry["path"]).name for entry in lines if "error" in entry] == ["bad.png"]
    rows = list(csv.DictReader(out["csv"].read_text().splitlines()))
    assert list(rows[0]) == ["path", "class", "<b>red</b>", "'=green", "blue", "error"]
    for row, entry in zip(rows, lines, strict=True):
        assert row["path"] == entry["path"]
        if "error" in entry:
            assert (row["class"], row["blue"], row["error"]) == ("", "", entry["error"])
            continue
        found = {top["class"]: top["probability"] for top in entry["top"]}
        assert {name: float(row[name.replace("=", "'=")]) for name in CLASSES} == found
        assert row["class"].lstrip("'") == max(found, key=found.__getitem__)
    assert run(model, photos, "--format", "json") == 2
    assert json.loads(capsys.readouterr().out) == lines
    assert run(model, photos / "a.png", "--format", "csv", "--wide") == 0
    assert capsys.readouterr().out.splitlines()[0] == "path,class,<b>red</b>,'=green,blue,error"


def test_the_page_has_every_image_and_escapes_every_text(model, photos, tmp_path):
    page = tmp_path / "page.html"
    assert run(model, photos, "--out", page) == 2
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 5
    assert "&lt;i&gt;c&amp;d.png" in text
    assert "bad.png: not an image" in text
    assert "Could not be read: 1" in text
    assert "<b>" not in text
    assert "<i>" not in text


def test_heat_maps_are_named_after_the_images(model, photos, tmp_path, capsys):
    folder, out = tmp_path / "maps" / "new", tmp_path / "x.jsonl"
    assert run(model, photos, "--heatmap", folder, "--out", out) == 2
    assert capsys.readouterr().out == f"{out}: 5 images\n{folder}: 5 heat maps\n"
    assert {path.name for path in folder.iterdir()} == {
        "_i_c_d.jpg", "a.jpg", "a-2.jpg", "b.jpg", "e.jpg",
    }  # fmt: skip
    entries = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(e["path"]).name for e in entries if "heatmap" not in e] == ["bad.png"]
    for entry in entries:
        if "heatmap" in entry:
            with Image.open(entry["heatmap"]) as drawn, Image.open(entry["path"]) as image:
                assert max(drawn.size) == 320  # small images are enlarged
                assert drawn.width / drawn.height == pytest.approx(image.width / image.height, rel=0.02)
    assert run(model, photos / "a.png", "--heatmap", folder) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}: 1 heat map"


def test_patterns_and_urls_reach_the_command(model, photos, capsys, monkeypatch):
    assert run(model, photos / "*.png", photos / "**" / "e.*", "--top", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run(model, f"{photos}/*.webp") == 2
    assert capsys.readouterr().err == (
        f"normfree: the pattern '{photos}/*.webp' matches nothing. Allowed: files and folders that exist.\n"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(model, "https://example.org/a.jpg") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(
        "normfree: https://example.org/a.jpg would be downloaded, and HF_HUB_OFFLINE is set."
    )
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--wide",),
            "--wide with --format table. Allowed: --wide with CSV. Fix: --wide --out predictions.csv.",
        ),
        (("--wide", "--out", "x.json"), "--wide with --out x.json. Allowed: --wide with CSV."),
        (("--every", "0"), "every is 0. Allowed: 1 or more."),
        (
            ("--out", "gone/x.html"),
            "--out is 'gone/x.html'. Allowed: a file in an existing folder. Fix: mkdir gone.",
        ),
    ],
)
def test_wrong_arguments_are_one_line(model, photos, arguments, message, capsys):
    assert run(model, photos, *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_an_interrupted_camera_leaves_a_complete_file(model, photos, tmp_path, monkeypatch, capsys):
    from normfree.data.image_inputs import ImageInput

    def frames(images, *, every):
        yield ImageInput("camera:0#t=0.000", lambda white: Image.new("RGB", (40, 30)), live=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("normfree.prediction.image_inputs", frames)
    assert run(model, "camera:0", "--out", tmp_path / "x.json", "--every", "2") == 130
    assert [entry["path"] for entry in json.loads((tmp_path / "x.json").read_text())] == ["camera:0#t=0.000"]
    assert capsys.readouterr().err == "normfree: interrupted\n"


def test_show_prints_what_a_model_folder_holds(model, capsys):
    assert main(["show", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"# {model}: nf_resnet_nano, ")
    assert lines[0].endswith(" parameters, images of 3 x 32 x 32")
    assert "depths = (1, 1, 1)" in lines
    assert "# 3 classes, one for each image" in lines
    assert "0 = '<b>red</b>'" in lines
    assert {"image_size = 32", "crop = 'resize_crop_32'", "# files"} <= set(lines)
    size = (Path(model) / "model.safetensors").stat().st_size
    assert f"model.safetensors: {size:,} bytes" in lines


def test_show_prints_what_an_exported_file_holds(model, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    assert main(["export", model, "--out", str(out), "--images", _image(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["show", str(out)]) == 0
    assert capsys.readouterr().out.startswith(
        f"# {out}: exported from nf_resnet_nano, images of 3 x 32 x 32\n# 3 cl"
    )
    assert run(out, _image(tmp_path), "--heatmap", tmp_path / "maps") == 2
    assert "nf_resnet_nano was read from an exported file, which has no gradients" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()
    (tmp_path / "other").mkdir()
    assert main(["show", str(tmp_path / "other")]) == 2
    assert "is not a model folder" in capsys.readouterr().err


def _image(folder: Path) -> str:
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    return str(folder / "red.png")


def test_files_of_eval_name_classes_as_text(model, tmp_path):
    """A class that looks like a formula, and one without images."""
    for name in ("=green", "blue"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), name.lstrip("=")).save(tmp_path / "test" / name / "0.png")
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"][0] = "red"  # the name of a folder has no slash
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "SHA256SUMS").unlink()
    answers, table = tmp_path / "answers.csv", tmp_path / "confusion.csv"
    args = ["eval", str(folder), str(tmp_path / "test"), "--out", str(answers), "--confusion", str(table)]
    assert main(args) == 0
    rows = list(csv.DictReader(answers.read_text().splitlines()))
    assert {row["class"] for row in rows} == {"'=green", "blue"}
    lines = list(csv.reader(table.read_text().splitlines()))
    assert lines[0] == ["class", "red", "'=green", "blue"]
    assert [sum(map(int, line[1:])) for line in lines[1:]] == [0, 1, 1]


def test_images_with_several_classes_have_no_confusion_matrix(tmp_path, capsys):
    names = ("outdoor", "round")
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "data" / name / "0.png")
    net = create_model("nf_resnet_nano", num_classes=2)
    model = TrainedModel(net.eval(), Preprocessing(image_size=16), names, sigmoid=True)
    args = ["eval", str(save_pretrained(model, tmp_path / "model")), f"nested:{tmp_path / 'data'}"]
    assert main([*args, "--confusion", str(tmp_path / "c.png")]) == 2
    assert "have several classes. Allowed: images with one class each." in capsys.readouterr().err
    assert main([*args, "--out", str(tmp_path / "a.csv")]) == 0
    assert "average precision" in capsys.readouterr().out


@pytest.mark.browser
def test_the_page_in_a_browser_loads_nothing_and_fits_a_phone(model, photos, tmp_path):
    from playwright.sync_api import sync_playwright

    page = tmp_path / "page.html"
    run(model, photos, "--out", page, "--heatmap", tmp_path / "maps")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab, seen = browser.new_page(viewport={"width": 390, "height": 800}), []
        tab.on("console", lambda message: seen.append(message.text))
        tab.on("request", lambda request: seen.append(request.url))
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert tab.locator("section").count() >= 2
        browser.close()
    assert [url for url in seen if not url.startswith(("file:", "data:"))] == []
