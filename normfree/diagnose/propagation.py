"""Signal propagation: mean and variance of the activations after every residual block of a network.

Works for any module that takes images B C H W, and leaves the module unchanged.

Source: [A] section 3 (signal propagation plots) and `signal_metrics` of the reference code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfree.diagnose.residuals import ActivationRecorder, ChannelMoments, is_map, moments
from normfree.models.net import Block, Net
from normfree.models.variant import Variant
from normfree.suggest import did_you_mean, problem


class NoResidualBlocksError(ValueError):
    """Raised for a network without residual additions."""


@dataclass(frozen=True)
class PredictedSignal:
    """Predicted statistics of a block at initialization, for N(0, 1) images and skip gains of 1.

    The prediction assumes that average pooling on shortcuts (`Variant.shortcut`) keeps the variance, as it does on
    smooth activation maps. On noise, pooling 2x2 values reduces the variance to about a quarter.

    See `ChannelMoments` for `squared_mean` and `variance`, `BlockSignal` for `branch_variance`.
    """

    squared_mean: float
    variance: float
    branch_variance: float


@dataclass(frozen=True)
class BlockSignal:
    """Statistics of one block.

    Attributes:
        module: name of the block in the network.
        stage: index of the stage, from 0.
        index: index k of the block in its stage, from 1.
        shape: shape of the output, the sum of shortcut and branch.
        squared_mean, variance, cosine: statistics of the output, see `ChannelMoments`.
        branch_variance: average channel variance of the residual branch after its gates, before stochastic depth and
            scalar factors (α, skip gain). None if the block was selected by name.
        predicted: the values that theory predicts, or None if there is no prediction.
    """

    module: str
    stage: int
    index: int
    shape: tuple[int, ...]
    squared_mean: float
    variance: float
    cosine: float
    branch_variance: float | None = None
    predicted: PredictedSignal | None = None


@dataclass(frozen=True)
class SignalReport:
    """Statistics of all blocks of a network.

    Attributes:
        stem: statistics of the input of the first block; None if that is not an activation map.
        blocks: the blocks in the order of execution.
        images: shape of the images, B C H W.
        batch_statistics: True if batch norms normalized with the statistics of these images, as in training.
        pooled_shortcuts: True if the network has predictions and average-pools its shortcuts, which the predictions do
            not include.
    """

    stem: ChannelMoments | None
    blocks: tuple[BlockSignal, ...]
    images: tuple[int, ...]
    batch_statistics: bool
    pooled_shortcuts: bool = False

    @property
    def stages(self) -> tuple[tuple[BlockSignal, ...], ...]:
        """The blocks, grouped by stage."""
        return tuple(tuple(group) for _, group in groupby(self.blocks, key=lambda b: b.stage))


def signal_propagation(model: nn.Module, images: Tensor, *, blocks: Sequence[str] = ()) -> SignalReport:
    """Measure the activations after every residual block of a network.

    Residual blocks are found by recording the additions of a forward pass; a new stage starts where a convolution or
    a change of shape separates two blocks. The network runs in evaluation mode, so nothing is dropped. Batch norms
    that were never trained use the statistics of the images instead of their running statistics. The network is left
    unchanged, including its running statistics.

    Args:
        model: any module that takes images.
        images: B C H W: unit Gaussian noise, or real images after normalization.
        blocks: names of modules to measure instead of residual blocks, for networks that have none.

    Returns:
        The statistics of each block, with predictions if `model` is one of our networks at initialization.

    Raises:
        NoResidualBlocksError: the network has no residual blocks and `blocks` is empty.
        ValueError: a name in `blocks` is unknown, or its output is not an activation map.

    Examples:
        The predicted variance grows by α² = 0.04 per block and is reset at the start of each stage:

        >>> import torch
        >>> import normfree
        >>> _ = torch.manual_seed(0)
        >>> net = normfree.create_model("nf_resnet_nano", skip_gain=1.0)
        >>> report = normfree.signal_propagation(net, torch.randn(2, 3, 32, 32))
        >>> for block in report.blocks:
        ...     print(block.module, f"{block.predicted.variance:.2f}")
        stages.0.0 1.04
        stages.1.0 1.04
        stages.1.1 1.08
        stages.2.0 1.04
        stages.2.1 1.08

    Source: [A] section 3, figure 1.
    """
    # torch.compile wraps the module.
    model = getattr(model, "_orig_mod", model)
    with torch.no_grad(), measured(model) as batch_statistics:
        if blocks:
            stem, found = _named(model, images, blocks)
        else:
            stem, found = _residual(model, images)
    pooled = False
    if isinstance(model, Net) and not blocks:
        found = [replace(b, predicted=predicted_signal(model.variant, index=b.index)) for b in found]
        pooled = any(b.predicted for b in found) and any(
            isinstance(m, Block) and m.pool for m in model.modules()
        )
    return SignalReport(stem, tuple(found), tuple(images.shape), batch_statistics, pooled)


def predicted_signal(variant: Variant, *, index: int) -> PredictedSignal | None:
    """Return the predicted statistics of block `index` (from 1) of any stage of a variant, or None if unknown.

    Normalizer-free networks have variance 1 + kα², the square of what β divides by ([A] section 3). With batch norm
    before ReLU and He-normal convolutions, each branch and the transition's shortcut add 1 - 1/π to the variance and
    1/π to the squared mean ([A] section 2).
    """
    if variant.norm == "none":
        return PredictedSignal(0.0, 1.0 + index * variant.alpha**2, 1.0)
    if variant.activation == "relu" and variant.attention == "none":
        mean, variance = 1.0 / math.pi, 1.0 - 1.0 / math.pi
        return PredictedSignal((index + 1) * mean, (index + 1) * variance, variance)
    return None


@contextmanager
def measured(model: nn.Module) -> Iterator[bool]:
    """Switch `model` to evaluation mode, except untrained batch norms, which use batch statistics without storing them.

    Yields True if there are untrained batch norms. All modes are restored on exit.
    """
    training = {m: m.training for m in model.modules()}
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and _untrained(m)]
    tracking = [m.track_running_stats for m in norms]
    try:
        model.eval()
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield bool(norms)
    finally:
        for module, mode in training.items():
            module.training = mode
        for norm, track in zip(norms, tracking, strict=True):
            norm.track_running_stats = track


def _untrained(norm: _BatchNorm) -> bool:
    return norm.num_batches_tracked is None or int(norm.num_batches_tracked) == 0


def _residual(model: nn.Module, images: Tensor) -> tuple[ChannelMoments | None, list[BlockSignal]]:
    """Measure all residual blocks."""
    recorder = ActivationRecorder(images)
    with recorder.attached(model):
        model(images)
    if not recorder.residuals:
        raise NoResidualBlocksError(
            problem(
                f"{type(model).__name__} has no residual block: it never adds two activation maps of which "
                "one is fewer convolutions away from the images",
                fix="name the modules to measure: blocks=[...], with names of model.named_modules()",
            )
        )
    stage, index, found = -1, 0, []
    names: dict[str, int] = {}
    for r in recorder.residuals:
        stage, index = (stage + 1, 1) if r.starts_stage else (stage, index + 1)
        count = names[r.module] = names.get(r.module, 0) + 1
        # A module may contain several residual additions.
        name = r.module if count == 1 else f"{r.module} ({count})"
        found.append(_block(name, stage, index, r.shape, r.output, r.branch_variance))
    return recorder.stem, found


def _named(
    model: nn.Module, images: Tensor, names: Sequence[str]
) -> tuple[ChannelMoments | None, list[BlockSignal]]:
    """Measure the outputs of the modules called `names`."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise ValueError(
                problem(
                    f"blocks: {type(model).__name__} has no module {name!r}.{did_you_mean(name, modules)}",
                    allowed="the names of model.named_modules()",
                )
            )
    stem: list[ChannelMoments] = []
    seen: list[tuple[str, tuple[int, ...], ChannelMoments]] = []

    def record(name: str, inputs: tuple[object, ...], output: object) -> None:
        if not is_map(output, len(images)):
            raise ValueError(
                problem(
                    f"blocks: the output of {name!r} is not an activation map",
                    allowed="modules whose output is a floating-point tensor B C H W or B N C",
                )
            )
        assert isinstance(output, Tensor)
        if not seen and inputs and is_map(inputs[0], len(images)):
            assert isinstance(inputs[0], Tensor)
            stem.append(moments(inputs[0]))
        seen.append((name, tuple(output.shape), moments(output)))

    handles = [
        modules[n].register_forward_hook(lambda _m, inputs, out, n=n: record(n, inputs, out)) for n in names
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    found: list[BlockSignal] = []
    for name, shape, m in seen:
        last = found[-1] if found else None
        new = last is None or last.shape != shape
        stage = 0 if last is None else last.stage + new
        found.append(_block(name, stage, 1 if last is None or new else last.index + 1, shape, m, None))
    return (stem[0] if stem else None), found


def _block(
    name: str, stage: int, index: int, shape: tuple[int, ...], m: ChannelMoments, branch: float | None
) -> BlockSignal:
    return BlockSignal(name, stage, index, shape, m.squared_mean, m.variance, m.cosine, branch)
