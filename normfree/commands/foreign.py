"""Networks of other libraries by name: `timm:NAME` and `torchvision:NAME`. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean, needs, problem

if TYPE_CHECKING:
    from torch import nn

PREFIXES = ("timm:", "torchvision:")


def create_network(source: str, *, num_classes: int | None = None) -> nn.Module:
    """Return a network of timm or torchvision with random weights.

    Args:
        source: `timm:NAME` or `torchvision:NAME`.
        num_classes: number of outputs; None means the library's default.

    Raises:
        UsageError: the library has no network of this name.
        ModuleNotFoundError: the library is not installed.
    """
    library, _, name = source.partition(":")
    create, names = _open_library(library, source)
    if name not in names:
        raise UsageError(
            problem(
                f"{library} has no network {name!r}.{did_you_mean(name, names)}", allowed=_ALLOWED[library]
            )
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    net: nn.Module = create(name, **options)
    return net


_ALLOWED = {
    "timm": "the names that timm.list_models() returns",
    "torchvision": "the names that torchvision.models.list_models(torchvision.models) returns",
}


def _open_library(library: str, source: str) -> tuple[Callable[..., Any], list[str]]:
    """Return the function of a library that creates a network, and the names that it knows."""
    if library == "timm":
        with needs(source, install="timm"):
            import timm
        return timm.create_model, timm.list_models()
    from normfree.data.torchvision_import import torchvision_module

    models = torchvision_module("models")
    return models.get_model, models.list_models(module=models)
