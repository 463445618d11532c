"""Rewriting of a batch-norm architecture as a normalizer-free one with new random weights.

    x -> shortcut + α · skip_gain · branch(x),   every weight standardized and multiplied by γβ,   gates multiplied by 2

Source: [A] section 3; [B] section 2.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normfree.surgery.batchnorm import batchnorms, replace_, split_fused_
from normfree.surgery.conversion_report import LayerChange
from normfree.surgery.signal_walk import SignalWalk
from normfree.surgery.standardized_conv import Standardized
from normfree.surgery.trace import module_of, trace
from normfree.surgery.weight_fit import evaluate_with


class SkipGain(nn.Module):
    """x * α * skip_gain, the scale of a residual branch, with a learned number `skip_gain` of shape (1,)."""

    def __init__(self, alpha: float, skip_gain: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.full((1,), skip_gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.alpha * self.skip_gain)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load a state of earlier versions too, in which the number had no dimension."""
        saved = state.get(f"{prefix}skip_gain")
        if saved is not None and saved.ndim == 0:
            state[f"{prefix}skip_gain"] = saved.reshape(1)
        super()._load_from_state_dict(state, prefix, *others)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def rewrite(
    model: nn.Module, images: Tensor | None, *, alpha: float, skip_gain: float
) -> tuple[fx.GraphModule, list[LayerChange], dict[str, str]]:
    """Rewrite `model` as `convert_batchnorm` describes for how="scratch".

    Returns:
        The rewritten network, the changes in the order of the graph, and the layers that were kept with the reasons.

    Raises:
        NotTraceableError: the model cannot be traced, or has an operation without a rule.
    """
    work = copy.deepcopy(model)
    split_fused_(work)
    norms = batchnorms(work)
    for norm in norms.values():
        replace_(work, norm, nn.Identity())
    for module in work.modules():
        # Without the norm before it, an in-place activation could overwrite a tensor that other layers read.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    graph = trace(work)
    walk = SignalWalk(work, graph, alpha=alpha, norms=frozenset(norms))
    walk.run()
    _insert(work, graph, walk, alpha=alpha, skip_gain=skip_gain)
    for name, scale in walk.scales.items():
        work.set_submodule(name, _initialized(work.get_submodule(name), scale))
    for name, module in work.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and name.removesuffix(".conv") not in walk.scales:
            # Gates and the classifier.
            module.reset_parameters()
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    rewritten = fx.GraphModule(work, graph, class_name=type(model).__name__)
    rewritten.train(model.training)
    if images is not None:
        _calibrate_(rewritten, walk.variances, images, skip_gain=skip_gain)
    changes = [*walk.changes, *(LayerChange(name, "removed", norm=name) for name in norms)]
    return rewritten, changes, walk.kept


# --- changes of the graph -------------------------------------------------------------------------------------


def _insert(work: nn.Module, graph: fx.Graph, walk: SignalWalk, *, alpha: float, skip_gain: float) -> None:
    """Insert skip gains and doubled gates, replace in-place operations and remove identities."""
    like = next(work.parameters())
    gains = nn.ModuleList(SkipGain(alpha, skip_gain).to(like) for _ in walk.branches)
    if len(gains):
        work.add_module("skip_gains", gains)
    for i, (node, branch) in enumerate(walk.branches):
        with graph.inserting_before(node):
            scaled = graph.call_module(f"skip_gains.{i}", (branch,))
        node.replace_input_with(branch, scaled)
    for node, gate in walk.gates:
        with graph.inserting_before(node):
            doubled = graph.call_function(operator.mul, (gate, 2.0))
        node.replace_input_with(gate, doubled)
    plain: dict[Any, Any] = {
        operator.iadd: operator.add,
        operator.imul: operator.mul,
        "add_": "add",
        "mul_": "mul",
    }
    for node in list(graph.nodes):
        node.target = plain.get(node.target, node.target)
        if node.kwargs.get("inplace"):
            node.update_kwarg("inplace", False)
        if isinstance(module_of(work, node), nn.Identity):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.lint()


def _initialized(conv: nn.Module, scale: float) -> Standardized:
    """Return a standardized convolution with the initial values of `WSConv2d`: weight N(0, 1/N), gain 1, bias 0."""
    module = Standardized(conv, input_scale=scale)
    weight = module.conv.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.normal_(std=weight[0].numel() ** -0.5)
        module.gain.fill_(1.0)
        assert isinstance(module.conv.bias, Tensor)
        module.conv.bias.zero_()
    return module


@torch.no_grad()
def _calibrate_(
    model: fx.GraphModule, variances: dict[str, float], images: Tensor, *, skip_gain: float
) -> None:
    """Set each gain so that the average channel variance of the layer is the predicted one, in one forward pass.

    The branches are open (skip gain 1) during that pass.
    """
    gains = [m for m in model.modules() if isinstance(m, SkipGain)]
    for gain in gains:
        gain.skip_gain.fill_(1.0)

    def scale(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, Standardized)
        measured = output.transpose(0, 1).flatten(1).var(dim=1, correction=0).mean()
        if float(measured) > 0:
            module.gain.mul_((variances[name] / measured).sqrt())
        return module.forward(inputs[0])

    evaluate_with(model, list(variances), images, scale)
    for gain in gains:
        gain.skip_gain.fill_(skip_gain)
