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
from normfree.suggest import needs, unknown

# Convolutions and linear layers, by OpenVINO's names.
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")


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
    with needs("int8 for OpenVINO", install="normfree[openvino]"):
        import nncf
    size = graph.input(0).partial_shape[0]
    single = size.is_dynamic or size.get_length() == 1
    inputs = [part.numpy() for batch in batches for part in (batch.split(1) if single else [batch])]
    names = [_find(graph, name) for name in keep_float]
    with silence():
        made = nncf.quantize(
            graph, nncf.Dataset(inputs), subset_size=len(inputs),
            ignored_scope=nncf.IgnoredScope(names=names) if names else None,
        )  # fmt: skip
    save_openvino(made, path, metadata)
    layers = list(_weighted(made))
    quantized = sum(node.input_value(0).get_node().get_type_name() == "FakeQuantize" for node in layers)
    return LayerCounts(quantized, len(layers) - quantized)


def _weighted(graph: Any) -> Iterator[Any]:
    """Yield the convolutions and linear layers of a graph."""
    return (node for node in graph.get_ops() if node.get_type_name() in WEIGHTED)


def _find(graph: Any, name: str) -> str:
    """Return OpenVINO's name of the operation that was made of a node of the ONNX file: the same, or with an ending."""
    names = [str(node.get_friendly_name()) for node in _weighted(graph)]
    found = next((n for n in names if n == name or n.startswith(f"{name}/")), None)
    if found is None:
        raise ValueError(unknown("node in keep_float", name, sorted(n.partition("/")[0] for n in names)))
    return found
