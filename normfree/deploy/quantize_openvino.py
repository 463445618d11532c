"""Quantization of an OpenVINO graph to 8 bits, by NNCF, OpenVINO's own tool.

NNCF knows which operations OpenVINO computes in 8 bits, and keeps their results in 8 bits where that is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from normfree.deploy.graph_writers import silence
from normfree.deploy.openvino_writer import read_onnx_graph, save_openvino
from normfree.suggest import needs, problem

# Convolutions and linear layers, by OpenVINO's names, and what may follow one: bias, factor, the end of the graph.
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
AFTER_WEIGHTED = ("Add", "Multiply", "Result")


class LayerCounts(NamedTuple):
    """How many convolutions and linear layers compute in 8 bits, and how many stay in float."""

    quantized: int
    left_float: int


def quantize_openvino(
    onnx_path: Path, path: Path, batches: Sequence[Tensor], *, keep_float: Sequence[str], metadata: str
) -> LayerCounts:
    """Write the 8-bit version of an ONNX file for OpenVINO.

    Args:
        onnx_path: the float network.
        path: the .xml file to write.
        batches: inputs to calibrate on, B ....
        keep_float: ONNX names of nodes that stay in float.
        metadata: text that the file keeps.

    Raises:
        ValueError: OpenVINO has joined a node of `keep_float` with others.
        ModuleNotFoundError: openvino or nncf is not installed.
    """
    # Not of the file: of an ONNX graph whose SiLU is a sigmoid and a product, NNCF 3.4 makes one whose outputs are 0.
    # `convert_model` makes an operation of it.
    graph = read_onnx_graph(onnx_path)
    names = [_find(graph, *node) for node in _outputs(onnx_path, keep_float)]
    with needs("int8 for OpenVINO", install="normfree[openvino]"):
        import nncf
    # Single images where the file accepts them: NNCF keeps statistics for each input, and `subset_size` counts inputs.
    size = graph.input(0).partial_shape[0]
    single = size.is_dynamic or size.get_length() == 1
    inputs = [part.numpy() for batch in batches for part in (batch.split(1) if single else [batch])]
    with silence():
        made = nncf.quantize(
            graph, nncf.Dataset(inputs), subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
        )  # fmt: skip
    save_openvino(made, path, metadata)
    in_8_bits = [_in_8_bits(node) for node in made.get_ops() if node.get_type_name() in WEIGHTED]
    return LayerCounts(in_8_bits.count(True), in_8_bits.count(False))


def _outputs(onnx_path: Path, nodes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of nodes of an ONNX file, with the names of their outputs."""
    import onnx

    of_node = {node.name: node.output[0] for node in onnx.load_model(onnx_path).graph.node}
    return ((name, of_node[name]) for name in nodes)


def _find(graph: Any, name: str, output: str) -> str:
    """Return OpenVINO's name of the layer that was made of the ONNX node `name`.

    It has that name, perhaps with an ending, or else its output has the name of the node's output.
    """
    layers = [str(node.get_friendly_name()) for node in graph.get_ops() if node.get_type_name() in WEIGHTED]
    named = [layer for layer in layers if layer == name or layer.startswith(f"{name}/")]
    if named:
        return min(named, key=len)
    found = next(
        (node for node in graph.get_ops() for out in node.outputs() if output in out.get_names()), None
    )
    while found is not None and found.get_type_name() in AFTER_WEIGHTED:
        found = found.input_value(0).get_node()
    if found is None or found.get_type_name() not in WEIGHTED:
        raise ValueError(
            problem(
                f"keep_float has {name!r}, which OpenVINO joins with other operations",
                allowed="layers that OpenVINO computes alone",
                fix="leave it out of keep_float, or write an .onnx file",
            )
        )
    return str(found.get_friendly_name())


def _in_8_bits(layer: Any) -> bool | None:
    """Return whether the weight of a layer of a quantized graph has 8 bits; None for a product of two inputs."""
    node = layer.input_value(1).get_node()
    while node.get_input_size() and node.get_type_name() != "FakeQuantize":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Parameter":
        return None
    return node.get_type_name() == "FakeQuantize" or node.get_output_element_type(0).get_size() == 1
