"""Find the residual blocks of any network by recording one forward pass, without tracing or per-architecture rules.

A residual block is an addition of two activation maps of equal shape whose distances from the images differ. The
distance of a tensor is the number of matrix products and convolutions on the shortest path from the images to it: an
identity shortcut adds none, a projection adds one, a residual branch adds more. The operand with the smaller distance
is the shortcut, the other one is the branch. If the distances are equal, the addition is not a block (for example a
sum of parallel convolutions, or a GELU written with elementary operations). A block is named after the module that
performs the addition.
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
    """Statistics of one activation map.

    Attributes:
        squared_mean: mean over channels of (mean over images and positions)².
        variance: mean over channels of the biased variance over images and positions.
        cosine: mean cosine similarity between the maps of two different images; NaN for a single image.

    Source: `signal_metrics` of the reference code, for the first two.
    """

    squared_mean: float
    variance: float
    cosine: float


def is_map(value: object, images: int) -> bool:
    """Return True if `value` is an activation map of a batch of `images` images: B C H W, or tokens B N C."""
    return (
        isinstance(value, Tensor)
        and value.ndim in (3, 4)
        and value.shape[0] == images
        and value.is_floating_point()
        and value.numel() > 0
    )


def channel_moments(x: Tensor) -> tuple[float, float]:
    """Compute the average squared channel mean and the average channel variance of a map, in float32 or float64."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(x, dim=(0, 2, 3) if x.ndim == 4 else (0, 1), correction=0)
    return float(mean.square().mean()), float(variance.mean())


def moments(x: Tensor) -> ChannelMoments:
    """Compute all statistics of a map, B C H W or B N C."""
    flat = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    unit = flat / torch.where(norms > 0, norms, 1.0)
    n = len(unit)
    # The mean over all pairs of different images follows from the norm of the sum of all unit vectors.
    together, alone = float(unit.sum(0).square().sum()), float(unit.square().sum())
    cosine = (together - alone) / (n * (n - 1)) if n > 1 else float("nan")
    return ChannelMoments(*channel_moments(x), cosine)


@dataclass(frozen=True)
class ResidualBlock:
    """One residual block of the recorded forward pass.

    Attributes:
        module: name of the module that performs the addition.
        shape: shape of the sum.
        output: statistics of the sum.
        branch_variance: average channel variance of the branch before the scalars that multiply it.
        starts_stage: True if the shortcut is not the output of the previous block.
    """

    module: str
    shape: tuple[int, ...]
    output: ChannelMoments
    branch_variance: float
    starts_stage: bool


class _Frame:
    """A running module: its name, its inputs and the statistics of the first activation map among them."""

    def __init__(
        self, module: nn.Module, name: str, inputs: list[Any], input_moments: ChannelMoments | None
    ) -> None:
        self.module, self.name, self.inputs, self.input_moments = module, name, inputs, input_moments
        # Output of the attention module if `module` is a `Block`.
        self.gate: Tensor | None = None


