"""The architecture of a batch-norm network as a normalizer-free one, with fresh weights ([A] section 3; [B] section 2).

    x -> shortcut + α · skip_gain · branch(x),   every kernel standardized and carrying γβ,   gates times 2

The traced graph is walked once: each node gets a `Signal`, each convolution the constant that brings what it reads to
variance 1, each sum of a short and a long path a skip gain. What there is no rule for is refused by name.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normfree.surgery.batchnorm import batchnorms, replace_, split_fused_
from normfree.surgery.conversion_report import LayerChange
from normfree.surgery.trace import (
    NotTraceableError,
    is_functional_batch_norm,
    module_of,
    tensor_inputs,
    trace,
)
from normfree.surgery.variance import CHANNELS, Signal, Tracker
from normfree.surgery.weight_standardization import (
    Standardized,
    can_be_standardized,
    evaluate_with,
    scales_with_weight,
)

ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SIGMOIDS = (torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_")
POOLS = (F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d)
#: Reads of a map that give no map: sizes, and the flat form of a head.
SHAPES = (getattr, "size", "dim", torch.flatten, "flatten")
AVERAGED = "average pooling: the variance is taken as kept, which holds where neighbours are alike"
#: What a tensor becomes when it is no map any more: averaged over all places.
POOLED = "pooled"


class SkipGain(nn.Module):
    """x * α * skip_gain: what a residual branch is multiplied by before it joins the shortcut."""

    def __init__(self, alpha: float, skip_gain: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.skip_gain = nn.Parameter(torch.full((), skip_gain))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.alpha * self.skip_gain)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def rewrite(
    model: nn.Module, images: Tensor | None, *, alpha: float, skip_gain: float
) -> tuple[fx.GraphModule, list[LayerChange], dict[str, str]]:
    """See `convert_batchnorm`, how="scratch". Also returns what changed, in the graph's order, and what did not.

    Raises:
        NotTraceableError: the graph cannot be traced, or has an operation without a rule.
    """
    work = copy.deepcopy(model)
    split_fused_(work)
    norms = batchnorms(work)
    for norm in norms.values():
        replace_(work, norm, nn.Identity())
    for module in work.modules():
        if getattr(module, "inplace", False) is True:  # a norm stood between it and a tensor that others read
            module.inplace = False  # type: ignore[assignment]
    graph = trace(work)
    walk = _Walk(work, graph, alpha=alpha, norms=frozenset(norms))
    walk.run()
    _insert(work, graph, walk, alpha=alpha, skip_gain=skip_gain)
    for name, scale in walk.scales.items():
        work.set_submodule(name, _fresh(work.get_submodule(name), scale))
    for name, module in work.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and name.removesuffix(".conv") not in walk.scales:
            module.reset_parameters()  # gates and the classifier
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    rewritten = fx.GraphModule(work, graph, class_name=type(model).__name__)
    rewritten.train(model.training)
    if images is not None:
        _calibrate_(rewritten, walk.variances, images, skip_gain=skip_gain)
    changes = [*walk.changes, *(LayerChange(name, "removed", norm=name) for name in norms)]
    return rewritten, changes, walk.kept


# --- walking the graph -------------------------------------------------------------------------------


class _Walk:
    """Gives every node a value: a Signal, POOLED, or None for whatever is no map."""

    def __init__(self, model: nn.Module, graph: fx.Graph, *, alpha: float, norms: frozenset[str]) -> None:
        self.model, self.graph, self.alpha, self.tracker = model, graph, alpha, Tracker()
        self.norms = norms  # their names; identities stand there now
        self.value: dict[fx.Node, Signal | str | None] = {}
        self.above: dict[fx.Node, frozenset[fx.Node]] = {}
        self.scales: dict[str, float] = {}
        self.variances: dict[str, float] = {}
        self.branches: list[tuple[fx.Node, fx.Node]] = []
        self.gates: list[tuple[fx.Node, fx.Node]] = []
        self.changes: list[LayerChange] = []
        self.kept: dict[str, str] = {}

    def run(self) -> None:
        images = next(node for node in self.graph.nodes if node.op == "placeholder")
        for node in self.graph.nodes:
            inputs = tensor_inputs(node)
            self.above[node] = frozenset([node]).union(*(self.above[i] for i in inputs))
            if node is images:
                self.value[node] = self.tracker.normal()
            elif any(isinstance(self.value[i], Signal) for i in inputs) and node.op != "output":
                self.value[node] = self._of_maps(node, inputs)
            elif any(self.value[i] == POOLED for i in inputs):
                self.value[node] = POOLED
            elif node.op == "call_module" and str(node.target) in self.norms:
                raise self._refusal(node, "batch norm of something that is no map")
            else:
                self.value[node] = None

    def _of_maps(self, node: fx.Node, inputs: list[fx.Node]) -> Signal | str | None:
        module = module_of(self.model, node)
        if isinstance(module, _ConvNd):
            return self._convolution(node, module)
        if module is not None:
            return self._module(node, module)
        if node.target in ADD:
            return self._sum(node, inputs)
        if node.target in MULTIPLY:
            return self._product(node, inputs)
        if is_functional_batch_norm(node):
            raise self._refusal(node, "batch norm outside of a module. Use torch.nn.BatchNorm2d")
        if node.target in SHAPES:
            return None
        if any(self.value[i] == POOLED for i in inputs[:1]):  # expand_as, and the like
            return POOLED
        return self._function(node)

    def _convolution(self, node: fx.Node, conv: _ConvNd) -> Signal:
        name, signal = str(node.target), self._map(node.args[0], node)
        if name in self.scales:
            raise self._refusal(node, "this convolution is called twice")
        if not can_be_standardized(conv) or not scales_with_weight(conv):
            raise self._refusal(node, f"{type(conv).__name__} cannot be standardized")
        out, scale = self.tracker.convolved(signal, depthwise=conv.weight.shape[1] == 1)
        self.scales[name], self.variances[name] = scale, out.within
        self.changes.append(LayerChange(name, "standardized", input_scale=scale, variance=out.within))
        return out

    def _sum(self, node: fx.Node, inputs: list[fx.Node]) -> Signal:
        if len(inputs) == 1:
            number = next((a for a in node.args if isinstance(a, int | float)), None)
            if number is None:
                return Signal(2 * self._map(inputs[0], node).draws)
            return Signal(self._map(inputs[0], node).draws + number)
        one, other = (self._map(i, node) for i in inputs)
        first, second = inputs
        depths = [self._depth(self.above[a] - self.above[b]) for a, b in ((first, second), (second, first))]
        if depths[0] == depths[1]:  # two paths of one length: nobody's shortcut
            return Signal(one.draws + other.draws)
        branch = first if depths[0] > depths[1] else second
        self.branches.append((node, branch))
        shortcut, added = (other, one) if branch is first else (one, other)
        out = Signal(shortcut.draws + self.alpha * added.draws)
        name = f"skip_gains.{len(self.branches) - 1}"
        self.changes.append(LayerChange(name, "skip gain", variance=out.within))
        return out

    def _product(self, node: fx.Node, inputs: list[fx.Node]) -> Signal:
        if len(inputs) == 1:
            number = next((a for a in node.args if isinstance(a, int | float)), None)
            draws = self._map(inputs[0], node).draws
            return Signal(draws.square() if number is None else draws * number)
        gates = [i for i in inputs if self.value[i] == POOLED]
        if not gates:
            one, other = (self._map(i, node) for i in inputs)
            return Signal(one.draws * other.draws)
        (signal,) = (self._map(i, node) for i in inputs if i is not gates[0])
        if not any(self._is_sigmoid(a) for a in self.above[gates[0]] if self.value[a] == POOLED):
            raise self._refusal(node, "a gate without a sigmoid: what it multiplies by is not known")
        self.gates.append((node, gates[0]))
        self.changes.append(LayerChange(str(node.name), "gate doubled", variance=signal.within))
        return signal  # E[sigmoid] is 1/2, times 2

    def _module(self, node: fx.Node, module: nn.Module) -> Signal | str | None:
        if any(True for _ in module.parameters()):
            raise self._refusal(node, f"{type(module).__name__} has no rule")
        if isinstance(module, nn.MaxPool2d):
            return self._max_pool(node, module.kernel_size)
        return self._probed(node, module.eval(), type(module).__name__, pool=isinstance(module, nn.AvgPool2d))

    def _function(self, node: fx.Node) -> Signal | str | None:
        name = getattr(node.target, "__name__", str(node.target))
        others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
        if node.target == F.max_pool2d:
            return self._max_pool(node, node.kwargs.get("kernel_size", (*node.args, 1)[1]))
        if node.target in (F.dropout, F.dropout2d):
            self.kept[str(node.name)] = f"{name} is called as a function: the traced network does not drop"
        if name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return None
        if others or not isinstance(node.args[0], fx.Node) or node.target is operator.getitem:
            raise self._refusal(node, f"{name} has no rule")
        rest, options = node.args[1:], {k: v for k, v in node.kwargs.items() if k != "inplace"}

        def run(x: Tensor) -> Any:
            if node.op == "call_method":
                return getattr(x, str(node.target))(*rest, **options)
            assert callable(node.target)
            return node.target(x, *rest, **options)

        return self._probed(node, run, name, pool=node.target is F.avg_pool2d)

    def _probed(
        self, node: fx.Node, run: Callable[[Tensor], Any], name: str, *, pool: bool
    ) -> Signal | str | None:
        """What an operation without parameters does, found by trying it: element by element, pooling, flattening."""
        signal = self._map(node.args[0], node)
        probe = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        order = torch.randperm(probe.numel(), generator=torch.Generator().manual_seed(1))
        try:
            out = run(probe.clone())
            if isinstance(out, torch.Size | int):
                return None
            if not isinstance(out, Tensor):
                raise TypeError("it gives several maps")
            if out.shape == probe.shape:
                moved = run(probe.flatten()[order].view_as(probe))
                if torch.allclose(moved.flatten(), out.flatten()[order]):
                    return Signal(run(signal.draws.reshape(1, CHANNELS, -1, 1).clone()).reshape(CHANNELS, -1))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise self._refusal(node, f"{name} has no rule ({reason})") from error
        if out.shape in ((2, 4, 1, 1), (2, 4)):
            return POOLED
        if out.shape == (2, 256):
            return None
        if (pool or "AdaptiveAvgPool" in name or name == "adaptive_avg_pool2d") and out.shape[:2] == (2, 4):
            self.kept[str(node.target if node.op == "call_module" else node.name)] = AVERAGED
            return signal
        raise self._refusal(node, f"{name} has no rule")

    def _max_pool(self, node: fx.Node, kernel_size: Any) -> Signal:
        side = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size, kernel_size)
        return self.tracker.largest(self._map(node.args[0], node), int(side[0]) * int(side[1]))

    # --- small questions ---

    def _map(self, node: Any, reader: fx.Node) -> Signal:
        signal = self.value[node] if isinstance(node, fx.Node) else None
        if not isinstance(signal, Signal):
            name = getattr(reader.target, "__name__", str(reader.target))
            raise self._refusal(reader, f"{name} of a map and of something else has no rule")
        return signal

    def _depth(self, nodes: frozenset[fx.Node]) -> int:
        return sum(str(n.target) in self.scales for n in nodes if n.op == "call_module")

    def _is_sigmoid(self, node: fx.Node) -> bool:
        module = module_of(self.model, node)
        kind = type(module).__name__.lower()  # timm's Sigmoid and HardSigmoid are classes of their own
        return kind in ("sigmoid", "hardsigmoid") or node.target in SIGMOIDS

    def _refusal(self, node: fx.Node, reason: str) -> NotTraceableError:
        place = str(node.target) if node.op == "call_module" else str(node.name)
        return NotTraceableError(f"{type(self.model).__name__}.{place}", f"{reason}.")


# --- changing it -------------------------------------------------------------------------------------


def _insert(work: nn.Module, graph: fx.Graph, walk: _Walk, *, alpha: float, skip_gain: float) -> None:
    """Skip gains before sums, doubled gates, and nothing in place; identities leave the graph."""
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


def _fresh(conv: nn.Module, scale: float) -> Standardized:
    """Initial values of `WSConv2d`: weight N(0, 1/N), gain 1, bias 0."""
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
def _calibrate_(model: fx.GraphModule, wanted: dict[str, float], images: Tensor, *, skip_gain: float) -> None:
    """One pass with open branches: each gain so that the layer's average channel variance is the predicted one."""
    gains = [m for m in model.modules() if isinstance(m, SkipGain)]
    for gain in gains:
        gain.skip_gain.fill_(1.0)

    def scale(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(module, Standardized)
        measured = output.transpose(0, 1).flatten(1).var(dim=1, correction=0).mean()
        if float(measured) > 0:
            module.gain.mul_((wanted[name] / measured).sqrt())
        return module.forward(inputs[0])

    evaluate_with(model, list(wanted), images, scale)
    for gain in gains:
        gain.skip_gain.fill_(skip_gain)
