"""Tracing of a module to a graph of layers with torch.fx.

Convolutions with their own padding, batch norms that include an activation, and small modules without parameters are
leaves, so that the nodes of the graph are layers instead of their parts. The model is traced in evaluation mode.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class NotTraceableError(ValueError):
    """Raised for a model that torch.fx cannot trace, or that has an operation without a rule. `where` names it."""

    def __init__(self, where: str, reason: str) -> None:
        self.where = where
        super().__init__(f"{where}: {reason}")


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as such; torch.fx records `x + y`."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._record(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._record(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._record(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._record(operator.itruediv, other)

    def _record(self, target: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})


class _LayerTracer(fx.Tracer):
    """Tracer with layers as leaves. `failed` is the name of the innermost module that could not be traced."""

    failed = ""

    def __init__(self, leaves: tuple[type[nn.Module], ...] = ()) -> None:
        super().__init__()
        self.leaves = leaves

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (_ConvNd, _BatchNorm, nn.Linear, *self.leaves)):
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        bare = not any(m.children()) and not any(True for _ in m.parameters())
        return bare and _takes_one_tensor(m)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Switch models to evaluation mode, and restore the mode of each module on exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trace(model: nn.Module, *, leaves: tuple[type[nn.Module], ...] = ()) -> fx.Graph:
    """Return the graph of `model` in evaluation mode. `model` keeps its own mode.

    Arguments of `forward` that have a default value are fixed to that value. Modules of the types `leaves` are leaves
    too.

    Raises:
        NotTraceableError: the control flow of the model depends on the values or the type of its input.
    """
    tracer, defaults = _LayerTracer(leaves), _defaults(model)
    try:
        with evaluation_mode(model):
            return tracer.trace(model, concrete_args=defaults or None)
    except Exception as error:
        where = type(model).__name__ + (f".{tracer.failed}" if tracer.failed else "")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotTraceableError(where, f"torch.fx cannot trace it ({first}).") from error


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of `forward` that have a default value."""
    parameters = inspect.signature(model.forward).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def traced_parts(
    model: nn.Module, *, whole: bool = True, leaves: tuple[type[nn.Module], ...] = ()
) -> dict[str, fx.Graph]:
    """Return the graphs of the largest parts of `model` that can be traced, by the names of the parts.

    A model that can be traced is one part, named "". A smaller part is used only if its `forward` has no argument with
    a default value (`whole` is False), since its callers may pass another one.
    """
    if whole or not _defaults(model):
        try:
            return {"": trace(model, leaves=leaves)}
        except NotTraceableError:
            pass
    parts: dict[str, fx.Graph] = {}
    for name, child in model.named_children():
        if any(child.children()):
            inner = traced_parts(child, whole=False, leaves=leaves)
            parts |= {f"{name}.{below}".rstrip("."): graph for below, graph in inner.items()}
    return parts


def module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls, or None if it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the input nodes of a node, without duplicates, in order."""
    return list(dict.fromkeys(node.all_input_nodes))


def convolutions(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the convolutions that are called once, in two lists.

    Returns:
        Those that read maps, and those after a global pooling, which are part of a gate or of the head.

    Raises:
        NotTraceableError: see `trace`.
    """
    graph, pooled = trace(model), set[fx.Node]()
    maps: dict[bool, list[str]] = {False: [], True: []}
    calls = Counter(id(module_of(model, node)) for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        inputs, module = tensor_inputs(node), module_of(model, node)
        if _pools_globally(node, module) or (inputs and pooled.issuperset(inputs)):
            pooled.add(node)
        if isinstance(module, _ConvNd) and calls[id(module)] == 1:
            maps[node in pooled].append(str(node.target))
    return maps[False], maps[True]


def _pools_globally(node: fx.Node, module: nn.Module | None) -> bool:
    """Return True if a node averages a map over all positions."""
    if module is not None and not any(True for _ in module.parameters()):
        try:
            out = module(torch.zeros(2, 3, 4, 5))
        # The module does not take a map.
        except Exception:
            return False
        return isinstance(out, torch.Tensor) and out.shape in ((2, 3), (2, 3, 1, 1))
    over: Any = (*node.args[1:2], *node.kwargs.values(), None)[0]
    if node.target == "mean":
        return isinstance(over, tuple | list) and sorted(d % 4 for d in over) == [2, 3]
    return node.target is torch.nn.functional.adaptive_avg_pool2d and over in (1, (1, 1), [1, 1])


def _takes_one_tensor(module: nn.Module) -> bool:
    """Return True if `forward` has exactly one required argument."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is inspect.Parameter.empty]
    return len(needed) == 1 and needed[0].kind is not inspect.Parameter.VAR_POSITIONAL


def is_functional_batch_norm(node: fx.Node) -> bool:
    """Return True if a node calls batch norm as a function, without a module that holds the statistics."""
    return node.op == "call_function" and node.target in (torch.nn.functional.batch_norm, torch.batch_norm)
