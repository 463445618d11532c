"""`normfree audit` names every image that cannot be used, with reason and fix, and writes a verdict on each image."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from normfree.cli import main


@pytest.fixture
def photos(tmp_path):
    """Two classes of six images, of which one is a copy, three are bad, and one has a name that is a formula."""
    random = np.random.default_rng(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for number in range(6):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    folder = tmp_path / "photos" / "cat"
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:80])
    (folder / "2.png").write_bytes(b"")
    (folder / "\x1b[31m\n.png").symlink_to("nowhere")
    (folder / "=1+1.png").write_bytes((tmp_path / "photos" / "dog" / "0.png").read_bytes())
    return tmp_path / "photos"


def verdicts(path):
    return {row["path"]: row for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))}


def test_bad_images_are_named_with_reason_and_fix(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "photos"]) == 1
    out, err = capsys.readouterr()
    again = "copy it again from where it came from, or delete it."
    lines = out.splitlines()
    assert lines[0] == (
        r"photos/cat/\x1b[31m\n.png: no such file. Fix: delete the link, or restore the file that it points to."
    )
    assert lines[1].startswith("photos/cat/1.png: damaged: ")
    assert lines[1].endswith(f"Fix: {again}")
    assert lines[2] == f"photos/cat/2.png: the file is empty. Fix: {again}"
    assert lines[3] == "11 of 14 images can be used; verdicts: audit.csv"
    assert "WARNING: 1 image is in two classes: photos/dog/0.png is photos/cat/=1+1.png" in err
    rows = verdicts(tmp_path / "audit.csv")
    assert len(rows) == 14
    assert [row["verdict"] for row in rows.values()].count("ok") == 11
    assert rows["photos/cat/2.png"]["reason"] == "the file is empty"
    assert rows["photos/dog/0.png"]["digest"] == rows["photos/cat/=1+1.png"]["digest"]


def test_clean_data_are_exit_code_0_and_the_verdicts_go_where_they_should(photos, tmp_path, capsys):
    for name in ("1.png", "2.png", "\x1b[31m\n.png"):
        (photos / "cat" / name).unlink()
    assert main(["audit", str(photos), "--out", str(tmp_path / "here.csv")]) == 0
    assert capsys.readouterr().out == f"11 of 11 images can be used; verdicts: {tmp_path / 'here.csv'}\n"
    assert len(verdicts(tmp_path / "here.csv")) == 11


def test_cells_that_a_spreadsheet_would_run_are_neutralized(photos, tmp_path, monkeypatch):
    (photos / "cat").rename(photos / "=cmd")
    assert main(["audit", str(photos), "--out", str(tmp_path / "a.csv")]) == 1
    assert {row["class"] for row in verdicts(tmp_path / "a.csv").values()} == {"'=cmd", "dog"}


@pytest.mark.parametrize(("given", "message"), [
    (["nowhere"], "'nowhere' is neither a folder nor a known data set"),
    (["synthetic", "--out", "a.txt"], "--out is 'a.txt'. Allowed: a name that ends in .csv. Fix: --out a.csv."),
    (["synthetic", "--workers", "-1"], "workers=-1. Allowed: 1 or more. Fix: workers=1."),
])  # fmt: skip
def test_wrong_arguments(given, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", *given]) == 2
    assert message in capsys.readouterr().err
