"""Networks by name: make one, list them."""

from __future__ import annotations

from pathlib import Path

from normfree.models.net import FeatureNet, Net
from normfree.models.variants import variant_of
from normfree.weights import hub
from normfree.weights.load import load_weights


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
