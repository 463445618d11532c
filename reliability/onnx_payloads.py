"""Hostile ONNX files."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from reliability.payloads import Payload, Site

TB4 = 1 << 42


def graph(
    nodes: Callable[[Any], list[Any]],
    *,
    outside: str = "",
    change: Callable[[Any], object] = lambda model: None,
    weights: Callable[[Any], list[Any]] = lambda helper: [],
) -> Payload:
    """Return a payload: a model of nodes from "x" to "y", with weights, of which the first is in a file outside."""

    def write(site: Site) -> None:
        from onnx import TensorProto, helper, save

        x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
        stored = weights(helper)
        if outside:
            entry = stored[0].external_data.add()
            entry.key, entry.value = "location", outside.format(site.outside)
            stored[0].data_location = TensorProto.EXTERNAL
            stored[0].ClearField("float_data")
        made = helper.make_graph(nodes(helper), "g", [x], [y], stored)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        change(model)
        save(model, site.target)
        if outside.startswith("link"):
            os.symlink(site.outside / "secret", site.target.parent / outside)

    return write


def adds(helper: Any) -> list[Any]:
    """Return nodes that add a weight."""
    return [helper.make_node("Add", ["x", "w"], ["y"])]


def weight(helper: Any) -> list[Any]:
    """Return one weight of three numbers."""
    return [helper.make_tensor("w", 1, [3], [1.0, 2.0, 3.0])]


def large_weight(*sizes: int) -> Callable[[Any], list[Any]]:
    """Return a function that makes a weight whose shape is larger than its data."""

    def make(helper: Any) -> list[Any]:
        made = weight(helper)[0]
        made.ClearField("dims")
        made.dims.extend(sizes)
        return [made]

    return make


def constant(*sizes: int) -> Callable[[Any], list[Any]]:
    """Return a function that makes nodes with a constant of that shape."""

    def make(helper: Any) -> list[Any]:
        shape = helper.make_tensor("s", 7, [len(sizes)], sizes)
        return [
            helper.make_node("Constant", [], ["s"], value=shape),
            helper.make_node("ConstantOfShape", ["s"], ["c"]),
            helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ]

    return make


def unknown_operator(helper: Any) -> list[Any]:
    """Return a node of an operator that only others have."""
    return [helper.make_node("Run", ["x"], ["y"], domain="com.example", command="touch ran")]


def cycle(helper: Any) -> list[Any]:
    """Return nodes that wait for each other."""
    return [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Add", ["a", "x"], ["b"]),
            helper.make_node("Identity", ["b"], ["y"])]  # fmt: skip


def cut(site: Site) -> None:
    """Write the first half of a model."""
    graph(adds, weights=weight)(site)
    data = site.target.read_bytes()
    site.target.write_bytes(data[: len(data) // 2])


ONNX: dict[str, Payload] = {
    "weights above the folder": graph(adds, weights=weight, outside="../outside/secret"),
    "weights at an absolute path": graph(adds, weights=weight, outside="{}/secret"),
    "weights behind a link": graph(adds, weights=weight, outside="link"),
    "weights of a device": graph(adds, weights=weight, outside="/dev/zero"),
    "weights that are missing": graph(adds, weights=weight, outside="nowhere"),
    "weights in the folder itself": graph(adds, weights=weight, outside="."),
    "constant of 4 TB": graph(constant(TB4)),
    "constant of a negative size": graph(constant(-5)),
    "weight of 4 TB without data": graph(adds, weights=large_weight(TB4)),
    "weight of a negative size": graph(adds, weights=large_weight(-3)),
    "unknown operator": graph(unknown_operator),
    "a cycle": graph(cycle),
    "no nodes": graph(lambda helper: []),
    "two inputs": graph(adds, change=lambda model: model.graph.input.add(name="w")),
    "unknown version": graph(adds, weights=weight, change=lambda model: setattr(model, "ir_version", 999)),
    "unknown opset": graph(
        adds, weights=weight, change=lambda model: setattr(model.opset_import[0], "version", 999)
    ),
    "cut in two": cut,
}
