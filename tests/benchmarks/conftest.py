"""The package `benchmarks` is not installed; tests import it from the root of the repository."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Return a function that imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT))

    def get(name: str) -> ModuleType:
        return import_module(f"benchmarks.{name}")

    return get
