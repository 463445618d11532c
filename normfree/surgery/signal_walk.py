"""Walk over a traced graph that predicts the signal at every node, and from it the constants of convolutions.

Each convolution gets the constant that brings its input to variance 1, and each sum of a short and a long path gets a
skip gain. Operations without a rule are refused by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from normfree.surgery.conversion_report import LayerChange
from normfree.surgery.standardized_conv import can_be_standardized, scales_with_weight
from normfree.surgery.trace import NotTraceableError, is_functional_batch_norm, module_of, tensor_inputs
from normfree.surgery.variance import CHANNELS, Signal, Tracker

ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SIGMOIDS = (torch.sigmoid, F.sigmoid, F.hardsigmoid, "sigmoid", "sigmoid_")
# Functions of a map whose result is not a map: sizes, and the flattened input of a classifier.
SHAPES = (getattr, "size", "dim", torch.flatten, "flatten")
AVERAGED = "average pooling: assumed to keep the variance, which holds where neighboring pixels are similar"
# Value of nodes that hold a map averaged over all positions.
POOLED = "pooled"


class SignalWalk:
    """Prediction of the signal at every node of a graph, and of the constants of a normalizer-free network.

    Args:
        model: the traced module, without batch norms.
        graph: its graph.
        alpha: the constant α that multiplies residual branches.
        norms: names of the former batch norms, which are identities now.

    Attributes:
        value: the signal of each node, POOLED, or None if the node is not a map.
        scales: input scale γβ of each convolution.
        variances: predicted average channel variance of the output of each convolution.
        branches: (sum, its operand that is a residual branch).
        gates: (product, its operand that is a gate).
        changes: changes of layers, in the order of the graph.
        kept: name -> reason of operations that differ from the assumptions.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, *, alpha: float, norms: frozenset[str]) -> None:
        self.model, self.graph, self.alpha, self.tracker = model, graph, alpha, Tracker()
        self.norms = norms
        self.value: dict[fx.Node, Signal | str | None] = {}
        self.above: dict[fx.Node, frozenset[fx.Node]] = {}
        self.scales: dict[str, float] = {}
        self.variances: dict[str, float] = {}
        self.branches: list[tuple[fx.Node, fx.Node]] = []
        self.gates: list[tuple[fx.Node, fx.Node]] = []
        self.changes: list[LayerChange] = []
        self.kept: dict[str, str] = {}

    def run(self) -> None:
        """Compute all attributes.

        Raises:
            NotTraceableError: an operation has no rule.
        """
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
                raise self._error(node, "batch norm of a tensor that is not a map")
            else:
                self.value[node] = None

    def _of_maps(self, node: fx.Node, inputs: list[fx.Node]) -> Signal | str | None:
        """Return the value of a node with at least one map among its inputs."""
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
            raise self._error(node, "batch norm is called without a module. Use torch.nn.BatchNorm2d")
        if node.target in SHAPES:
            return None
        # For example `expand_as`.
        if any(self.value[i] == POOLED for i in inputs[:1]):
            return POOLED
        return self._function(node)

    def _convolution(self, node: fx.Node, conv: _ConvNd) -> Signal:
        """Return the output of a convolution, and record its scale."""
        name, signal = str(node.target), self._map(node.args[0], node)
        if name in self.scales:
            raise self._error(node, "this convolution is called twice")
        if not can_be_standardized(conv) or not scales_with_weight(conv):
            raise self._error(node, f"{type(conv).__name__} cannot be standardized")
        out, scale = self.tracker.convolved(signal, depthwise=conv.weight.shape[1] == 1)
        self.scales[name], self.variances[name] = scale, out.within
        self.changes.append(LayerChange(name, "standardized", input_scale=scale, variance=out.within))
        return out

    def _sum(self, node: fx.Node, inputs: list[fx.Node]) -> Signal:
        """Return the sum of two maps, which ends a residual block if their depths differ, or of a map and a number."""
        if len(inputs) == 1:
            number = next((a for a in node.args if isinstance(a, int | float)), None)
            if number is None:
                return Signal(2 * self._map(inputs[0], node).samples)
            return Signal(self._map(inputs[0], node).samples + number)
        one, other = (self._map(i, node) for i in inputs)
        first, second = inputs
        depths = [self._depth(self.above[a] - self.above[b]) for a, b in ((first, second), (second, first))]
        # Two paths of equal depth have no shortcut.
        if depths[0] == depths[1]:
            return Signal(one.samples + other.samples)
        branch = first if depths[0] > depths[1] else second
        self.branches.append((node, branch))
        shortcut, added = (other, one) if branch is first else (one, other)
        out = Signal(shortcut.samples + self.alpha * added.samples)
        name = f"skip_gains.{len(self.branches) - 1}"
        self.changes.append(LayerChange(name, "skip gain", variance=out.within))
        return out

    def _product(self, node: fx.Node, inputs: list[fx.Node]) -> Signal:
        """Return the product of a map and a gate, of two maps, or of a map and a number."""
        if len(inputs) == 1:
            number = next((a for a in node.args if isinstance(a, int | float)), None)
            samples = self._map(inputs[0], node).samples
            return Signal(samples.square() if number is None else samples * number)
        gates = [i for i in inputs if self.value[i] == POOLED]
        if not gates:
            one, other = (self._map(i, node) for i in inputs)
            return Signal(one.samples * other.samples)
        (signal,) = (self._map(i, node) for i in inputs if i is not gates[0])
        if not any(self._is_sigmoid(a) for a in self.above[gates[0]] if self.value[a] == POOLED):
            raise self._error(node, "a gate without a sigmoid: its mean is not known")
        self.gates.append((node, gates[0]))
        self.changes.append(LayerChange(str(node.name), "gate doubled", variance=signal.within))
        # The mean of the sigmoid, 1/2, times 2.
        return signal

    def _module(self, node: fx.Node, module: nn.Module) -> Signal | str | None:
        """Return the output of a module without parameters."""
        if any(True for _ in module.parameters()):
            raise self._error(node, f"{type(module).__name__} has no rule")
        if isinstance(module, nn.MaxPool2d):
            return self._max_pool(node, module.kernel_size)
        return self._probed(node, module.eval(), type(module).__name__, pool=isinstance(module, nn.AvgPool2d))

    def _function(self, node: fx.Node) -> Signal | str | None:
        """Return the output of a function or method."""
        name = getattr(node.target, "__name__", str(node.target))
        others = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, fx.Node)]
        if node.target == F.max_pool2d:
            return self._max_pool(node, node.kwargs.get("kernel_size", (*node.args, 1)[1]))
        if node.target in (F.dropout, F.dropout2d):
            self.kept[str(node.name)] = f"{name} is called as a function: the traced network has no dropout"
        if name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return None
        if others or not isinstance(node.args[0], fx.Node) or node.target is operator.getitem:
            raise self._error(node, f"{name} has no rule")
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
        """Apply an operation without parameters, whose kind (elementwise, pooling, flattening) is found by a probe."""
        signal = self._map(node.args[0], node)
        probe = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        order = torch.randperm(probe.numel(), generator=torch.Generator().manual_seed(1))
        try:
            out = run(probe.clone())
            if isinstance(out, torch.Size | int):
                return None
            if not isinstance(out, Tensor):
                raise TypeError("it returns several tensors")
            if out.shape == probe.shape:
                moved = run(probe.flatten()[order].view_as(probe))
                if torch.allclose(moved.flatten(), out.flatten()[order]):
                    return Signal(
                        run(signal.samples.reshape(1, CHANNELS, -1, 1).clone()).reshape(CHANNELS, -1)
                    )
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise self._error(node, f"{name} has no rule ({reason})") from error
        if out.shape in ((2, 4, 1, 1), (2, 4)):
            return POOLED
        if out.shape == (2, 256):
            return None
        if (pool or "AdaptiveAvgPool" in name or name == "adaptive_avg_pool2d") and out.shape[:2] == (2, 4):
            self.kept[str(node.target if node.op == "call_module" else node.name)] = AVERAGED
            return signal
        raise self._error(node, f"{name} has no rule")

    def _max_pool(self, node: fx.Node, kernel_size: Any) -> Signal:
        """Return the output of max pooling."""
        side = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size, kernel_size)
        return self.tracker.largest(self._map(node.args[0], node), int(side[0]) * int(side[1]))

    # --- helpers ---

    def _map(self, node: Any, reader: fx.Node) -> Signal:
        """Return the signal of an input of `reader`."""
        signal = self.value[node] if isinstance(node, fx.Node) else None
        if not isinstance(signal, Signal):
            name = getattr(reader.target, "__name__", str(reader.target))
            raise self._error(reader, f"{name} of a map and another kind of value has no rule")
        return signal

    def _depth(self, nodes: frozenset[fx.Node]) -> int:
        """Return the number of convolutions among `nodes`."""
        return sum(str(n.target) in self.scales for n in nodes if n.op == "call_module")

    def _is_sigmoid(self, node: fx.Node) -> bool:
        """Return True if a node is a sigmoid or hard sigmoid."""
        module = module_of(self.model, node)
        # By name, because timm has its own Sigmoid and HardSigmoid classes.
        kind = type(module).__name__.lower()
        return kind in ("sigmoid", "hardsigmoid") or node.target in SIGMOIDS

    def _error(self, node: fx.Node, reason: str) -> NotTraceableError:
        """Return the error for a node without a rule."""
        where = str(node.target) if node.op == "call_module" else str(node.name)
        return NotTraceableError(f"{type(self.model).__name__}.{where}", f"{reason}.")
