"""Batch norm with its running statistics is one multiplication and one addition per channel. Here they are found, and
written into the convolution or linear layer before them, or into a module of their own.

    y = (x - running_mean) / sqrt(running_var + eps) * weight + bias = x * factor + shift
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from normfree.suggest import problem
from normfree.surgery.trace import (
    NotTraceableError,
    is_functional_batch_norm,
    module_of,
    tensor_inputs,
    trace,
)

#: A layer that scales with its weight: what a norm behind it can be written into.
Weighted = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
#: Relative error up to which a module that we do not know counts as computing what we think it does.
SAME = 1e-4


class ScaleShift(nn.Module):
    """x * gain + bias per channel (dimension 1): what stays of a batch norm that no layer can take in.

    Named like the gains and biases of a normalizer-free network, so `parameter_groups` clips it and does not decay it.
    """

    def __init__(self, gain: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(gain), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        return torch.addcmul(self.bias.view(shape), x, self.gain.view(shape))


@dataclass(frozen=True)
class Folded:
    """Where one batch norm went: into `layer`, or into a scale and shift of its own (`layer` is "")."""

    norm: str
    layer: str


@torch.no_grad()
def fold_batchnorms_(model: nn.Module) -> list[Folded]:
    """Replaces every batch norm of `model` in place, by name order of the norms. Outputs stay those of evaluation mode.

    A norm is folded where torch.fx shows that it alone reads a layer that is used once. Every other norm becomes a
    `ScaleShift`, and so do all norms of a model that torch.fx cannot trace: that is as exact.

    Raises:
        ValueError: a norm has no running statistics, computes something that we do not know, or is called as a
            function, where no module holds it.
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
    """Every module of `model` that holds statistics of batches, by its first name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) or _holds_statistics(module)
    }


def other_norms(model: nn.Module) -> dict[str, str]:
    """Name and class of the norms that do not look at a batch: they are nobody's business here, and stay."""
    known = set(batchnorms(model))
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name not in known and "norm" in type(module).__name__.lower() and not any(module.children())
    }


def split_fused_(model: nn.Module) -> dict[str, nn.Module]:
    """Takes apart, in place, modules that normalize and then activate (timm's `BatchNormAct2d`); returns the plain
    batch norms by name.

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
                name, f"{type(module).__name__} holds running statistics and is no batch norm that is known here. "
                      "Replace it by torch.nn.BatchNorm2d, which loads its statistics."
            )  # fmt: skip
        replace_(model, module, whole)
    return batchnorms(model)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in the place of `old`, under every name that it has."""
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


# --- which layer stands before which norm ------------------------------------------------------------


def _pairs(model: nn.Module) -> dict[str, str]:
    """Name of a norm -> name of the layer that it can go into."""
    try:
        graph = trace(model)
    except NotTraceableError:
        return {}
    calls = Counter(id(module_of(model, node)) for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        if is_functional_batch_norm(node):
            raise NotTraceableError(
                str(node.name), "torch.nn.functional.batch_norm is called outside of a module, which cannot be "
                                "replaced. Use torch.nn.BatchNorm2d."
            )  # fmt: skip
        norm = module_of(model, node)
        if norm is None or not (isinstance(norm, _BatchNorm) or _holds_statistics(norm)):
            continue
        before = tensor_inputs(node)[0]
        layer = module_of(model, before)
        if (
            isinstance(layer, Weighted)
            and not isinstance(layer, _ConvTransposeNd)
            and len(before.users) == 1
            and calls[id(layer)] == calls[id(norm)] == 1
        ):
            found[str(node.target)] = str(before.target)
    return found


def _fold_into_(layer: nn.Module, factor: Tensor, shift: Tensor) -> bool:
    """False, and the layer as it was, where scaling the weight does not scale the output."""
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


# --- modules that nobody here wrote ------------------------------------------------------------------


def _holds_statistics(module: nn.Module) -> bool:
    own = {**module._parameters, **module._buffers}
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    return (
        own.get("running_mean") is not None and own.get("running_var") is not None and hasattr(module, "eps")
    )


def _is_affine(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.nn.") or getattr(module, "running_mean", None) is None:
        return True
    return _agree(module, _plain_twin(module))


def _plain_twin(module: nn.Module) -> nn.Module:
    factor, _ = factor_and_shift(module)
    plain = nn.BatchNorm2d(len(factor), eps=float(module.eps), affine=True)  # type: ignore[arg-type]
    state = module.state_dict()
    with torch.no_grad():
        plain.weight.copy_(state.get("weight", torch.ones(len(factor))))
        plain.bias.copy_(state.get("bias", torch.zeros(len(factor))))
    plain.running_mean, plain.running_var = state["running_mean"].clone(), state["running_var"].clone()
    return plain.to(state["running_mean"]).train(module.training)


def _agree(one: nn.Module, other: nn.Module) -> bool:
    mean = one.running_mean
    assert isinstance(mean, Tensor)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(mean), 3, 3, generator=generator).to(mean)
    modes = {m: m.training for m in (*one.modules(), *other.modules())}
    try:
        with torch.no_grad():
            return _close(other.eval()(probe), one.eval()(probe))
    except Exception:  # whatever a module that nobody here wrote may raise: it is not what we take it for
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode


def _probe(layer: nn.Module) -> Tensor:
    assert isinstance(layer, Weighted)
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    else:
        shape = [2, layer.in_channels] + [16] * (layer.weight.dim() - 2)
    return torch.randn(shape, generator=generator).to(layer.weight)


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= SAME * other.norm())
