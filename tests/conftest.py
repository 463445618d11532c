"""Fixtures of all tests."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from normfree.native.library import library
from normfree.surgery.batchnorm import batchnorms


@pytest.fixture(autouse=True, scope="session")
def _one_thread_from_the_start():
    torch.set_num_threads(1)  # what fixtures of a module compute is compared with what its tests do


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)  # small tensors, and the same sums in the same order on every machine
    torch.manual_seed(0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in C are there, and two threads share the smallest work."""
    if library() is None:
        pytest.skip("no C compiler was there when the package was installed")
    monkeypatch.setattr("normfree.native.library.SMALL", 0)
    torch.set_num_threads(2)


@pytest.fixture
def interpret(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`interpret(module, *names)`: Triton's functions `names` of a module run in its interpreter, on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed; torch's wheels for Linux bring it")

    def wrap(module: str, *names: str) -> None:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        kernels = importlib.import_module(module)
        for name in names:
            monkeypatch.setattr(kernels, name, InterpretedFunction(getattr(kernels, name).fn))
        # tl.sum is itself a compiled function unless Triton was imported for interpreting.
        monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))

    return wrap


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
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(size),
            "--master-port",
            port,
        ]
        command = [*run, "-m", "normfree", "train", *arguments]
        return subprocess.Popen(
            command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start
