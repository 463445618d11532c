"""normfree.commands.foreign."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import nn


LIBRARIES = ("timm:", "torchvision:")


def create_network(source: str, classes: int | None) -> nn.Module:
    library, _, name = source.partition(":")
    options = {} if classes is None else {"num_classes": classes}
    make, names = library_of(library)
    if name not in names:
        raise UsageError(f"{library} has no network {name!r}.{did_you_mean(name, names)}")
    net: nn.Module = make(name, **options)
    return net


def library_of(library: str) -> tuple[Callable[..., Any], list[str]]:
    if library == "timm":
        try:
            import timm
        except ModuleNotFoundError:
            raise ModuleNotFoundError("timm:… needs timm. Install it: pip install timm") from None
        return timm.create_model, timm.list_models()
    import torchvision

    return torchvision.models.get_model, torchvision.models.list_models(module=torchvision.models)
