"""Tests with other libraries, and the table of what works with them (`make interop` writes it into docs/hosts.md).

Every test of this folder has the mark `interop` and is deselected by default. A test that shows one of our interfaces
at work with a host library has the mark `works(host, interface)`; one that shows a refusal with a clear error has
`refuses(host, interface, reason=...)`.
"""

from __future__ import annotations

import platform
from collections.abc import Generator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

from normfree.files import atomic_write_text

FOLDER = Path(__file__).parent
# Host library, as the table shows it -> the distribution whose version is printed.
HOSTS = {
    "PyTorch": "torch",
    "PyTorch FSDP2": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "Hugging Face Transformers": "transformers",
    "Hugging Face Accelerate": "accelerate",
    "Lightning": "lightning",
    "Opacus": "opacus",
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "NNCF": "nncf",
    "segmentation-models-pytorch": "segmentation-models-pytorch",
    "Captum": "captum",
    "Zennit": "zennit",
    "Torch-Pruning": "torch-pruning",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "lightly": "lightly",
}
BEGIN, END = "<!-- table of hosts: begin (written by `make interop`) -->", "<!-- table of hosts: end -->"


@dataclass
class Outcome:
    """What the tests of one interface with one host library have shown."""

    passed: int = 0
    failed: int = 0
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.failed:
            return f"**fails** ({self.failed} of {self.passed + self.failed} tests)"
        if self.reasons:
            return "refused: " + "; ".join(dict.fromkeys(self.reasons))
        return f"works ({self.passed} test{'s' if self.passed > 1 else ''})"


class Table:
    """The outcomes of all marked tests of a session, by host and interface."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def add(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Count the outcome of one phase of a test; a test that was skipped is not counted."""
        for mark in [*item.iter_markers("works"), *item.iter_markers("refuses")]:
            host, interface = mark.args
            key = host, interface + (" (refusal)" if mark.name == "refuses" else "")
            if report.failed:
                self.outcomes.setdefault(key, Outcome()).failed += 1
            elif report.passed and report.when == "call":
                outcome = self.outcomes.setdefault(key, Outcome())
                outcome.passed += 1
                if mark.name == "refuses":
                    outcome.reasons.append(mark.kwargs["reason"])

    def markdown(self) -> str:
        """Return the table, in the order of `HOSTS`."""
        lines = ["| host | version | interface | outcome |", "|---|---|---|---|"]
        for (host, interface), outcome in sorted(
            self.outcomes.items(), key=lambda entry: (list(HOSTS).index(entry[0][0]), entry[0][1])
        ):
            shown = interface.removesuffix(" (refusal)")
            lines.append(f"| {host} | {version(HOSTS[host])} | {shown} | {outcome} |")
        return "\n".join([*lines, "", f"Python {platform.python_version()}, {platform.system()}."])


TABLE = Table()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hosts-table", metavar="FILE", help="write the table of hosts into this Markdown file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder. Warnings of host libraries are not errors."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.interop)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            for mark in [*item.iter_markers("works"), *item.iter_markers("refuses")]:
                if mark.args[0] not in HOSTS:
                    raise pytest.UsageError(f"{item.nodeid}: {mark.args[0]!r} is not in HOSTS of {__file__}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    TABLE.add(item, report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Replace the table in the file that `--hosts-table` names."""
    file = session.config.getoption("--hosts-table", default=None)
    if not file or not TABLE.outcomes:
        return
    path = Path(file)
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    atomic_write_text(path, f"{before}{BEGIN}\n\n{TABLE.markdown()}\n\n{END}{after}")
