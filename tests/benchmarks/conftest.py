"""The benchmarks are a package next to tests; it is not installed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """A function that imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT))

    def get(name: str) -> ModuleType:
        return import_module(f"benchmarks.{name}")

    return get
