"""The one door to torchvision: imported on demand, with an error that says how to mend a mismatched pair."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def torchvision_module(name: str) -> Any:
    """The module `torchvision.<name>`, for instance "transforms.v2" or "datasets".

    Raises `ImportError` naming the installed versions of torch and torchvision and the command that installs
    a matching pair. A torchvision built for another torch fails on import with a message about `nms`, from
    which nobody could guess the cause.
    """
    try:
        return import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ImportError(
            f"torchvision cannot be imported: torch {_version('torch')}, torchvision {_version('torchvision')}. "
            "They must be a pair that was built together. "
            "Fix: pip install --upgrade torch torchvision (both in one command, from the same index)"
        ) from error


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
