"""Documents that cannot go stale: code blocks run, commands exist, links lead somewhere, tables are generated."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from normfree.cli import VERBS
from normfree.models.variants import list_models
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES = list(dict.fromkeys(PAGES))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), space)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_have_real_verbs_and_keys(page):
    lines = [
        line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("normfree ")
    ]
    for line in lines:
        verb, *words = shlex.split(line, comments=True)[1:]
        assert verb in {*VERBS, "train"}, line
        if verb == "train":
            flags = words if not words or words[0].startswith("--") else words[1:]
            assert (
                words == flags
                or words[0] in RECIPES
                or words[0].startswith("runs/")
                or words[0].endswith(".toml")
            )
            flags = [flag for flag in flags if flag != "--find-lr"]  # a word of the command, no key
            config = with_overrides(RECIPES["demo"](), flags)
            assert config.model in list_models(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)
    assert "../shared" not in text  # nothing outside the repository


def test_the_readme_has_no_blank_left_to_fill():
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_table_of_networks_is_up_to_date():
    page = ROOT / "docs" / "models.md"
    made = runpy.run_path(str(ROOT / "docs" / "make_models.py"))["table"]()
    assert page.read_text(encoding="utf-8") == made


def test_the_files_named_in_paper_md_exist_and_hold_the_names():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    cells = re.findall(r"`((?:models|optim|train|data)/\w+\.py)`((?:[:,] `\w[\w.]*`)*)", text)
    assert len(cells) > 25
    for file, names in cells:
        source = (ROOT / "normfree" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert name.split(".")[-1] in source, (file, name)
