"""Batch norm out of networks that exist, in three ways, each with a report of what changed.

exact             folded into the layers before it; the function of evaluation mode stays
normalizer_free   folded, then standardized kernels fitted to stand for the folded ones; the function nearly stays
scratch           the architecture rewritten as a normalizer-free one ([A] section 3), with fresh weights
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from normfree.surgery.batchnorm import batchnorms, fold_batchnorms_, other_norms
from normfree.surgery.conversion_report import ConvertReport, How, LayerChange
from normfree.surgery.trace import convolutions
from normfree.surgery.weight_standardization import can_be_standardized, scales_with_weight, standardize_


class Converted(NamedTuple):
    """A network without batch norm, and what was done to it."""

    model: nn.Module
    report: ConvertReport


def convert_batchnorm(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    how: How = "exact",
    alpha: float = 0.2,
    skip_gain: float = 0.0,
) -> Converted:
    """A copy of any torch network, without batch norm, and a report. `model` stays as it is.

    "exact" writes every batch norm with its running statistics into the layer before it, or into a scale and shift per
    channel: outputs in evaluation mode stay, to rounding. What comes out trains like any network, with AGC in place of
    the norm, and no example sees another.

    "normalizer_free" does the same, then gives every convolution of maps with several input channels per filter a
    standardized kernel (`Standardized`, the kernel of `WSConv2d`), which cannot have filter means. With images the
    kernels are fitted so that each layer's output stays near the folded network's, and so that every channel keeps its
    mean and variance. Meant to be trained further. Depthwise convolutions stay plain: their filters lose too much.

    "scratch" rewrites the architecture ([A] section 3; [B] section 2): standardized kernels that hold γ and β from
    tracking the variance over the traced graph, α and a skip gain on every residual branch, gates doubled, and fresh
    weights. The result is a torch.fx.GraphModule.

    The copy is in the model's mode and on its device. `parameter_groups` takes it; name the classifier's weight in a
    rule of your own if it is not called "head".

    Args:
        model: images B C H W -> anything with one tensor.
        images: some hundred of the user's images, prepared as the model wants them; they pass through at once, without
            gradients. "exact" only compares on them; "normalizer_free" is fitted to them; "scratch" sets gains so that
            each layer's variance on them is the predicted one.
        alpha: how="scratch": what residual branches are multiplied by.
        skip_gain: how="scratch": where the skip gains start; 0 starts every branch closed.

    Raises:
        ValueError: `how` is unknown; the model has no batch norm, or one that cannot be taken out (it is named); with
            "exact", the outputs on the images would change by more than 1e-3. Otherwise also for what cannot be
            traced, and from scratch for operations without a rule (`NotTraceableError`, a ValueError).
    """
    if how not in get_args(How):
        raise ValueError(
            f"how={how!r}. Allowed: {', '.join(get_args(How))}. Use 'exact', which keeps what the network computes."
        )
    if not batchnorms(model):
        others = Counter(other_norms(model).values())
        listed = ", ".join(f"{n} {kind}" for kind, n in others.items()) or "no other norm either"
        raise ValueError(f"{type(model).__name__} has no batch norm: nothing to convert. It has {listed}.")
    if how == "scratch":
        from normfree.surgery.scratch import rewrite

        rewritten, layers, kept = rewrite(model, images, alpha=alpha, skip_gain=skip_gain)
        count = 0 if images is None else len(images)
        return Converted(rewritten, ConvertReport(how, tuple(layers), kept, count, None))
    if (alpha, skip_gain) != (0.2, 0.0):
        raise ValueError(
            f"alpha={alpha}, skip_gain={skip_gain} with how={how!r}: only how='scratch' has them."
        )
    return _fold(model, images, how)


def _fold(model: nn.Module, images: Tensor | None, how: How) -> Converted:
    converted = copy.deepcopy(model)
    expected = None if images is None else _outputs(model, images)
    folded = fold_batchnorms_(converted)
    layers = [
        LayerChange(f.layer, "folded", f.norm) if f.layer else LayerChange(f.norm, "scale and shift", f.norm)
        for f in folded
    ]
    kept = {name: f"{kind} does not look at a batch" for name, kind in other_norms(converted).items()}
    if how == "normalizer_free":
        layers = _standardize_(converted, images, layers, kept)
    error = None
    if images is not None and expected is not None:
        got = _outputs(converted, images)
        error = float((got - expected).norm() / expected.norm())
        if how == "exact" and not error < 1e-3:
            raise ValueError(
                f"{type(model).__name__}: folding would change its outputs by {error:.1e} of their norm, so a layer "
                "or a norm of it does not compute what its class says. It cannot be folded safely."
            )
    return Converted(
        converted, ConvertReport(how, tuple(layers), kept, 0 if images is None else len(images), error)
    )


def _standardize_(
    folded: nn.Module, images: Tensor | None, layers: list[LayerChange], kept: dict[str, str]
) -> list[LayerChange]:
    """Standardized kernels wherever several channels meet; says in `kept` where not."""
    maps, pooled = convolutions(folded)
    convs = {name: folded.get_submodule(name) for name in maps}
    able = {
        name: conv for name, conv in convs.items() if can_be_standardized(conv) and scales_with_weight(conv)
    }
    dense = [name for name, conv in able.items() if conv.weight.shape[1] > 1]  # type: ignore[index]
    kept |= {name: "behind a global pooling: not standardized" for name in pooled}
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
    modes = {module: module.training for module in model.modules()}
    run: Callable[[Tensor], Tensor] = model.eval()
    try:
        out = run(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(out, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns {type(out).__name__} in evaluation mode; one tensor is needed. "
            "Wrap it in a module that returns the logits."
        )
    return out
