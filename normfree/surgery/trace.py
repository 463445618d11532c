"""Tracing of a module to a graph of layers with torch.fx.

Convolutions with their own padding, batch norms that include an activation, and small modules without parameters are
leaves, so that the nodes of the graph are layers instead of their parts. The model is traced in evaluation mode.
"""

from __future__ import annotations

import inspect
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


class _LayerTracer(fx.Tracer):
    """Tracer with layers as leaves. `failed` is the name of the innermost module that could not be traced."""

    failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _ConvNd | _BatchNorm | nn.Linear):
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


def trace(model: nn.Module) -> fx.Graph:
    """Return the graph of `model` in evaluation mode. `model` keeps its own mode.

    Arguments of `forward` that have a default value are fixed to that value.

    Raises:
        NotTraceableError: the control flow of the model depends on the values or the type of its input.
    """
    tracer = _LayerTracer()
    defaults = {
        name: p.default
        for name, p in inspect.signature(model.forward).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    try:
        with evaluation_mode(model):
            return tracer.trace(model, concrete_args=defaults or None)
    except Exception as error:
        where = type(model).__name__ + (f".{tracer.failed}" if tracer.failed else "")
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotTraceableError(where, f"torch.fx cannot trace it ({first}).") from error


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
