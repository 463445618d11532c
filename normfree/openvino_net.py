"""Runs an exported OpenVINO file behind an `nn.Module` interface.

An OpenVINO model is two files: `model.xml`, the graph with the metadata, and `model.bin`, the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.exported_net import METADATA_KEY, ExportedNet, Shape, check_metadata, first_line
from normfree.suggest import needs, problem, unknown

# Types of the computation on a CPU. OpenVINO itself would choose bfloat16 on CPUs with instructions for it, which
# changes logits by 1 %.
_XML_BYTES = 100_000_000  # of a graph; our largest network has 2 MB
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVinoNet(ExportedNet):
    """A network whose forward pass runs in OpenVINO on the CPU, see `ExportedNet`."""

    def __init__(self, compiled: Any, *, name: str) -> None:
        shapes = [_fixed(port.partial_shape) for port in (compiled.input(0), compiled.output(0))]
        super().__init__(name=name, input_shape=shapes[0], output_shape=shapes[1])
        self.request = compiled.create_infer_request()

    def run(self, images: Tensor) -> list[Tensor]:
        """Return all outputs for an input on the CPU."""
        results = self.request.infer({0: images.numpy()}, share_inputs=True)
        # The memory of the results belongs to the request, and the next call overwrites it.
        return [torch.from_numpy(results[i].copy()) for i in range(len(results))]


def open_openvino(path: str | Path, *, precision: str = "float32") -> tuple[OpenVinoNet, dict[str, Any]]:
    """Open an OpenVINO file that `export` wrote. It uses as many threads as PyTorch does at the time of this call.

    Args:
        path: the .xml file; the .bin file with the weights must be next to it.
        precision: type of the computation: "float32", or "bfloat16" or "float16" where the CPU has instructions for it.

    Returns:
        The network and its metadata, a dict with the keys `METADATA_FIELDS`.

    Raises:
        ValueError: the file does not exist, is not an OpenVINO file or was not written by `export`.
        ModuleNotFoundError: openvino is not installed.
    """
    path = Path(path)
    model = read_openvino(path)
    inputs, outputs = (
        {_name(port): _fixed(port.partial_shape) for port in ports} for ports in (model.inputs, model.outputs)
    )
    text = model.get_rt_info([METADATA_KEY]).astype(str) if model.has_rt_info([METADATA_KEY]) else None
    metadata = check_metadata(text, path, inputs=inputs, outputs=outputs)
    return OpenVinoNet(compile_openvino(model, precision=precision), name=str(metadata["row"])), metadata


def openvino() -> Any:
    """Import openvino.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with needs("an OpenVINO file", install="normfree[openvino]"):
        import openvino as module
    return module


def read_openvino(path: Path) -> Any:
    """Return the graph of an OpenVINO file.

    Raises:
        ValueError: it cannot be read, or its weights are missing.
        ModuleNotFoundError: openvino is not installed.
    """
    runtime = openvino()
    weights = path.with_suffix(".bin")
    for file in (path, weights):
        if not file.is_file():
            raise ValueError(
                problem(
                    f"{str(file)!r} does not exist", allowed="the .xml and .bin files of `normfree export`"
                )
            )
    if path.stat().st_size > _XML_BYTES:
        given = f"{path} has {path.stat().st_size:,} bytes"
        raise ValueError(
            problem(given, allowed=f"a graph of at most {_XML_BYTES:,}; the weights are in the .bin file")
        )
    try:
        return runtime.Core().read_model(path, weights)
    # The exceptions of openvino are RuntimeErrors and others.
    except Exception as error:
        raise ValueError(f"{path} is not an OpenVINO file or is damaged: {_reason(error)}") from None


def compile_openvino(model: Any, *, precision: str = "float32") -> Any:
    """Compile a graph for this CPU.

    Raises:
        ValueError: the precision is unknown, or openvino cannot compile the graph.
    """
    if precision not in PRECISIONS:
        raise ValueError(unknown("precision", precision, PRECISIONS))
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
    }
    try:
        return openvino().Core().compile_model(model, "CPU", options)
    except Exception as error:
        raise ValueError(f"openvino cannot compile {model.friendly_name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return the last line of an error of openvino, since those before it name lines of its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else first_line(error)


def _name(port: Any) -> str:
    """Return the name of an input or output."""
    return min(port.get_names(), default="")


def _fixed(shape: Any) -> Shape:
    """Return a shape of OpenVINO, with None for free dimensions."""
    return tuple(None if n.is_dynamic else n.get_length() for n in shape)
