"""Find the classifier of any network: the layer that AGC leaves alone ([B] section 4.1)."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from normfree.suggest import problem


def find_classifier(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that compute the logits: usually one, two for distilled networks.

    If a model has timm's `get_classifier()`, they are the linear layers at the end of what it returns, and none if that
    is `nn.Identity`. Otherwise torch.fx shows which layers feed the output, without running them: a layer does if there
    are only operations without parameters between it and the output, such as pooling or softmax. If they are linear
    (`nn.Linear`, or a convolution with filters of size 1), they are the classifier; else the network has none. Of
    several outputs the first counts. The search continues in submodules, so a wrapper makes no difference.

    Raises:
        ValueError: there is no `get_classifier()`, and torch.fx cannot trace the model.

    Examples:
        >>> from torch import nn
        >>> find_classifier(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1)))
        ['2']
    """
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in _search(model)]


def logits_layers(head: nn.Module) -> list[nn.Module]:
    """Return the linear layers at the end of a head, of each module in a list; the head itself if it has none."""
    if isinstance(head, nn.ModuleList):
        return [layer for part in head for layer in logits_layers(part)]
    try:
        found = _search(head)
    except ValueError:
        found = []
    return found or [next((m for m in reversed(list(head.modules())) if _is_linear(m)), head)]


def _search(model: nn.Module) -> list[nn.Module]:
    """Return the layers of the classifier."""
    if _is_linear(model):
        return [model]
    getter = getattr(model, "get_classifier", None)
    if callable(getter):
        found = getter()
        heads = found if isinstance(found, tuple | list) else [found]
        heads = [head for head in heads if isinstance(head, nn.Module) and _has_parameters(head)]
        return [layer for head in heads for layer in logits_layers(head)]
    children = [child for child in model.children() if _has_parameters(child)]
    own = any(True for _ in model.parameters(recurse=False))
    if len(children) == 1 and not own:  # also finds the network in a wrapper of torch.nn, such as DDP's
        return _search(children[0])
    if not children or (
        type(model).__module__.startswith("torch.nn.") and not isinstance(model, nn.Sequential)
    ):
        return []
    graph = _trace(model)
    output = None if graph is None else _first(next(iter(graph.find_nodes(op="output"))).args[0])
    if output is None:
        raise ValueError(
            problem(
                f"the classifier of a {type(model).__name__} was not found, since torch.fx cannot trace it",
                allowed="a model with get_classifier(), or one that torch.fx can trace",
                fix="name it, with parameter_groups(model, classifier='head') or attach_agc(..., exempt='head.weight')"
                "; () if there is none",
            )
        )
    return list({id(layer): layer for layer in _feeding(output, model, {})}.values())


def _feeding(node: fx.Node, model: nn.Module, known: dict[fx.Node, list[nn.Module]]) -> list[nn.Module]:
    """Return the linear layers from which `node` is computed without other parameters, or [] if there are others."""
    if node in known:
        return known[node]
    known[node] = []
    if node.op == "call_module":
        module = model.get_submodule(str(node.target).removeprefix("module."))
        if _has_parameters(module):
            known[node] = _search(module)
            return known[node]
    inputs = [n for n in node.all_input_nodes if not _is_shape(n)]
    parts = [_feeding(n, model, known) for n in inputs]
    if parts and all(parts):  # a sum with a residual, for example, has an input that no linear layer computed
        layers = [layer for part in parts for layer in part]
        # The heads of a distilled network are alike; a branch, its shortcut and its gate are not.
        known[node] = layers if len({layer.weight.shape for layer in layers}) == 1 else []
    return known[node]


def _is_shape(node: fx.Node) -> bool:
    """Return True if the value of a node is a number or a shape that is read from a tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op != "call_function" or not node.args:
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    inputs = node.all_input_nodes
    return bool(inputs) and all(map(_is_shape, inputs))


def _first(value: Any) -> fx.Node | None:
    """Return the first node in nested tuples, lists and dictionaries: a network's main output comes first."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((node for item in value if (node := _first(item)) is not None), None)
    return value if isinstance(value, fx.Node) else None


class _Call(nn.Module):
    """Calls the `forward` of a module, without its hooks, with the same value for each required argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        parameters = inspect.signature(module.forward).parameters.values()
        required = [p for p in parameters if p.default is p.empty]
        self.positional = max(
            1, sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
        )
        self.keywords = [p.name for p in required if p.kind is p.KEYWORD_ONLY]

    def forward(self, x: Any) -> Any:
        return self.module.forward(*[x] * self.positional, **dict.fromkeys(self.keywords, x))


class _Shallow(fx.Tracer):
    """Traces the `forward` of one module, whose children are single nodes of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(model: nn.Module) -> fx.Graph | None:
    """Trace the `forward` of a module in evaluation mode, or return None if that is impossible."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        return _Shallow().trace(_Call(model))
    except Exception:  # of the model's code, which was not written for symbolic values
        return None
    finally:
        for module, mode in modes:
            module.training = mode


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, _ConvNd):
        return not isinstance(module, _ConvTransposeNd) and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)
