"""Networks by name: make one, list them."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from normfree.models import hub
from normfree.models.layers import nearest
from normfree.models.net import FeatureNet, Net
from normfree.models.rows import VARIANTS
from normfree.models.variants import Variant
from normfree.models.weights import load_weights


def variant_of(name: str) -> Variant:
    """The row called `name`.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    if name not in VARIANTS:
        hint = nearest(name, VARIANTS)
        if f"timm_{name}" in VARIANTS:
            hint = f" timm's network of that name is 'timm_{name}'"
            published = name.removeprefix("dm_")
            hint += f"; computed as DeepMind's code does, it is {published!r}." if published != name else "."
        raise ValueError(f"unknown model {name!r}.{hint} All names: normfree list models")
    return VARIANTS[name]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    weights: str | Path | None = None,
    head: bool = True,
    features_only: bool = False,
    out_indices: tuple[int, ...] | None = None,
    **overrides: object,
) -> Net | FeatureNet:
    """The network called `name`, with random initial weights or those of a model folder.

    Args:
        name: a name from `list_models()`.
        num_classes: width of the classifier; 0 for pooled features.
        in_channels: channels of the images.
        weights: whatever `load_weights` reads: a model or run folder, a file. `hf-hub:OWNER/NAME` downloads a
            folder, "download" the published weights of this row. The classifier must have `num_classes` classes,
            unless that is 0 or `head` is False.
        head: take the classifier from `weights` too; False starts a new one, for other classes.
        features_only: return the maps of stem and stages instead of logits (`FeatureNet`).
        out_indices: which of them; default all.
        **overrides: any field of the row (`Variant`), for example `widths=(32, 64, 96, 96)`.

    Raises:
        ValueError: the name, a field or a value is not possible, or the weights do not fit.
    """
    variant = variant_of(name).with_overrides(overrides)
    net = Net(variant, name=name, num_classes=num_classes, in_channels=in_channels)
    if weights is not None:
        load_weights(net, _local(name, weights), head=head)
    if out_indices is not None and not features_only:
        raise ValueError(f"out_indices={out_indices} needs features_only=True.")
    return FeatureNet(net, out_indices=out_indices) if features_only else net


def _local(name: str, weights: str | Path) -> Path:
    word = str(weights)
    if word == "download":
        word = hub.PREFIX + hub.repository_of(name)
    return hub.fetch(word) if word.startswith(hub.PREFIX) else Path(word)


def list_models(pattern: str = "*") -> list[str]:
    """Names of all networks that match a shell pattern, in table order."""
    return [name for name in VARIANTS if fnmatch.fnmatchcase(name, pattern)]
