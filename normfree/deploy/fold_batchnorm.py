"""Folding of batch norm into the convolution before it, where the graph of the model proves that this changes nothing.

A norm is folded if the convolution is called once, the norm is called once, and only the norm reads the output of the
convolution. torch.fx shows this for the whole model, or for the parts of a model that it cannot trace as a whole. A
part is trusted only if a run on example images shows that its layers are called from within it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfree.surgery.batchnorm import factor_and_shift
from normfree.surgery.trace import NotTraceableError, module_of, tensor_inputs, trace

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Batch norms of other libraries, each with the attributes that hold what it computes after the norm.
_NORMS_OF_OTHERS = {
    ("timm.layers.norm_act", "BatchNormAct2d"): ("drop", "act"),
    ("timm.layers.norm_act", "SyncBatchNormAct"): ("drop", "act"),
    ("torchvision.ops.misc", "FrozenBatchNorm2d"): (),
}
# Subclasses of convolutions that are linear in their weight, by module; ours and torch's are.
_PLAIN_MODULES = ("torch.nn.modules.conv", "normfree.models.layers", "normfree.deploy.packed_conv2d")
_PLAIN_CONVS = frozenset(
    {
        ("timm.layers.conv2d_same", "Conv2dSame"),
        ("timm.layers.conv2d_same", "Conv2dSameExport"),
        ("normfree.deploy.fold_standardized", "SameConv2d"),
    }
)


def is_batchnorm(module: nn.Module) -> bool:
    """Return True for the batch norms that can be folded; a subclass is not one of them."""
    return type(module) in _PLAIN_NORMS or _key(module) in _NORMS_OF_OTHERS


def looks_like_batchnorm(module: nn.Module) -> bool:
    """Return True for all modules that are a kind of batch norm, known or not."""
    return isinstance(module, _BatchNorm) or is_batchnorm(module)


def is_plain_conv(module: nn.Module) -> bool:
    """Return True for convolutions that are linear in their weight."""
    return isinstance(module, _ConvNd) and (
        type(module).__module__ in _PLAIN_MODULES or _key(module) in _PLAIN_CONVS
    )


def _key(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


# --- which norms ---------------------------------------------------------------------------------------


@dataclass
class NormPairs:
    """The norms that can be folded, each with its convolution, by name, and the reasons for all others."""

    found: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def find_pairs(model: nn.Module, example: tuple[Any, ...] | None) -> NormPairs:
    """Find the batch norms of `model` that can be folded.

    Args:
        model: a model in evaluation mode.
        example: arguments of the model, or None. They are needed for models that torch.fx cannot trace as a whole.
    """
    names = [name for name, module in model.named_modules() if is_batchnorm(module)]
    if not names:
        return NormPairs()
    try:
        return _pairs_of(model, "")
    except NotTraceableError as error:
        if example is None:
            reason = f"torch.fx cannot trace the model ({error.where}), and there are no images to run it on"
            return NormPairs(reasons=dict.fromkeys(names, reason))
    result = NormPairs(reasons=dict.fromkeys(names, "torch.fx cannot trace the module that contains it"))
    runs = _observe(model, example)
    for prefix, part in _traceable_parts(model, ""):
        found = _pairs_of(part, prefix)
        result.reasons |= found.reasons
        for norm, conv in found.found.items():
            if runs.proves(prefix, conv, norm):
                result.found[norm] = conv
                del result.reasons[norm]
            else:
                result.reasons[norm] = (
                    f"the run did not call it and {conv} once, one after the other, in {prefix}"
                )
    return result


def _traceable_parts(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest submodules that contain batch norms and that torch.fx can trace, with their names."""
    for name, child in model.named_children():
        if not any(is_batchnorm(module) for module in child.modules()) or is_batchnorm(child):
            continue
        full = f"{prefix}{name}"
        try:
            trace(child)
        except NotTraceableError:
            yield from _traceable_parts(child, f"{full}.")
        else:
            yield full, child


