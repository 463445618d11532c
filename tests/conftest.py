"""Fixtures of all tests, and the table of what works with other libraries (`make interop` writes it to docs/hosts.md).

A test that shows one of our interfaces at work with a host library has the mark `works(host, interface)`; one that
shows a refusal with a clear error has `refuses(host, interface, reason=...)`.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from normfree.files import atomic_write_text
from normfree.native.library import library
from normfree.surgery.batchnorm import batchnorms


@pytest.fixture(autouse=True, scope="session")
def _one_thread_from_the_start():
    torch.set_num_threads(1)  # what fixtures of a module compute is compared with what its tests do


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)  # small tensors, and the same sums in the same order on every machine
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _float32_on_every_processor() -> Iterator[None]:
    """`precision = "auto"` is float32, as on a CPU that emulates bfloat16. Flags of processes name their precision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfree.training.precision.cpu_gain", lambda: 0.1)
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in C are there, and two threads share the smallest work."""
    if library() is None:
        pytest.skip("no C compiler was there when the package was installed")
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    torch.set_num_threads(2)


@pytest.fixture
def with_random_norms() -> Callable[..., nn.Module]:
    """`with_random_norms(net, std=0.3)`: `net` in evaluation mode, its batch norms with random numbers.

    Running means and biases are of standard deviation `std`.
    """

    def randomized(net: nn.Module, *, std: float = 0.3) -> nn.Module:
        torch.manual_seed(0)
        with torch.no_grad():
            for module in batchnorms(net).values():
                module.running_mean.normal_(std=std)
                module.running_var.uniform_(0.5, 2.0)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(std=std)
        return net.eval()

    return randomized


WORKERS = Path(__file__).parent / "workers"
# These share one set of process worlds, so one process of pytest-xdist runs them all.
WORLD_FILES = ("test_dtensor.py", "test_modes.py", "test_world.py")


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Distribute tests over the processes of pytest-xdist so that no expensive fixture is made twice.

    The tests of `WORLD_FILES` stay together, and those of each file with fixtures of module scope; all other tests are
    distributed one by one. The mark `xdist_group` has no effect with pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if file.endswith(WORLD_FILES):
                return "worlds"
            return file if _has_module_fixtures(config.rootpath / file) else nodeid

    return Scheduling(config, log)


@cache
def _has_module_fixtures(file: Path) -> bool:
    return 'scope="module"' in file.read_text(encoding="utf-8")


def _environment() -> dict[str, str]:
    """Return the environment without the variables of torchrun, and without GPUs."""
    dropped = ("RANK", "WORLD", "LOCAL_", "MASTER", "TORCHELASTIC")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def plans() -> ModuleType:
    """tests/workers/plans.py."""
    spec = importlib.util.spec_from_file_location("plans", WORKERS / "plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start_worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[object], None]:
    """`start_worlds(plan)` runs a plan of tests/workers/launch.py to its end."""

    def start(plan: object) -> None:
        file = tmp_path_factory.mktemp("plan") / "plan.json"
        file.write_text(json.dumps(plan), encoding="utf-8")
        command = [sys.executable, str(WORKERS / "launch.py"), str(file)]
        process = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        # Nothing is printed: rank 0 of each world writes to the console that it was given.
        assert (process.returncode, process.stdout, process.stderr) == (0, "", "")

    return start


@pytest.fixture(scope="session")
def worlds(
    tmp_path_factory: pytest.TempPathFactory, start_worlds: Callable[[object], None], plans: ModuleType
) -> Path:
    """The folder with the results of all worlds of processes, which are started once for all tests."""
    folder = tmp_path_factory.mktemp("worlds")
    start_worlds(plans.everything(folder))
    return folder


@pytest.fixture
def torchrun() -> Callable[..., subprocess.Popen[str]]:
    """`torchrun(size, *arguments)` starts `normfree train` in several processes."""

    def start(size: int, *arguments: str) -> subprocess.Popen[str]:
        # --standalone: torchrun chooses a free port
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command = [*run, "-m", "normfree", "train", *arguments]
        return subprocess.Popen(
            command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


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
    for item in items:
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
