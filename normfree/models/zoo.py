"""`create_model`: make a network by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.models.features import FeatureNet
from normfree.models.net import Net
from normfree.models.variants import variant_of
from normfree.suggest import problem
from normfree.weights import hub
from normfree.weights.load import load_weights

# timm's names of arguments -> our names.
TIMM_ARGUMENTS = {"in_chans": "in_channels", "drop_path_rate": "stochdepth_rate"}


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_channels: int | None = None,
    weights: str | Path | None = None,
    head: bool = True,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **overrides: Any,
) -> Net | FeatureNet:
    """Return the network called `name`, with random initial weights or weights from a file.

    timm's names are understood too: `pretrained=True` for `weights="download"`, `in_chans` for `in_channels`,
    `drop_path_rate` for `stochdepth_rate`, and a tag of published weights after the name, as in
    "timm_eca_nfnet_l0.ra2_in1k".

    Args:
        name: a name from `list_models()`.
        num_classes: width of the classifier; 0 returns pooled features instead of logits.
        in_channels: channels of the images; None means 3.
        weights: anything that `load_weights` reads: a model or run folder, or a file. `hf-hub:OWNER/NAME` downloads a
            folder, "download" the published weights of this variant. Weights for another number of channels or classes
            are adapted as in timm: see `load_weights`.
        head: whether to load the classifier too; False makes a new one, for other classes.
        features_only: return a network that gives a feature map per resolution instead of logits (`FeatureNet`).
        out_indices: which of these maps, from 0 for the finest; a number n means the last n, None means all.
        **overrides: any field of `Variant`, for example `widths=(32, 64, 96, 96)` or `global_pool="max"`.

    Raises:
        ValueError: the name, a field or a value is not possible, or the weights do not fit.

    Examples:
        >>> import torch
        >>> from normfree import create_model
        >>> model = create_model("nf_resnet_nano", num_classes=10)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> backbone = create_model("nf_resnet_nano", features_only=True, in_chans=1)
        >>> [tuple(m.shape[1:]) for m in backbone(torch.randn(2, 1, 32, 32))]
        [(64, 32, 32), (128, 16, 16), (256, 8, 8)]
    """
    name, _, tag = name.partition(".")
    ours = {"in_channels": in_channels, "weights": weights}
    overrides = _in_our_vocabulary({**{k: v for k, v in ours.items() if v is not None}, **overrides})
    in_channels, weights = overrides.pop("in_channels", 3), overrides.pop("weights", None)
    variant = variant_of(name).with_overrides(overrides)
    repository = hub.repository_of(name, tag=tag) if tag or weights == "download" else ""
    net = Net(variant, name=name, num_classes=num_classes, in_channels=in_channels)
    if weights is not None:
        address = hub.PREFIX + repository if weights == "download" else str(weights)
        path = hub.fetch(address) if address.startswith(hub.PREFIX) else Path(address)
        load_weights(net, path, head=head, adapt=True)
    if out_indices is not None and not features_only:
        given = f"out_indices={out_indices} without features_only"
        raise ValueError(problem(given, allowed="features_only=True", fix="add it, or drop out_indices"))
    return FeatureNet(net, out_indices=out_indices) if features_only else net


def _in_our_vocabulary(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with timm's names replaced by ours. None means that timm's argument is not given.

    Raises:
        ValueError: an argument is given by both names.
    """
    arguments = dict(arguments)
    if arguments.pop("pretrained", None):
        _check_single("pretrained", "weights", arguments)
        arguments["weights"] = "download"
    for theirs, ours in TIMM_ARGUMENTS.items():
        value = arguments.pop(theirs, None)
        if value is not None:
            _check_single(theirs, ours, arguments)
            arguments[ours] = value
    return arguments


def _check_single(theirs: str, ours: str, arguments: dict[str, Any]) -> None:
    if ours in arguments:
        fix = f"drop {theirs!r}, which is timm's name of the other"
        raise ValueError(problem(f"both {ours!r} and {theirs!r} are given", allowed="one of them", fix=fix))
