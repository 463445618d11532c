"""Finds the residual blocks of any network by watching it run: no tracing, no rule for any architecture.

A residual block is an addition of two activation maps of equal shape, one of which came a shorter way from the images.
Lengths are counted in matrix products and convolutions along the shortest path: an identity shortcut adds none, a
projection one, a branch more. The shorter operand is the shortcut, the longer one the branch; equal lengths make no
block (a sum of parallel convolutions, a GELU written out). A block bears the name of the module that adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from normfree.models.net import Block

aten = torch.ops.aten
_ADDITIONS = (aten.add, aten.add_, aten.addcmul, aten.addcmul_)
_SCALINGS = (aten.mul, aten.mul_, aten.div, aten.div_)
_WEIGHTED = (
    aten.convolution,
    aten._convolution,
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.linear,
    aten._native_multi_head_attention,
)


@dataclass(frozen=True)
class ChannelMoments:
    """Statistics of one activation map (reference code, `signal_metrics`).

    squared_mean: mean over channels of (mean over images and places)².
    variance: mean over channels of the variance over images and places (biased).
    cosine: mean cosine between the maps of two different images; NaN for a single image.
    """

    squared_mean: float
    variance: float
    cosine: float


def is_map(value: object, images: int) -> bool:
    """Whether `value` is an activation map: B C H W, or tokens B N C, of this batch."""
    return (
        isinstance(value, Tensor)
        and value.ndim in (3, 4)
        and value.shape[0] == images
        and value.is_floating_point()
        and value.numel() > 0
    )


def channel_moments(x: Tensor) -> tuple[float, float]:
    """(average channel squared mean, average channel variance) of a map, in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, dim=(0, 2, 3) if x.ndim == 4 else (0, 1), correction=0)
    return float(mean.square().mean()), float(variance.mean())


def moments(x: Tensor) -> ChannelMoments:
    """All statistics of a map."""
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / torch.where(norms > 0, norms, 1.0)
    n = len(unit)
    # the mean over pairs of different images, from the length of the sum of all directions
    together, alone = float(unit.sum(0).square().sum()), float(unit.square().sum())
    cosine = (together - alone) / (n * (n - 1)) if n > 1 else float("nan")
    return ChannelMoments(*channel_moments(x), cosine)


@dataclass(frozen=True)
class ResidualBlock:
    """One residual block as it ran. `module`: its name; `output`: the sum's statistics; `branch_variance`: of the
    branch before the numbers that scale it; `starts_stage`: the shortcut is not the last block's output."""

    module: str
    shape: tuple[int, ...]
    output: ChannelMoments
    branch_variance: float
    starts_stage: bool


class _Frame:
    """A module that is running: its name, what it was given, and the statistics of the first map among that."""

    def __init__(self, module: nn.Module, name: str, inputs: list[Any], given: ChannelMoments | None) -> None:
        self.module, self.name, self.inputs, self.given = module, name, inputs, given
        self.gate: Tensor | None = None  # of a block of ours: what its attention said


class ActivationRecorder(TorchDispatchMode):
    """While it is active, collects `residuals`, and in `stem` the statistics of what the first block was given."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.residuals: list[ResidualBlock] = []
        self.stem: ChannelMoments | None = None
        self._images = len(images)
        self._running: list[_Frame] = []
        self._length: Any = WeakTensorKeyDictionary({images: 0})
        self._unscaled: Any = WeakTensorKeyDictionary()  # variance before scalar factors
        self._last: tuple[int, torch.Size] | None = None  # length and shape of the last block's output

    # --- the modules ---

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[ActivationRecorder]:
        """Active, and told which module of `model` is running."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs, given = tree_leaves((args, kwargs)), None
            if not self.residuals:  # any of these may turn out to be the first block
                given = next((moments(x) for x in inputs if is_map(x, self._images)), None)
            self._running.append(_Frame(module, name, inputs, given))

        return enter

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._running.pop()
        parent = self._running[-1] if self._running else None
        if parent is not None and isinstance(parent.module, Block) and module is parent.module.attention:
            parent.gate = output

    # --- the operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, func.overloadpacket
        # looked at first, since the operation may write into an operand
        found = self._residual(kind, args) if kind in _ADDITIONS else None
        unscaled = self._before_scaling(args) if kind in _SCALINGS else None
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        lengths = [self._length[t] for t in inputs if t in self._length]
        result = func(*args, **kwargs)
        for t in tree_leaves(result) if lengths else ():
            if isinstance(t, Tensor):
                self._length[t] = min(lengths) + (kind in _WEIGHTED)
                self._unscaled.pop(t, None)
                if unscaled is not None:
                    self._unscaled[t] = unscaled
        if found is not None:
            frame, branch_variance, starts_stage = found
            if not self.residuals:
                self.stem = frame.given
            self.residuals.append(
                ResidualBlock(frame.name, tuple(result.shape), moments(result), branch_variance, starts_stage)
            )
            self._last = (self._length[result], result.shape)
        return result

    def _residual(self, kind: Any, args: Sequence[Any]) -> tuple[_Frame, float, bool] | None:
        """(module that adds, variance of the branch, whether a stage starts) if this addition ends a block."""
        shortcut, branch = args[0], args[1]
        fused = kind in (aten.addcmul, aten.addcmul_)  # shortcut + branch · gate
        if not (is_map(shortcut, self._images) and is_map(branch, self._images)):
            return None
        if shortcut.shape != branch.shape or shortcut not in self._length or branch not in self._length:
            return None
        if self._length[shortcut] > self._length[branch] and not fused:
            shortcut, branch = branch, shortcut
        length = self._length[shortcut]
        if length >= self._length[branch]:
            return None
        frames = [f for f in self._running if not _holds(f.inputs, shortcut) or not _holds(f.inputs, branch)]
        frame = frames[-1]  # a module that only adds is not the block
        starts_stage = self._last is None or length > self._last[0] or shortcut.shape != self._last[1]
        return frame, self._branch_variance(frame, branch, args[2] if fused else None), starts_stage

    def _branch_variance(self, frame: _Frame, branch: Tensor, gate: Any) -> float:
        """Of the branch with its gates, but without the numbers that scale it, as the reference counts."""
        if isinstance(frame.module, Block):  # which merges the gate, a factor 2, α and the skip gain
            if frame.gate is None or frame.module.attention_in_middle:
                return self._variance(branch)
            return channel_moments(branch * (frame.gate * frame.module.gate_scale))[1]
        if isinstance(gate, Tensor) and gate.ndim:
            return channel_moments(branch * gate)[1]
        return self._variance(branch)

    def _before_scaling(self, args: Sequence[Any]) -> float | None:
        """Of a map times a number, the map's variance: the number may be a skip gain, and that may be 0."""
        x, factor = args[0], args[1]
        if not is_map(x, self._images):
            x, factor = factor, x
        if not is_map(x, self._images) or (isinstance(factor, Tensor) and factor.ndim):
            return None
        return self._variance(x)

    def _variance(self, x: Tensor) -> float:
        known = self._unscaled.get(x)
        return channel_moments(x)[1] if known is None else known


def _holds(values: list[Any], tensor: Tensor) -> bool:
    return any(value is tensor for value in values)
