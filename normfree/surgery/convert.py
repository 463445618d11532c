"""Removal of batch norm from existing networks by one of three methods, each with a report of the changes.

exact             fold each norm into the layer before it; outputs in evaluation mode stay the same
normalizer_free   fold, then replace weights by standardized weights fitted to them; outputs stay similar
scratch           rewrite the architecture as a normalizer-free one ([A] section 3) with new random weights
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from normfree.suggest import problem, unknown
from normfree.surgery.batchnorm import batchnorms, fold_batchnorms_, other_norms
from normfree.surgery.conversion_report import ConvertReport, How, LayerChange
from normfree.surgery.in_place import remove_in_place_
from normfree.surgery.scratch import rewrite
from normfree.surgery.standardized_conv import can_be_standardized, scales_with_weight
from normfree.surgery.trace import convolutions, evaluation_mode
from normfree.surgery.weight_fit import standardize_


class Converted(NamedTuple):
    """A network without batch norm, and the report of its conversion."""

    model: nn.Module
    report: ConvertReport


def convert_batchnorm(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    how: How = "exact",
    alpha: float = 0.2,
    skip_gain: float = 0.0,
    hooks_safe: bool = True,
) -> Converted:
    """Return a copy of a network without batch norm, and a report of the changes.

    "exact" folds every batch norm, with its running statistics, into the layer before it or into a scale and shift
    per channel. Outputs in evaluation mode stay the same up to rounding. The result can be trained like any network,
    with AGC instead of the norm, and no example depends on another.

    "normalizer_free" does the same and then gives every convolution of maps with several input channels per filter a
    standardized weight (`Standardized`), whose filters have mean zero. With images, the weights are fitted so that
    each layer's output stays close to that of the folded network, and every channel keeps its mean and variance. The
    result is meant to be fine-tuned. Depthwise convolutions are not standardized, because their filters would lose
    too much.

    "scratch" rewrites the architecture ([A] section 3; [B] section 2): standardized weights that include γ and β,
    computed by tracking the variance over the traced graph, α and a skip gain on every residual branch, doubled gates
    and new random weights. The result is a `torch.fx.GraphModule`.

    The copy has the mode and the device of `model`, which is left unchanged.

    Args:
        model: a module that takes images B C H W and returns one tensor.
        images: a few hundred images B C H W, preprocessed for the model. They are evaluated as one batch, without
            gradients. "exact" compares outputs on them, "normalizer_free" fits weights to them, and "scratch" sets
            gains so that each layer has the predicted variance on them.
        how: the method: "exact", "normalizer_free" or "scratch".
        alpha: for "scratch", the constant α that multiplies each residual branch.
        skip_gain: for "scratch", the initial value of the skip gains; with 0 all branches are closed at the start.
        hooks_safe: leave no module that works in place, so that hooks, Opacus and torch.func see every tensor. False
            saves memory at inference.

    Returns:
        `(model, report)`: the converted copy, and a `ConvertReport`, whose `str()` is a table.

    Raises:
        ValueError: `how` is unknown; the model has no batch norm, or one that cannot be removed (it is named); or with
            "exact", the relative difference of the outputs on the images is above 1e-3.
        NotTraceableError: (a ValueError) with the other methods, torch.fx cannot trace the model; with "scratch", the
            model has an operation without a rule.

    Examples:
        >>> import torch
        >>> import normfree
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> converted, report = normfree.convert_batchnorm(net)
        >>> print(report)
        exact: 1 folded
        layer  change  norm
        0      folded  1
        >>> images = torch.randn(2, 3, 8, 8)
        >>> torch.allclose(converted(images), net(images), atol=1e-5)
        True

    Source: [A] section 3 and [B] section 2 for "scratch"; the fit of "normalizer_free" is our own.
    """
    _check(model, how, alpha=alpha, skip_gain=skip_gain)
    if how == "scratch":
        rewritten, layers, kept = rewrite(model, images, alpha=alpha, skip_gain=skip_gain)
        count = 0 if images is None else len(images)
        return Converted(rewritten, ConvertReport(how, tuple(layers), kept, count, None))
    return _fold(model, images, how, hooks_safe=hooks_safe)


def _check(model: nn.Module, how: How, *, alpha: float, skip_gain: float) -> None:
    """Check the arguments of `convert_batchnorm`."""
    if how not in get_args(How):
        raise ValueError(unknown("how", how, get_args(How)))
    if not batchnorms(model):
        others = Counter(other_norms(model).values())
        listed = ", ".join(f"{n} {kind}" for kind, n in others.items()) or "none"
        raise ValueError(
            problem(
                f"{type(model).__name__} has no batch norm: nothing to convert. Its other norms: {listed}",
                allowed="networks with torch.nn.BatchNorm1d, 2d or 3d, or a module that behaves like one",
            )
        )
    if how != "scratch" and (alpha, skip_gain) != (0.2, 0.0):
        raise ValueError(
            problem(
                f"alpha={alpha}, skip_gain={skip_gain} with how={how!r}",
                allowed="alpha and skip_gain with how='scratch' only",
                fix="leave them out",
            )
        )


def _fold(model: nn.Module, images: Tensor | None, how: How, *, hooks_safe: bool) -> Converted:
    """Convert by the methods "exact" and "normalizer_free"."""
    converted = copy.deepcopy(model)
    expected = None if images is None else _outputs(model, images)
    folded = fold_batchnorms_(converted)
    layers = [
        LayerChange(f.layer, "folded", f.norm) if f.layer else LayerChange(f.norm, "scale and shift", f.norm)
        for f in folded
    ]
    kept = {name: f"{kind} does not use batch statistics" for name, kind in other_norms(converted).items()}
    if how == "normalizer_free":
        layers = _standardize_(converted, images, layers, kept)
    if hooks_safe:
        remove_in_place_(converted)
    error = None
    if images is not None and expected is not None:
        got = _outputs(converted, images)
        error = float((got - expected).norm() / expected.norm())
        if how == "exact" and not error < 1e-3:
            raise ValueError(
                problem(
                    f"{type(model).__name__}: folding would change the outputs by {error:.1e} (relative L2 norm), so a "
                    "layer or a norm does not compute what its class suggests",
                    allowed="below 1e-3",
                )
            )
    return Converted(
        converted, ConvertReport(how, tuple(layers), kept, 0 if images is None else len(images), error)
    )


def _standardize_(
    folded: nn.Module, images: Tensor | None, layers: list[LayerChange], kept: dict[str, str]
) -> list[LayerChange]:
    """Standardize all dense convolutions of maps; add the reason to `kept` for each other convolution."""
    maps, pooled = convolutions(folded)
    convs = {name: folded.get_submodule(name) for name in maps}
    able = {
        name: conv for name, conv in convs.items() if can_be_standardized(conv) and scales_with_weight(conv)
    }
    dense = [name for name, conv in able.items() if conv.weight.shape[1] > 1]  # type: ignore[index]
    kept |= {name: "after global pooling: not standardized" for name in pooled}
    kept |= {
        name: "one input channel per filter: not standardized"
        if name in able
        else f"{type(conv).__name__} cannot be standardized"
        for name, conv in convs.items()
        if name not in dense
    }
    norms = {change.layer: change.norm for change in layers if change.change == "folded"}
    done = [
        LayerChange(fit.layer, "standardized", norms.get(fit.layer, ""), fit.lost_mean, fit.unexplained)
        for fit in standardize_(folded, dense, images)
    ]
    return [*done, *(change for change in layers if change.layer not in dense)]


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the outputs of a model in evaluation mode."""
    with evaluation_mode(model):
        out = model(images)
    if not isinstance(out, Tensor):
        raise ValueError(
            problem(
                f"{type(model).__name__} returns {type(out).__name__} in evaluation mode",
                allowed="one tensor",
                fix="wrap it in a module that returns only the logits",
            )
        )
    return out
