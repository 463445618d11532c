"""Import of torchvision on demand, with an error that explains how to fix mismatched versions."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from normfree.suggest import problem


def torchvision_module(name: str) -> Any:
    """Return the module `torchvision.<name>`, for instance "transforms.v2" or "datasets".

    Raises:
        ImportError: torchvision cannot be imported. A torchvision built for another version of PyTorch fails with a
            message about `nms`, which does not show the cause; this error names the installed versions of both and
            the command that installs a matching pair.
    """
    try:
        return import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ImportError(
            problem(
                f"torchvision cannot be imported: torch {_version('torch')}, torchvision {_version('torchvision')}. "
                "They must be a pair that was built together",
                fix="pip install --upgrade torch torchvision (both in one command, from the same index)",
            )
        ) from error


def _version(distribution: str) -> str:
    """Return the installed version of a distribution, or "not installed"."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
