"""Removal of operations in place from a network, so that hooks and functional transforms can read every tensor.

Opacus, attribution and full backward hooks keep the inputs and outputs of modules. An operation in place changes what
they hold, or raises an error because the tensor that they return is a view.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from normfree.surgery.batchnorm import Copying, ScaleShift, replace_
from normfree.surgery.standardized_conv import Standardized
from normfree.surgery.trace import module_of, tensor_inputs, traced_parts

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


def remove_in_place_(model: nn.Module) -> None:
    """Make modules that work in place do so no longer, and copy before operations in place on the output of a module.

    Copies are made by modules without parameters and by `ScaleShift`, which are what stands before such an operation
    where a norm was. Operations in place in code that torch.fx cannot trace remain.
    """
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for name, graph in traced_parts(model, leaves=(ScaleShift, Standardized)).items():
        part = model.get_submodule(name)
        for node in graph.nodes:
            if not changes_its_input(node):
                continue
            before = module_of(part, tensor_inputs(node)[0])
            if isinstance(before, ScaleShift):
                before.copies = True
            elif before is not None and not isinstance(before, Copying) and not any(before.parameters()):
                replace_(model, before, Copying(before))


def changes_its_input(node: fx.Node) -> bool:
    """Return True if a node changes its first input in place."""
    if not tensor_inputs(node):
        return False
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _IN_PLACE or node.kwargs.get("inplace") is True:
        return True
    return getattr(node.target, "__name__", "").endswith("_")
