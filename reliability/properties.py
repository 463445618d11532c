"""Goal 12: the laws in tests/properties, tried with many more inputs than `make test` takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from reliability.goals import Case, Result
from reliability.records import ROOT

LAWS = ROOT / "tests" / "properties"
INPUTS = 100  # of each law in one case


def cases(count: int) -> Iterator[Case]:
    """Return `count` cases for each file of laws, which differ in the seed of their inputs."""
    for seed in range(1, count + 1):
        for path in sorted(LAWS.glob("test_*.py")):
            subject = path.stem.removeprefix("test_").removesuffix("_laws").replace("_", " ")
            yield Case(
                f"{subject}: a law holds for {INPUTS} inputs", f"{subject} {seed}", partial(tried, path, seed)
            )


def tried(path: Path, seed: int) -> Result:
    """Try the laws of one file."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}",
                   f"--hypothesis-seed={seed}", str(path)]  # fmt: skip
        environment = {**os.environ, "NORMFREE_EXAMPLES": str(INPUTS), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if not report.exists():
            return Result(1, 0, done.stdout[-300:])
        tests = list(ElementTree.parse(report).iter("testcase"))
    made = [test for test in tests if test.find("skipped") is None]
    failed = [
        test.attrib["name"]
        for test in made
        if test.find("failure") is not None or test.find("error") is not None
    ]
    return Result(max(1, len(made)), len(made) - len(failed), ", ".join(failed))
