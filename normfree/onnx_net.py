"""Runs an exported ONNX file behind an `nn.Module` interface, with onnxruntime.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfree.exported_net import METADATA_KEY, ExportedNet, Shape, check_metadata, first_line
from normfree.files import read_bytes
from normfree.suggest import needs, problem

if TYPE_CHECKING:
    import onnx
    import onnxruntime

_BYTES = (1 << 31) - 1  # of the graph, which is one message of protobuf; weights may be in other files
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNet(ExportedNet):
    """A network whose forward pass runs in onnxruntime, see `ExportedNet`."""

    def __init__(self, session: onnxruntime.InferenceSession, *, name: str) -> None:
        (given,) = session.get_inputs()
        first = session.get_outputs()[0]
        super().__init__(name=name, input_shape=_fixed(given.shape), output_shape=_fixed(first.shape))
        self.session, self.input_name = session, given.name

    def run(self, images: Tensor) -> list[Tensor]:
        """Return all outputs for a float32 input on the CPU."""
        try:
            outputs = self.session.run(None, {self.input_name: images.numpy()})
        # For example a constant that needs more memory than there is.
        except Exception as error:
            raise ValueError(f"onnxruntime cannot run {self.name}: {first_line(error)}") from None
        return [torch.from_numpy(out) for out in outputs]


def _fixed(shape: list[int | str | None]) -> Shape:
    """Return the shape of a value in onnxruntime, with None for free dimensions."""
    return tuple(n if isinstance(n, int) else None for n in shape)


def open_onnx(path: str | Path, *, device: str = "cpu") -> tuple[OnnxNet, dict[str, Any]]:
    """Open an ONNX file that `export` wrote.

    Its weights may be in other files of the same folder, but not outside of it. The network uses as many threads as
    PyTorch does at the time of this call.

    Args:
        path: the file.
        device: "cpu", or "cuda" with onnxruntime-gpu.

    Returns:
        The network and its metadata, a dict with the keys `METADATA_FIELDS`.

    Raises:
        ValueError: the file does not exist, is not an ONNX file, was not written by `export` or refers to files outside
            its folder; or the device is not available.
        ModuleNotFoundError: onnx or onnxruntime is not installed.
    """
    path = Path(path)
    runtime, provider = _runtime(device)
    model = read_onnx(path)
    metadata = check_metadata(metadata_text(model), path, **_values(model))
    return OnnxNet(_session(path, runtime, provider), name=str(metadata["row"])), metadata


def open_graph(path: str | Path, *, device: str = "cpu") -> OnnxNet:
    """Open any ONNX file with one input of floats or bytes; otherwise as `open_onnx`. Its name is that of the file.

    Raises:
        ValueError: see `open_onnx`; or the file has several inputs, or one of another type.
    """
    path = Path(path)
    runtime, provider = _runtime(device)
    inputs = _values(read_onnx(path))["inputs"]
    session = _session(path, runtime, provider)
    types = [value.type for value in session.get_inputs()]
    if types not in (["tensor(float)"], ["tensor(uint8)"]):
        raise ValueError(
            problem(
                f"{path} has the inputs {', '.join(f'{n} {t}' for n, t in zip(inputs, types, strict=False)) or 'none'}",
                allowed="one input, tensor(float) or tensor(uint8)",
            )
        )
    return OnnxNet(session, name=path.stem)


def _session(path: Path, runtime: Any, provider: str) -> onnxruntime.InferenceSession:
    """Return a session of onnxruntime."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # The graph is nearly a chain, so operators do not run in parallel.
    options.inter_op_num_threads = 1
    # Log nothing: errors are raised as exceptions.
    options.log_severity_level = 4
    try:
        return runtime.InferenceSession(path, options, providers=[provider])
    # The exceptions of onnxruntime have no common base class.
    except Exception as error:
        raise ValueError(f"{path}: onnxruntime refuses this file: {first_line(error)}") from None


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read the graph of an ONNX file, without weights in other files.

    Raises:
        ValueError: the file cannot be read, contains no graph, or refers to weights outside its folder.
        ModuleNotFoundError: onnx is not installed.
    """
    with needs("an ONNX file", install="normfree[onnx]"):
        import onnx
    if not path.is_file():
        given = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(problem(f"{str(path)!r} {given}", allowed="an ONNX file"))
    content = read_bytes(path, limit=_BYTES)
    try:
        # Always parse protobuf. By default, files with the suffixes .json and .onnxtxt are parsed as text.
        model = onnx.load_model_from_string(content, format="protobuf")
    # Exceptions of protobuf and of the operating system.
    except Exception as error:
        raise ValueError(f"{path} is not an ONNX file or is truncated: {first_line(error)}") from None
    if not model.graph.node:
        raise ValueError(f"{path} is not an ONNX file or is truncated: it contains no graph.")
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and not (folder / entry.value).resolve().is_relative_to(folder):
                raise ValueError(
                    problem(
                        f"{path}: its tensor {tensor.name!r} refers to the file {entry.value!r}, which was not opened",
                        allowed="files in the folder of the ONNX file",
                    )
                )
    return model


def files_of(path: Path) -> list[Path]:
    """Return an ONNX file and the files of weights that it refers to."""
    entries = (entry for tensor in _tensors(read_onnx(path)) for entry in tensor.external_data)
    names = {entry.value for entry in entries if entry.key == "location"}
    return [path, *(path.parent / name for name in sorted(names))]


def metadata_text(model: onnx.ModelProto) -> str | None:
    """Return the JSON in the metadata of an ONNX file, or None."""
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def _values(model: onnx.ModelProto) -> dict[str, dict[str, Shape]]:
    """Return names and shapes of the inputs and outputs of a graph."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return {
        kind: {v.name: tuple(d.dim_value or None for d in v.type.tensor_type.shape.dim) for v in values}
        for kind, values in (
            # Old files list their weights as inputs, too.
            ("inputs", [v for v in model.graph.input if v.name not in stored]),
            ("outputs", list(model.graph.output)),
        )
    }


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of an ONNX message: weights, attributes, and those of inner graphs and functions."""
    import onnx

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            parts = [value] if hasattr(value, "ListFields") else list(value)
            for part in parts:
                yield from _tensors(part)


def _runtime(device: str) -> tuple[Any, str]:
    """Import onnxruntime; return it and its provider for a device."""
    with needs("an ONNX file", install="normfree[onnx]"):
        import onnxruntime
    provider = PROVIDERS.get(device, "")
    available = onnxruntime.get_available_providers()
    if provider not in available:
        allowed = [d for d, p in PROVIDERS.items() if p in available]
        raise ValueError(
            problem(f"device is {device!r}", allowed=f"{', '.join(allowed)} for ONNX files", fix="use 'cpu'")
        )
    return onnxruntime, provider