class ActivationRecorder(TorchDispatchMode):
    """Dispatch mode that records residual blocks while it is active.

    Attributes:
        residuals: the blocks found so far, in the order of execution.
        stem: statistics of the input of the first block; None if that is not an activation map.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.residuals: list[ResidualBlock] = []
        self.stem: ChannelMoments | None = None
        self._images = len(images)
        self._running: list[_Frame] = []
        self._distance: Any = WeakTensorKeyDictionary({images: 0})
        # Variance of a tensor before its scalar factors.
        self._unscaled: Any = WeakTensorKeyDictionary()
        # Distance and shape of the previous block's output.
        self._last: tuple[int, torch.Size] | None = None

    # --- modules ---

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[ActivationRecorder]:
        """Activate the mode and register hooks on `model` that track which module is running."""
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
        """Return a forward pre-hook for the module called `name`."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs, input_moments = tree_leaves((args, kwargs)), None
            # Until the first block is found, each module could be it.
            if not self.residuals:
                input_moments = next((moments(x) for x in inputs if is_map(x, self._images)), None)
            self._running.append(_Frame(module, name, inputs, input_moments))

        return enter

    def _leave(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        self._running.pop()
        parent = self._running[-1] if self._running else None
        if parent is not None and isinstance(parent.module, Block) and module is parent.module.attention:
            parent.gate = output

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs, kind = kwargs or {}, func.overloadpacket
        # Computed before the operation runs, because it may write to an operand in place.
        found = self._residual(kind, args) if kind in _ADDITIONS else None
        unscaled = self._before_scaling(args) if kind in _SCALINGS else None
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        distances = [self._distance[t] for t in inputs if t in self._distance]
        result = func(*args, **kwargs)
        for t in tree_leaves(result) if distances else ():
            if isinstance(t, Tensor):
                self._distance[t] = min(distances) + (kind in _WEIGHTED)
                self._unscaled.pop(t, None)
                if unscaled is not None:
                    self._unscaled[t] = unscaled
        if found is not None:
            frame, branch_variance, starts_stage = found
            if not self.residuals:
                self.stem = frame.input_moments
            self.residuals.append(
                ResidualBlock(frame.name, tuple(result.shape), moments(result), branch_variance, starts_stage)
            )
            self._last = (self._distance[result], result.shape)
        return result

    def _residual(self, kind: Any, args: Sequence[Any]) -> tuple[_Frame, float, bool] | None:
        """Return (adding module, variance of the branch, whether a stage starts) if this addition ends a block."""
        shortcut, branch = args[0], args[1]
        # addcmul computes shortcut + branch · gate.
        fused = kind in (aten.addcmul, aten.addcmul_)
        if not (is_map(shortcut, self._images) and is_map(branch, self._images)):
            return None
        if shortcut.shape != branch.shape or shortcut not in self._distance or branch not in self._distance:
            return None
        if self._distance[shortcut] > self._distance[branch] and not fused:
            shortcut, branch = branch, shortcut
        distance = self._distance[shortcut]
        if distance >= self._distance[branch]:
            return None
        frames = [f for f in self._running if not _holds(f.inputs, shortcut) or not _holds(f.inputs, branch)]
        # A module that receives both operands only adds them, so the block is the module around it.
        frame = frames[-1]
        starts_stage = self._last is None or distance > self._last[0] or shortcut.shape != self._last[1]
        return frame, self._branch_variance(frame, branch, args[2] if fused else None), starts_stage

    def _branch_variance(self, frame: _Frame, branch: Tensor, gate: Any) -> float:
        """Compute the variance of the branch with its gates but without its scalar factors, as the reference does."""
        # Our blocks merge the gate, its factor 2, α and the skip gain into one multiplication.
        if isinstance(frame.module, Block):
            if frame.gate is None or frame.module.attention_in_middle:
                return self._variance(branch)
            return channel_moments(branch * (frame.gate * frame.module.gate_scale))[1]
        if isinstance(gate, Tensor) and gate.ndim:
            return channel_moments(branch * gate)[1]
        return self._variance(branch)

    def _before_scaling(self, args: Sequence[Any]) -> float | None:
        """Return the variance of the map if `args` are a map and a scalar, which may be a skip gain of 0."""
        x, factor = args[0], args[1]
        if not is_map(x, self._images):
            x, factor = factor, x
        if not is_map(x, self._images) or (isinstance(factor, Tensor) and factor.ndim):
            return None
        return self._variance(x)

    def _variance(self, x: Tensor) -> float:
        """Return the variance of a map before its scalar factors."""
        known = self._unscaled.get(x)
        return channel_moments(x)[1] if known is None else known


def _holds(values: list[Any], tensor: Tensor) -> bool:
    """Return True if `tensor` is one of `values`, by identity."""
    return any(value is tensor for value in values)
