"""Signal propagation: how mean and variance of the activations travel through a network, block by block.

Source: [A] section 3 (signal propagation plots) and the reference code, `signal_metrics`. Any module that takes
images B C H W can be looked at; nothing about it is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normfree.diagnose.residuals import ActivationRecorder, ChannelMoments, is_map, moments
from normfree.models.net import Net
from normfree.models.variant import Variant


class NoResidualBlocksError(ValueError):
    """Nothing is added to anything in this network, so there is no block to report."""


@dataclass(frozen=True)
class PredictedSignal:
    """What theory says of a block at initialization, for images of N(0, 1) and skip gains of 1."""

    squared_mean: float
    variance: float
    branch_variance: float


@dataclass(frozen=True)
class BlockSignal:
    """One block. `module`: its name in the network; `stage`: from 0; `index`: k, from 1 in each stage; `shape`: of its
    output, the sum of shortcut and branch.

    squared_mean, variance, cosine: of the output, see `ChannelMoments`.
    branch_variance: average channel variance of the residual branch after its gates, before stochastic depth and the
        numbers that scale it (α, skip gain); None where no addition was watched (`blocks`).
    predicted: None where no theory is known here.
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
    """All blocks in order. `stem`: what the first block was given; None if that is no activation map.

    batch_statistics: whether batch norms normalized with the statistics of these images, as in training.
    """

    stem: ChannelMoments | None
    blocks: tuple[BlockSignal, ...]
    images: tuple[int, ...]
    batch_statistics: bool

    @property
    def stages(self) -> tuple[tuple[BlockSignal, ...], ...]:
        """The blocks, stage by stage."""
        return tuple(tuple(group) for _, group in groupby(self.blocks, key=lambda b: b.stage))


def signal_propagation(model: nn.Module, images: Tensor, *, blocks: Sequence[str] = ()) -> SignalReport:
    """Statistics of every residual block of `model` on `images` B C H W: unit Gaussian noise, or real ones, normalized.

    Residual blocks are found by watching the additions (`residuals`); a stage ends where a convolution or another
    shape stands between two blocks. For a network without them, name modules in `blocks`: their outputs are measured.
    Runs in evaluation mode, so nothing is dropped; but batch norms that have never been trained use the statistics of
    the images, since their running ones say nothing. The network is left as it was, running statistics included.

    Raises:
        NoResidualBlocksError: there are none.
        ValueError: a name in `blocks` is unknown, or its output is no activation map.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    with torch.no_grad(), measured(model) as batch_statistics:
        if blocks:
            stem, found = _named(model, images, blocks)
        else:
            stem, found = _residual(model, images)
    if isinstance(model, Net) and not blocks:
        found = [replace(b, predicted=predicted_signal(model.variant, index=b.index)) for b in found]
    return SignalReport(stem, tuple(found), tuple(images.shape), batch_statistics)


def predicted_signal(variant: Variant, *, index: int) -> PredictedSignal | None:
    """The theory of block `index` (from 1) of any stage of a row; None where there is none.

    Normalizer-free: variance 1 + kα², which is what β divides by ([A] section 3). Batch norm before ReLU, He-normal
    convolutions: each branch and the transition's shortcut add 1 - 1/π to the variance and 1/π to the squared mean
    ([A] section 2).
    """
    if variant.norm == "none":
        return PredictedSignal(0.0, 1.0 + index * variant.alpha**2, 1.0)
    if variant.activation == "relu" and variant.attention == "none":
        mean, variance = 1.0 / math.pi, 1.0 - 1.0 / math.pi
        return PredictedSignal((index + 1) * mean, (index + 1) * variance, variance)
    return None


@contextmanager
def measured(model: nn.Module) -> Iterator[bool]:
    """Evaluation mode, but batch norms without training use the batch's statistics and keep no memory of it. Yields
    whether there are such. All is put back afterwards."""
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
    watch = ActivationRecorder(images)
    with watch.attached(model):
        model(images)
    if not watch.residuals:
        raise NoResidualBlocksError(
            f"{type(model).__name__} has no residual block: no activation map is added to one that came a shorter "
            "way. Name the modules to measure instead: blocks=[...], names as in model.named_modules()."
        )
    stage, index, found = -1, 0, []
    names: dict[str, int] = {}
    for r in watch.residuals:
        stage, index = (stage + 1, 1) if r.starts_stage else (stage, index + 1)
        count = names[r.module] = names.get(r.module, 0) + 1
        name = r.module if count == 1 else f"{r.module} ({count})"  # a module may add twice
        found.append(_block(name, stage, index, r.shape, r.output, r.branch_variance))
    return watch.stem, found


def _named(
    model: nn.Module, images: Tensor, names: Sequence[str]
) -> tuple[ChannelMoments | None, list[BlockSignal]]:
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            close = get_close_matches(name, list(modules), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"blocks: {name!r} is no module of {type(model).__name__}.{hint} "
                "All names: dict(model.named_modules())."
            )
    stem: list[ChannelMoments] = []
    seen: list[tuple[str, tuple[int, ...], ChannelMoments]] = []

    def look(name: str, inputs: tuple[object, ...], output: object) -> None:
        if not is_map(output, len(images)):
            raise ValueError(f"blocks: the output of {name!r} is no activation map B C H W or B N C.")
        assert isinstance(output, Tensor)
        if not seen and inputs and is_map(inputs[0], len(images)):
            assert isinstance(inputs[0], Tensor)
            stem.append(moments(inputs[0]))
        seen.append((name, tuple(output.shape), moments(output)))

    handles = [
        modules[n].register_forward_hook(lambda _m, inputs, out, n=n: look(n, inputs, out)) for n in names
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
