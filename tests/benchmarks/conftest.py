"""The benchmarks are scripts beside each other; the tests import them as those import one another."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A function that imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def get(name: str) -> ModuleType:
        return import_module(name)

    return get
