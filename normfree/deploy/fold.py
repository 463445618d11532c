"""`fold`: convert a trained model to one of plain layers with the same outputs.

    our networks                                -> plain layers with all constants in their weights (`fold_net`)
    convolutions with weight standardization    -> plain convolutions with the standardized weight (`fold_standardized`)
    batch norm after a convolution              -> that convolution, with other weights (`fold_batchnorm`)

Everything else is left, and the report states why.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from normfree.deploy.fold_batchnorm import (
    find_pairs,
    fold_norm_,
    is_batchnorm,
    is_plain_conv,
    looks_like_batchnorm,
)
from normfree.deploy.fold_net import fold_parts_, plain_conv
from normfree.deploy.fold_standardized import NotFoldableError, folded_conv, is_standardized
from normfree.models.features import FeatureNet
from normfree.models.layers import WSConv2d
from normfree.models.net import Block, Net, Stem
from normfree.suggest import problem

Kind = Literal["weight standardization", "batch norm"]
OURS = (Net, FeatureNet, Stem, Block)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)  # fmt: skip
# Largest ||folded - original|| / ||original|| of the outputs on the example images, by the size of the dtype in bytes.
# Sums in another order change float32 outputs by 1e-7 to 5e-6, and bfloat16 has 8 bits.
TOLERANCE = {8: 1e-4, 4: 1e-4, 2: 5e-2}


@dataclass(frozen=True)
class FoldReport:
    """The layers that `fold` replaced, and those that it left.

    Attributes:
        folded: what was folded, by the name of the layer.
        left: why a layer was left, by its name; all layers that are a convolution or batch norm of an unknown class are
            listed as well.
        difference: largest absolute difference of the outputs on the example images; None without images.
        relative_difference: ||folded - original|| / ||original|| over all outputs; None without images.
    """

    folded: dict[str, Kind]
    left: dict[str, str]
    difference: float | None = None
    relative_difference: float | None = None

    def __str__(self) -> str:
        kinds = list(self.folded.values())
        counts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in dict.fromkeys(kinds)) or "nothing"
        lines = [f"folded: {counts}; left: {len(self.left)}"]
        if self.difference is not None:
            lines[0] += f"; largest difference {self.difference:.1e}, relative {self.relative_difference:.1e}"
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.left.items())])


class FoldedModel(NamedTuple):
    """A folded model and the report."""

    model: nn.Module
    report: FoldReport


@overload
def fold(model: Net, images: Any = None, *, standardized: Sequence[type[nn.Module]] = ()) -> Net: ...
@overload
def fold(
    model: nn.Module, images: Any = None, *, standardized: Sequence[type[nn.Module]] = ()
) -> nn.Module: ...
def fold(model: nn.Module, images: Any = None, *, standardized: Sequence[type[nn.Module]] = ()) -> nn.Module:
    """Return a copy of a model in evaluation mode with plain layers and the same outputs.

    Convolutions with weight standardization become plain convolutions: those of normfree, of timm (`StdConv2d`,
    `ScaledStdConv2d` and their `Same` forms), of Hugging Face's BiT and of Google's BiT, at any depth of the model.
    Their outputs stay equal bit for bit. Batch norm with running statistics is folded into the convolution before it if
    the graph of the model shows that nothing else reads the output of that convolution; float32 outputs then change by
    about 1e-6, relative. Networks of `create_model` are folded more deeply, with the same tolerance: all constants move
    into the weights.

    What `fold` does not know is left as it is: other subclasses of convolutions and norms, layers that share a weight
    with another layer, and layers with hooks, parametrizations or a replaced `forward`. `fold_with_report` lists them.

    `model` is not changed; keep it for further training, because the weights of the copy are no longer standardized,
    and its networks of `create_model` have neither stochastic depth nor dropout. On a CPU and without gradients, these
    networks pack their weights for inputs of one shape, which takes as much memory again (`PackedConv2d`).

    Args:
        model: any module. A folded model gives an equal copy.
        images: input of the model, or a tuple of all of its arguments. With images, the outputs of both models are
            compared, and batch norm is also folded in models that torch.fx cannot trace as a whole.
        standardized: further classes of convolutions with weight standardization, for example a
            `WeightStandardizedConv2d` of your own. A class is folded if it computes one convolution with a weight that
            does not depend on its input; the weight is observed, so the formula need not be known.

    Raises:
        ValueError: the model cannot be copied or run, or its outputs on the images changed by more than rounding.

    Examples:
        >>> import torch
        >>> import normfree
        >>> class Classifier(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone = normfree.create_model("nf_resnet_nano", num_classes=0)
        ...         self.head = torch.nn.Linear(self.backbone.num_features, 10)
        ...
        ...     def forward(self, images):
        ...         return self.head(self.backbone(images)).sigmoid()
        >>> model = Classifier().eval()
        >>> folded = normfree.fold(model)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(folded(images), model(images), atol=1e-5)
        True
        >>> type(folded.backbone.stem.conv0).__name__
        'PackedConv2d'
    """
    return fold_with_report(model, images, standardized=standardized).model


@torch.no_grad()
def fold_with_report(
    model: nn.Module, images: Any = None, *, standardized: Sequence[type[nn.Module]] = ()
) -> FoldedModel:
    """Fold a model as `fold` does, and report what was folded, what was left and why.

    Args:
        model: any module.
        images: input of the model, or a tuple of all of its arguments.
        standardized: further classes of convolutions with weight standardization.

    Returns:
        `(model, report)`: the folded copy, and a `FoldReport`, whose `str()` lists the layers that were left.

    Raises:
        ValueError: see `fold`.

    Examples:
        >>> import torch
        >>> import normfree
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> folded, report = normfree.fold_with_report(model, torch.randn(2, 3, 8, 8))
        >>> report.folded, report.relative_difference < 1e-6
        ({'2': 'batch norm'}, True)
        >>> report.left
        {'0': 'there is no convolution directly before it'}
    """
    if not isinstance(model, nn.Module):
        raise ValueError(problem(f"fold cannot convert {type(model).__name__}", allowed="a torch.nn.Module"))
    try:
        folded = copy.deepcopy(model).eval()
    # Modules may hold anything, for example open files or tensors of a graph.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            problem(
                f"{type(model).__name__} cannot be copied: {first}",
                fix="fold it before it is wrapped or compiled",
            )
        ) from None
    example = None if images is None else images if isinstance(images, tuple) else (images,)
    before = None if example is None else _outputs(folded, example)
    # The root may itself be a convolution that is replaced.
    holder = nn.ModuleList([folded])
    done, left = _fold_(holder, example, standardized)
    folded = holder[0]
    difference = relative = None
    if example is not None and before is not None:
        difference, relative = _compare(_outputs(folded, example), before, type(model).__name__)
    return FoldedModel(folded, FoldReport(done, left, difference, relative))


def _fold_(
    holder: nn.ModuleList, example: tuple[Any, ...] | None, classes: Sequence[type[nn.Module]]
) -> tuple[dict[str, Kind], dict[str, str]]:
    """Fold the module in `holder` in place; return what was folded, and the reasons for all that was left."""
    done: dict[str, Kind] = {}
    reasons = _untouchable(holder)
    ours = _fold_ours_(holder, reasons, done)
    left: dict[str, str] = {}
    for name, module in list(holder.named_modules()):
        if any(name.startswith(f"{inner}.") for inner in ours):
            continue
        standard = isinstance(module, WSConv2d) or is_standardized(module, classes)
        inside = any(
            is_standardized(holder.get_submodule(parent), classes) for parent in _parents(name) if parent
        )
        if not standard:
            unknown = isinstance(module, _ConvNd) and not is_plain_conv(module) and not inside
            if unknown or (looks_like_batchnorm(module) and not is_batchnorm(module)):
                left[name] = f"its class {type(module).__name__} is not known"
        elif reason := _reason(name, module, reasons):
            left[name] = reason
        else:
            try:
                plain = plain_conv(module)[0] if type(module) is WSConv2d else folded_conv(module)
            except NotFoldableError as error:
                left[name] = str(error)
            else:
                _replace_(holder, module, plain)
                done[name] = "weight standardization"
    _fold_norms_(holder, example, reasons, done, left)
    return {_shown(name): kind for name, kind in done.items()}, {_shown(k): v for k, v in left.items()}


def _fold_ours_(holder: nn.Module, reasons: dict[str, str], done: dict[str, Kind]) -> list[str]:
    """Fold networks of `create_model`, and stems and blocks of one; return their names."""
    ours: list[str] = []
    for name, module in list(holder.named_modules()):
        if type(module) not in OURS or any(name.startswith(f"{outer}.") for outer in ours):
            continue
        inside = [f"{name}.{inner}" if inner else name for inner, _ in module.named_modules()]
        if any(inner in reasons for inner in inside):
            continue
        for inner, part in module.named_modules():
            if isinstance(part, WSConv2d):
                done[f"{name}.{inner}"] = "weight standardization"
            elif is_batchnorm(part):
                done[f"{name}.{inner}"] = "batch norm"
        fold_parts_(module)
        ours.append(name)
    return ours


def _fold_norms_(
    holder: nn.ModuleList,
    example: tuple[Any, ...] | None,
    reasons: dict[str, str],
    done: dict[str, Kind],
    left: dict[str, str],
) -> None:
    """Fold batch norms in place."""
    pairs = find_pairs(holder[0], example)
    left |= {f"0.{name}" if name else "0": reason for name, reason in pairs.reasons.items()}
    for norm_name, conv_name in pairs.found.items():
        norm_name, conv_name = f"0.{norm_name}", f"0.{conv_name}"
        norm, conv = holder.get_submodule(norm_name), holder.get_submodule(conv_name)
        reason = _reason(norm_name, norm, reasons)
        if not reason and conv_name not in done and (why := _reason(conv_name, conv, reasons)):
            reason = f"{_shown(conv_name)} is left: {why}"
        if reason:
            left[norm_name] = reason
        else:
            _replace_(holder, norm, fold_norm_(conv, norm))
            done[norm_name] = "batch norm"


# --- what must not be touched ----------------------------------------------------------------------------


def _untouchable(holder: nn.Module) -> dict[str, str]:
    """Return the reasons for which modules must be left, by name."""
    owners: dict[int, list[str]] = {}
    modules = dict(holder.named_modules())
    for name, module in modules.items():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), []).append(f"{name}.{key}")
    reasons: dict[str, str] = {}
    for name, module in modules.items():
        shared = [n for t in (*module._parameters.values(), *module._buffers.values()) if t is not None
                  for n in owners[id(t)] if n.rpartition(".")[0] != name]  # fmt: skip
        if any(getattr(module, attribute, None) for attribute in _HOOKS):
            reasons[name] = "it has hooks"
        elif parametrize.is_parametrized(module):
            reasons[name] = "it is parametrized"
        elif shared:
            reasons[name] = f"it shares a tensor with {_shown(shared[0])}"
        elif "forward" in vars(module):
            reasons[name] = "its forward was replaced"
        elif isinstance(module, torch.jit.ScriptModule):
            reasons[name] = "it is scripted"
        elif isinstance(module, torch._dynamo.OptimizedModule):
            reasons[name] = "it is compiled; fold the model before torch.compile"
    return reasons


def _reason(name: str, module: nn.Module, reasons: dict[str, str]) -> str:
    """Return why a layer must be left, because of itself, a part of it or a module around it; "" if it need not."""
    inside = [f"{name}.{inner}" if inner else name for inner, _ in module.named_modules()]
    if found := next((reasons[n] for n in inside if n in reasons), ""):
        return found
    for parent in _parents(name):
        # Hooks of a module around a layer see the same tensors as before, but compiled code would not see new layers.
        if reasons.get(parent, "").startswith(("it is scripted", "it is compiled")):
            return reasons[parent]
    return ""


def _parents(name: str) -> Iterable[str]:
    """Yield the names of the modules that contain the module `name`, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _shown(name: str) -> str:
    """Return a name inside the holder as the name in the user's model."""
    return name.removeprefix("0").removeprefix(".")


def _replace_(holder: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module under all of its names."""
    for name, module in list(holder.named_modules(remove_duplicate=False)):
        if module is old:
            holder.set_submodule(name, new)


# --- comparison --------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """Return all tensors of floats in the output of a model."""
    try:
        result = model(*example)
    # A module of a user may raise anything.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            problem(
                f"{type(model).__name__} cannot be run on the images: {first}",
                fix="pass its input, or a tuple of all its arguments, as images",
            )
        ) from None
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _compare(after: list[Tensor], before: list[Tensor], name: str) -> tuple[float, float]:
    """Return the largest absolute and the relative difference of outputs; raise if it is more than rounding."""
    if not before:
        raise ValueError(
            problem(f"the output of {name} has no tensor of floats", allowed="tensors, also in dicts")
        )
    worst, gap, size = 0.0, 0.0, 0.0
    for new, old in zip(after, before, strict=True):
        off = (new.double() - old.double()).abs()
        worst = max(worst, float(off.max()) if off.numel() else 0.0)
        gap += float(off.square().sum())
        size += float(old.double().square().sum())
    relative = (gap / size) ** 0.5 if size else gap**0.5
    allowed = max(TOLERANCE.get(old.dtype.itemsize, 1e-4) for old in before)
    if not relative <= allowed:
        raise ValueError(
            problem(f"the outputs of {name} on the images changed by {relative:.1e}", allowed=f"{allowed:g}",
                    fix="report it; check that the model gives the same outputs twice")
        )  # fmt: skip
    return worst, relative
