"""`create_model`: make a network by name."""

from __future__ import annotations

from pathlib import Path

from normfree.models.net import FeatureNet, Net
from normfree.models.variants import variant_of
from normfree.suggest import problem
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
    """Return the network called `name`, with random initial weights or weights from a file.

    Args:
        name: a name from `list_models()`.
        num_classes: width of the classifier; 0 returns pooled features instead of logits.
        in_channels: channels of the images.
        weights: anything that `load_weights` reads: a model or run folder, or a file. `hf-hub:OWNER/NAME` downloads a
            folder, "download" the published weights of this variant. The weights must have `num_classes` classes,
            unless that is 0 or `head` is False.
        head: whether to load the classifier too; False makes a new one, for other classes.
        features_only: return the maps of stem and stages instead of logits (`FeatureNet`).
        out_indices: which of these maps; None means all.
        **overrides: any field of `Variant`, for example `widths=(32, 64, 96, 96)`.

    Raises:
        ValueError: the name, a field or a value is not possible, or the weights do not fit.

    Examples:
        >>> import torch
        >>> from normfree import create_model
        >>> model = create_model("nf_resnet_nano", num_classes=10)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> maps = create_model("nf_resnet_nano", features_only=True)(torch.randn(2, 3, 32, 32))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
    """
    variant = variant_of(name).with_overrides(overrides)
    net = Net(variant, name=name, num_classes=num_classes, in_channels=in_channels)
    if weights is not None:
        load_weights(net, _local_path(name, weights), head=head)
    if out_indices is not None and not features_only:
        given = f"out_indices={out_indices} without features_only"
        raise ValueError(problem(given, allowed="features_only=True", fix="add it, or drop out_indices"))
    return FeatureNet(net, out_indices=out_indices) if features_only else net


def _local_path(name: str, weights: str | Path) -> Path:
    source = str(weights)
    if source == "download":
        source = hub.PREFIX + hub.repository_of(name)
    return hub.fetch(source) if source.startswith(hub.PREFIX) else Path(source)