def _pairs_of(part: nn.Module, prefix: str) -> NormPairs:
    """Find the norms that the graph of `part` allows to fold; names get the prefix."""
    graph = trace(part)
    dot = f"{prefix}." if prefix else ""
    calls = Counter(id(module_of(part, node)) for node in graph.nodes if node.op == "call_module")
    result = NormPairs()
    for name, module in part.named_modules():
        if is_batchnorm(module):
            result.reasons[dot + name] = (
                "the model does not call it" if not calls[id(module)] else "it is called twice"
            )
    for node in graph.nodes:
        norm = module_of(part, node)
        if norm is None or not is_batchnorm(norm) or calls[id(norm)] > 1:
            continue
        before = tensor_inputs(node)[0]
        conv = module_of(part, before)
        name = next(n for n, m in part.named_modules() if m is norm)
        if conv is None or not is_plain_conv(conv):
            result.reasons[dot + name] = "there is no convolution directly before it"
        elif calls[id(conv)] > 1:
            result.reasons[dot + name] = f"{dot}{before.target} is called {calls[id(conv)]} times"
        elif len(before.users) > 1:
            result.reasons[dot + name] = f"other layers read the output of {dot}{before.target}"
        elif getattr(norm, "running_mean", None) is None:
            result.reasons[dot + name] = "it has no running statistics"
        elif len(norm.running_mean) != conv.out_channels:  # type: ignore[arg-type]
            result.reasons[dot + name] = "its number of channels is not that of the convolution before it"
        else:
            result.found[dot + name] = dot + str(before.target)
            del result.reasons[dot + name]
    return result


# --- observation of a run --------------------------------------------------------------------------------


@dataclass
class _Runs:
    """What a run called: for each layer, the modules that were active, the input and the output."""

    stacks: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    def proves(self, part: str, conv: str, norm: str) -> bool:
        """Return True if both layers were called once, within `part`, and the norm read the convolution's output."""
        calls = [self.stacks.get(name, []) for name in (conv, norm)]
        return (
            all(len(stacks) == 1 and part in stacks[0] for stacks in calls)
            and self.inputs[norm] is self.outputs[conv]
        )


@torch.no_grad()
def _observe(model: nn.Module, example: tuple[Any, ...]) -> _Runs:
    """Run the model once and record its calls of convolutions and norms."""
    runs, active, handles = _Runs(), list[str](), []

    def enter(name: str, watched: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if watched:
                runs.stacks.setdefault(name, []).append(frozenset(active))
                runs.inputs[name] = args[0] if args else None
            active.append(name)

        return hook

    def leave(name: str, watched: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            active.pop()
            if watched:
                runs.outputs[name] = output

        return hook

    for name, module in model.named_modules():
        watched = is_plain_conv(module) or is_batchnorm(module)
        handles.append(module.register_forward_pre_hook(enter(name, watched)))
        handles.append(module.register_forward_hook(leave(name, watched)))
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return runs


# --- folding of one norm ---------------------------------------------------------------------------------


@torch.no_grad()
def fold_norm_(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm` into `conv` in place; return what remains of the norm: its activation, or an identity."""
    assert isinstance(conv, _ConvNd)
    factor, shift = factor_and_shift(norm)
    weight, groups = conv.weight.detach().double(), conv.groups
    if isinstance(conv, _ConvTransposeNd):
        # The weight is I O/groups H W, and the outputs of group g are g * O/groups and following.
        apart = weight.view(groups, -1, *weight.shape[1:])
        weight = (apart * factor.view(groups, 1, -1, *[1] * (weight.dim() - 2))).view_as(weight)
    else:
        weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if conv.bias is None else conv.bias.detach().double() * factor + shift
    conv.weight.copy_(weight)
    if conv.bias is None:
        conv.bias = nn.Parameter(bias.to(conv.weight), requires_grad=conv.weight.requires_grad)
    else:
        conv.bias.copy_(bias)
    rest = [getattr(norm, name) for name in _NORMS_OF_OTHERS.get(_key(norm), ())]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    if not rest:
        return nn.Identity()
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest)
