"""What all tests share."""

import importlib
from collections.abc import Callable

import pytest
import torch

from normfree.native.library import library


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
