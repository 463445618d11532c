"""Folding of batch norm into the layer before it, or into a scale and shift per channel.

In evaluation mode, batch norm is one multiplication and one addition per channel:

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias = x * factor + shift
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from normfree.suggest import problem
from normfree.surgery.trace import (
    NotTraceableError,
    evaluation_mode,
    is_functional_batch_norm,
    module_of,
    tensor_inputs,
    traced_parts,
)

# Layers whose output is linear in the weight, so that a norm after them can be folded into the weight.
Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
# Two modules count as equal if the relative difference of their outputs on a probe is at most this.
SAME = 1e-4


class Copying(nn.Module):
    """A module without parameters that returns a copy of its output, so that others may change that in place.

    The copy is made after the hooks of the module: full backward hooks wrap the output, and the wrapped tensor must not
    be changed in place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __call__(self, *inputs: Any) -> Tensor:
        out: Tensor = super().__call__(*inputs)
        return out.clone()

    def forward(self, *inputs: Any) -> Tensor:
        out: Tensor = self.module(*inputs)
        return out


class ScaleShift(nn.Module):
    """x * gain + bias per channel (dimension 1), the replacement of a batch norm that cannot be folded into a layer.

    The parameters have the names of gains and biases of normalizer-free networks, so that `parameter_groups` clips
    them and does not decay them.
    """

    def __init__(self, gain: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(gain), nn.Parameter(bias)
        self.copies = False

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output, and a copy if `copies` is set, see `Copying`."""
        out: Tensor = super().__call__(x)
        return out.clone() if self.copies else out

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        return torch.addcmul(self.bias.view(shape), x, self.gain.view(shape))


@dataclass(frozen=True)
class Folded:
    """One folded batch norm: the name of the norm, and of the layer it was folded into ("" for a `ScaleShift`)."""

    norm: str
    layer: str


@torch.no_grad()
def fold_batchnorms_(model: nn.Module) -> list[Folded]:
    """Replace every batch norm of `model` in place and keep the outputs of evaluation mode.

    A norm is folded into a layer if torch.fx shows that the layer is used once and that only the norm reads its output.
    Every other norm becomes a `ScaleShift`, which is equally exact, and so do norms in modules that torch.fx cannot
    trace.

    Returns:
        One entry per norm, in the order of `batchnorms`.

    Raises:
        ValueError: a norm has no running statistics, is not a known kind of batch norm, or is called as a function
            instead of as a module.
    """
    norms = split_fused_(model)
    pairs = _pairs(model)
    done: list[Folded] = []
    for name, norm in norms.items():
        factor, shift = factor_and_shift(norm, name=name)
        layer = pairs.get(name, "")
        if layer and _fold_into_(model.get_submodule(layer), factor, shift):
            replace_(model, norm, nn.Identity())
        else:
            layer = ""
            like = norm.running_mean
            assert isinstance(like, Tensor)
            replace_(model, norm, ScaleShift(factor.to(like), shift.to(like)))
        done.append(Folded(name, layer))
    return done


def batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of `model` that hold batch statistics, by name. A shared module has its first name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or _holds_statistics(module)
    }


def other_norms(model: nn.Module) -> dict[str, str]:
    """Return names and types of norm layers that use no batch statistics; these are left unchanged."""
    known = set(batchnorms(model))
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in known and "norm" in type(module).__name__.lower() and not any(module.children())
    }


def split_fused_(model: nn.Module) -> dict[str, nn.Module]:
    """Split modules that contain a batch norm and an activation (timm's `BatchNormAct2d`) in place.

    Returns:
        All batch norms of the model by name, as `batchnorms` returns them.

    Raises:
        ValueError: a module with running statistics computes something else.
    """
    for name, module in batchnorms(model).items():
        if _is_affine(module):
            continue
        parts = [
            p
            for p in (getattr(module, "drop", None), getattr(module, "act", None))
            if isinstance(p, nn.Module)
        ]
        plain = _plain_twin(module)
        whole = nn.Sequential(plain, *parts)
        if not _agree(module, whole):
            raise NotTraceableError(
                name,
                problem(
                    f"{type(module).__name__} has running statistics and is not a known kind of batch norm",
                    fix="replace it by torch.nn.BatchNorm2d and load its statistics",
                ),
            )
        replace_(model, module, whole)
    return batchnorms(model)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace the module `old` by `new` under all of its names."""
    new.train(old.training)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def factor_and_shift(
    norm: nn.Module, *, name: str = "", dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return what a batch norm multiplies by and adds in evaluation mode, each of shape (channels,).

    Args:
        norm: a batch norm.
        name: the name of `norm` in its network, for the error message.
        dtype: the dtype of the computation and of the result.

    Raises:
        ValueError: `norm` has no running statistics, so its output depends on the batch in evaluation mode too.
    """
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ValueError(
            problem(
                f"{name or type(norm).__name__} has no running statistics, so there is nothing to fold",
                allowed="batch norms with track_running_stats=True",
                fix="train it with running statistics, or convert with how='scratch'",
            )
        )
    factor = torch.rsqrt(variance.to(dtype) + float(norm.eps))  # type: ignore[arg-type]
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if isinstance(weight, Tensor):
        factor = factor * weight.detach().to(dtype)
    shift = -mean.to(dtype) * factor
    return factor, shift if not isinstance(bias, Tensor) else shift + bias.detach().to(dtype)


# --- the layer before each norm ------------------------------------------------------------


def _pairs(model: nn.Module) -> dict[str, str]:
    """Map the name of each norm that can be folded to the name of the layer before it."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found = {}
    for prefix, graph in traced_parts(model).items():
        part, start = model.get_submodule(prefix), f"{prefix}." if prefix else ""
        for norm, layer in _pairs_of_part(part, graph).items():
            ids = [id(part.get_submodule(name)) for name in (norm, layer)]
            # A layer that another part has too may be called there without its norm.
            if all(name.startswith(start) for i in ids for name in names[i]):
                found[f"{start}{norm}"] = f"{start}{layer}"
    return found


def _pairs_of_part(part: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """Do the same for a part of the model with this graph; the names are those in the part."""
    calls = Counter(id(module_of(part, node)) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        if is_functional_batch_norm(node):
            raise NotTraceableError(
                str(node.name),
                problem(
                    "torch.nn.functional.batch_norm is called without a module, so it cannot be replaced",
                    fix="use torch.nn.BatchNorm2d",
                ),
            )
        norm = module_of(part, node)
        if norm is None or not (isinstance(norm, _BatchNorm) or _holds_statistics(norm)):
            continue
        before = tensor_inputs(node)[0]
        layer = module_of(part, before)
        if (
            isinstance(layer, Weighted)
            and not isinstance(layer, _ConvTransposeNd)
            and len(before.users) == 1
            and calls[id(layer)] == calls[id(norm)] == 1
        ):
            found[str(node.target)] = str(before.target)
    return found


def _fold_into_(layer: nn.Module, factor: Tensor, shift: Tensor) -> bool:
    """Fold a norm into `layer`; return False and leave it unchanged if its output is not linear in its weight."""
    assert isinstance(layer, Weighted)
    if parametrize.is_parametrized(layer) or not isinstance(layer._parameters.get("weight"), nn.Parameter):
        return False
    old, old_bias = layer.weight.detach().clone(), layer.bias
    stock = type(layer).__module__.startswith("torch.nn.")
    probe = None if stock else _probe(layer)
    expected = None if probe is None else layer(probe)
    layer.weight.copy_(old.double() * factor.view(-1, *[1] * (old.dim() - 1)))
    bias = shift if old_bias is None else old_bias.double() * factor + shift
    layer.bias = nn.Parameter(bias.to(old))
    if probe is None or expected is None:
        return True
    shape = [1, -1] + [1] * (expected.dim() - 2)
    if _close(layer(probe), expected * factor.view(shape).to(old) + shift.view(shape).to(old)):
        return True
    layer.weight.copy_(old)
    layer.bias = old_bias
    return False


# --- modules of other libraries ------------------------------------------------------------------


def _holds_statistics(module: nn.Module) -> bool:
    """Return True if a module has running statistics and an eps itself, so it is probably a batch norm."""
    own = {**module._parameters, **module._buffers}
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return (
        own.get("running_mean") is not None and own.get("running_var") is not None and hasattr(module, "eps")
    )


def _is_affine(module: nn.Module) -> bool:
    """Return True if a module computes a batch norm and nothing else."""
    if type(module).__module__.startswith("torch.nn.") or getattr(module, "running_mean", None) is None:
        return True
    return _agree(module, _plain_twin(module))


def _plain_twin(module: nn.Module) -> nn.Module:
    """Return a `BatchNorm2d` with the statistics, weight, bias and mode of `module`."""
    factor, _ = factor_and_shift(module)
    plain = nn.BatchNorm2d(len(factor), eps=float(module.eps), affine=True)  # type: ignore[arg-type]
    state = module.state_dict()
    with torch.no_grad():
        plain.weight.copy_(state.get("weight", torch.ones(len(factor))))
        plain.bias.copy_(state.get("bias", torch.zeros(len(factor))))
    plain.running_mean, plain.running_var = state["running_mean"].clone(), state["running_var"].clone()
    return plain.to(state["running_mean"]).train(module.training)


def _agree(one: nn.Module, other: nn.Module) -> bool:
    """Return True if two modules have the same outputs on random maps in evaluation mode."""
    mean = one.running_mean
    assert isinstance(mean, Tensor)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(mean), 3, 3, generator=generator).to(mean)
    try:
        with torch.no_grad(), evaluation_mode(one, other):
            return _close(other(probe), one(probe))
    # A module of another library may raise anything. Then it is not a plain batch norm.
    except Exception:
        return False


def _probe(layer: nn.Module) -> Tensor:
    """Return a random input for `layer`."""
    assert isinstance(layer, Weighted)
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    else:
        shape = [2, layer.in_channels] + [16] * (layer.weight.dim() - 2)
    return torch.randn(shape, generator=generator).to(layer.weight)


def _close(one: Tensor, other: Tensor) -> bool:
    """Return True if the relative L2 distance of two tensors is at most `SAME`."""
    return one.shape == other.shape and bool((one - other).norm() <= SAME * other.norm())
