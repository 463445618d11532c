"""Documentation cannot go stale: code blocks and examples run, commands exist, links resolve, tables are generated."""

import doctest
import re
import runpy
import shlex
from pathlib import Path

import pytest

import normfree
from normfree.cli import VERBS
from normfree.commands.train_command import parse
from normfree.models.variants import list_models
from normfree.training.config_io import with_overrides
from normfree.training.recipes import RECIPES

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = sorted(set(normfree.__all__) - {"VARIANTS", "__version__"})  # these two have no docstring


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder().find(getattr(normfree, name), name, globs={"normfree": normfree})
    assert any(test.examples for test in tests), f"the docstring of {name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    reports: list[str] = []
    for test in tests:
        runner.run(test, out=reports.append)
    assert runner.failures == 0, "".join(reports)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_have_real_verbs_and_keys(page):
    lines = [line for b in blocks(page, "sh") for line in b.splitlines() if line.startswith("normfree ")]
    for line in lines:
        verb, *options = shlex.split(line, comments=True)[1:]
        assert verb in {*VERBS, "train"}, line
        if verb == "train":
            flags = options if not options or options[0].startswith("--") else options[1:]
            known = options and (options[0] in RECIPES or options[0].startswith("runs/"))
            assert options == flags or known or options[0].endswith(".toml")
            config = with_overrides(RECIPES["demo"](), parse(flags).overrides)
            assert config.model in list_models(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users)/", text)
    assert "../shared" not in text  # nothing outside the repository


@pytest.mark.parametrize("page", [*PAGES, ROOT / "tests" / "reference" / "README.md"], ids=lambda p: p.name)
def test_named_programs_and_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    files = re.findall(r"\b(?:tests|docs|experiments|benchmarks|reliability)/[\w/]+\.py\b", text)
    modules = re.findall(r"python -m ((?:experiments|benchmarks|reliability)[\w.]*)", text)
    for file in files:
        assert (ROOT / file).exists(), file
    for module in modules:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_readme_has_no_blank_left_to_fill():
    assert not re.search(r"@[A-Z_]+@|TODO|TBD", (ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_table_of_networks_is_up_to_date():
    page = ROOT / "docs" / "models.md"
    made = runpy.run_path(str(ROOT / "docs" / "make_models.py"))["table"]()
    assert page.read_text(encoding="utf-8") == made


def test_docs_teach_no_deep_import_of_a_public_name():
    pattern = re.compile(r"from normfree\.[\w.]+ import ([\w, ]+)")
    deep = {
        (page.name, name)
        for page in PAGES
        for names in pattern.findall(page.read_text(encoding="utf-8"))
        for name in re.split(r",\s*", names.strip())
        if name in normfree.__all__
    }
    assert deep == set()


def test_the_api_reference_lists_every_public_name():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md"))
    listed = set(re.findall(r"^::: normfree\.(?:[\w.]+\.)?(\w+)$", text, flags=re.M))
    assert set(normfree.__all__) - listed - {"__version__"} == set()


def test_the_table_of_the_api_reference_has_every_public_name():
    table = (ROOT / "docs" / "api" / "index.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[`(\w+)`\]\(\w+\.md#normfree\.[\w.]+\)", table, flags=re.M)
    assert sorted(listed) == sorted(set(normfree.__all__) - {"__version__"})


def test_the_files_named_in_paper_md_exist_and_define_the_names():
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    cells = re.findall(r"`((?:\w+/)+\w+\.py)`((?:[:,] `\w[\w.]*`)*)", text)
    cells = [
        (file, names)
        for file, names in cells
        if not file.startswith(("tests/", "experiments/", "benchmarks/"))
    ]
    assert len(cells) > 25
    for file, names in cells:
        source = (ROOT / "normfree" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert name.split(".")[-1] in source, (file, name)
