"""The language of the repository: words that puzzle a new colleague, and British spelling, are refused."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".pyi", ".c", ".h", ".html", ".md", ".toml", ".yml", ".ipynb"}
SKIPPED = {".git", ".venv", "build", "dist", "runs", "site", ".mypy_cache", ".ruff_cache", ".pytest_cache"}

# Stems of verbs that American spelling ends in -ize.
ISE = "ormal|tandard|ecogn|ptim|nitial|ynchron|erial|inim|axim|eneral|ummar|uant"
# Pattern -> what to write. Matched anywhere but inside a longer word, in lower case; underscores end a word.
BANNED = {
    r"whoever": "anyone who; or name the person or function",
    r"nobody": "no one; or say what does not happen",
    r"but for": "except",
    r"told from": "distinguished from",
    r"of ours": "our",
    r"of torch's": "PyTorch's",
    r"how manieth": "index, counted from 0",
    r"so it is with": "likewise",
    r"lies? here": "is in",
    r"pictures?": "image, plot or figure",
    r"words?": "argument, option, text, string or name",
    r"(?<!in )(?<!in-)(?<!in_)(?<!decimal )places?": "file, path, position, device or index",
    r"rooms?": "package or module",
    r"houses?": "package or project",
    r"voices?": "log",
    r"colour\w*": "color",
    r"centre[ds]?": "center",
    r"behaviour\w*": "behavior",
    r"grey\w*": "gray",
    rf"\w+(?:{ISE})is(?:e|es|ed|er|ers|ing|ation|able)": "-ize",
}
PATTERN = re.compile("|".join(f"(?P<p{i}>(?<![a-z]){p}(?![a-z]))" for i, p in enumerate(BANNED)))


def found(text: str) -> list[str]:
    """Return "line: match -> what to write" for each banned expression in `text`.

    Lines that end with "# language: a name of others" are skipped: they hold names that others have given.
    """
    advice = list(BANNED.values())
    lines = enumerate(text.lower().splitlines(), 1)
    return [
        f"{number}: {match.group()!r} -> {advice[int(str(match.lastgroup)[1:])]}"
        for number, line in lines
        if not line.rstrip().endswith("# language: a name of others")
        for match in PATTERN.finditer(line)
    ]


def text_files() -> list[Path]:
    files = (
        p for p in ROOT.rglob("*") if p.suffix in SUFFIXES and not SKIPPED & set(p.relative_to(ROOT).parts)
    )
    return sorted(p for p in files if p != Path(__file__) and p.is_file())


@pytest.mark.parametrize(
    "folder", ["normfree", "tests", "benchmarks", "experiments", "reliability", "docs", "."]
)
def test_the_text_is_plain_american_english(folder):
    files = [p for p in text_files() if p.relative_to(ROOT).parts[0] == folder or p.parent == ROOT / folder]
    assert files
    problems = [
        f"{p.relative_to(ROOT)}:{line}" for p in files for line in found(p.read_text(encoding="utf-8"))
    ]
    assert problems == [], f"{len(problems)} problems"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("whoever reads this; `picture_path`", 2),
        ("keywords, passwords, replaces, in place, decimal places, placeholder", 0),
        ("standardised behaviour", 2),
        ("standardized behavior, otherwise precise", 0),
    ],
)
def test_the_check_finds_what_it_should(text, count):
    assert len(found(text)) == count
