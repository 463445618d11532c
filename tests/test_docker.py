"""The Dockerfile names what exists, and its context has all files that the wheel needs."""

import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def is_ignored(path: str, patterns: list[str]) -> bool:
    """Return True if a pattern of .dockerignore excludes a file: it matches the path or a folder above it."""
    parts = path.split("/")
    for pattern in patterns:
        name = pattern.removeprefix("**/")
        heads = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if any(
            fnmatch(h, name) for h in (parts if pattern != name else heads) if "/" not in h or "/" in name
        ):
            return True
    return False


def test_the_extras_exist_and_python_is_new_enough():
    (extras,) = re.findall(r"\[([a-z,]+)\]\"", DOCKERFILE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert "demo" in extras  # what CMD runs
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    for version in re.findall(r"FROM python:([\d.]+)-", DOCKERFILE):
        assert tuple(map(int, version.split("."))) >= least


def test_the_context_has_what_the_wheel_is_built_from():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "ls-files", "normfree"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    needed = [
        "pyproject.toml",
        "setup.py",
        PROJECT["readme"],
        *PROJECT["license-files"],
        *listed.stdout.splitlines(),
    ]
    assert len(needed) > 200
    assert [path for path in needed if is_ignored(path, patterns)] == []
    for path in (".git/config", "runs/demo-1/config.toml", "normfree/native/_compiled.so", "data/x", "tests/a/b.py",
                 "normfree/models/__pycache__/a.pyc", ".mypy_cache/x"):  # fmt: skip
        assert is_ignored(path, patterns), path
