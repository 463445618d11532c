"""Writer of OpenVINO files: the graph and metadata in an .xml file, the weights in a .bin file next to it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from normfree.deploy.graph_writers import silence
from normfree.exported_net import METADATA_KEY
from normfree.openvino_net import openvino


def write_openvino(onnx_path: Path, path: Path, metadata: str) -> Counter[str]:
    """Convert an ONNX file to OpenVINO with float32 weights; return the number of nodes by kind.

    Raises:
        ModuleNotFoundError: openvino is not installed.
    """
    model = read_onnx_graph(onnx_path)
    save_openvino(model, path, metadata)
    kinds = (node.get_type_name() for node in model.get_ops())
    return Counter(kind for kind in kinds if kind not in ("Constant", "Parameter", "Result"))


def read_onnx_graph(path: Path) -> Any:
    """Return the OpenVINO graph of an ONNX file.

    Raises:
        ModuleNotFoundError: openvino is not installed.
    """
    runtime = openvino()
    with silence():
        return runtime.convert_model(path)


def save_openvino(model: Any, path: Path, metadata: str) -> None:
    """Write a graph with metadata; its weights keep their types."""
    model.set_rt_info(metadata, [METADATA_KEY])
    openvino().save_model(model, path, compress_to_fp16=False)


def write_two_files(target: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary path that ends like `target`, then move both files to `target`.

    If anything fails, existing files stay as they were. The weights are moved first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        temporary = Path(folder) / target.name
        write(temporary)
        temporary.with_suffix(".bin").replace(target.with_suffix(".bin"))
        temporary.replace(target)
