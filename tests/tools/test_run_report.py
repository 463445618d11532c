import re
import shlex
import shutil

import pytest
from PIL import Image

from normfree.cli import main
from normfree.tools.run_report import write_report

TINY = shlex.split(
    "--model nf_resnet_nano --input.image_size 16 --input.batch_size 4 --input.workers 0 --length 4st --log.every 1 "
    "--log.evaluate_every 2st --log.checkpoint_every 2st --optim.warmup 1st"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, rate in (("slow", "0.01"), ("fast", "0.1")):
        data = ["--data", "synthetic:classes=3,size=16,train=24,val=12"]
        assert main(["train", *data, *TINY, "--optim.lr", rate, "--out", str(root / name)]) == 0
    return root


def test_one_run_on_one_page_with_its_figures_beside_it(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["diagnose", "slow", "--batch-size", "4"]) == 0
    assert "report: slow/report.html" in capsys.readouterr().out
    page = (runs / "slow" / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]+)", page)
    assert titles == ["Scores", "Course", "Answers", "Worst mistakes", "Heat maps", "Signal propagation",
                      "Gradients against weights", "Settings"]  # fmt: skip
    wrong, right = (min(6, int(n)) for n in _wrong_and_right(page))
    assert page.count('alt="heat map of ') == wrong + right
    assert len(re.findall(r'alt="heat map of \w+, right"', page)) == right
    images = {path.name for path in (runs / "slow" / "report").iterdir()}
    assert len(images) == page.count("<svg") >= 10
    assert {"loss-nats-over-epochs.png", "confusion-of-slow.png", "gradients-against-weights.png"} <= images
    for name in images:
        Image.open(runs / "slow" / "report" / name).verify()
    assert main(["predict", "slow", str(runs / "slow" / "report")]) == 0  # a run with a report is still a run


def _wrong_and_right(page: str) -> tuple[int, int]:
    """Return the numbers of wrong and right answers on the page."""
    if (none := re.search(r"None: all (\d+) answers are right", page)) is not None:
        return 0, int(none[1])
    wrong, count = map(int, re.search(r"(\d+) of (\d+) answers are wrong", page).groups())
    return wrong, count - wrong


def test_two_runs_side_by_side_tell_what_differs(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["diagnose", "slow", "fast", "--report", "both.html"]) == 0
    page = (runs / "both.html").read_text()
    rows = re.findall(
        r"<tr><td>([^<]+)</td><td class=\"n\">([^<]+)</td><td class=\"n\">([^<]+)</td></tr>", page
    )
    settings = {name: values for name, *values in rows}
    assert settings["optim.lr"] == ["0.01", "0.1"]
    assert "optim.momentum" not in settings  # the same in both
    assert "steps" in settings


def test_an_unfinished_run_and_one_whose_data_are_gone(runs, tmp_path):
    shutil.copytree(runs / "slow", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "model")
    (tmp_path / "part" / "results.json").unlink()
    page = write_report([tmp_path / "part"], tmp_path / "page.html").read_text()
    assert re.findall(r"<h2>([^<]+)", page) == ["Scores", "Course", "Settings"]
    assert "not finished: 4 steps" in page
    shutil.copytree(runs / "slow", tmp_path / "moved")
    config = tmp_path / "moved" / "config.toml"
    config.write_text(config.read_text().replace("synthetic:classes=3,size=16,train=24,val=12", "gone"))
    page = write_report([tmp_path / "moved"], tmp_path / "page.html").read_text()
    assert "Not shown because the data cannot be read: " in page


def test_what_is_no_run_is_refused(runs, capsys, tmp_path):
    args = ["diagnose", "nf_resnet_nano", str(runs / "slow")]
    assert main(args) == 2
    assert (
        f"{runs / 'slow'} is a run, but nf_resnet_nano is not. Allowed: two run folders"
        in capsys.readouterr().err
    )
    assert main(["diagnose", "nf_resnet_nano", "--report", "x.html"]) == 2
    assert "--report is given, but nf_resnet_nano is not a run. Allowed: " in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is no run folder: it has no config\.toml"):
        write_report([tmp_path], tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"5 runs: expected 1 to 4 in one report\."):
        write_report([tmp_path] * 5, tmp_path / "x.html")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser_loads_nothing_and_fits_a_phone(runs, tmp_path, scheme):
    from playwright.sync_api import sync_playwright

    path = write_report([runs / "slow", runs / "fast"], tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page, seen = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme), []
        page.on("console", lambda message: seen.append(message.text))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ink = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert ink == {"light": "rgb(28, 28, 26)", "dark": "rgb(236, 236, 234)"}[scheme]
        browser.close()
    assert [url for url in seen if not url.startswith(("file:", "data:"))] == []
