"""Runs an exported ONNX file behind an `nn.Module` interface.

The metadata key `normfree` of the file holds JSON with the name of the variant, the class names and the preprocessing.
Files without it are refused, because their inputs and outputs are not known.

Shapes: B batch, C channels, S image size, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfree.suggest import problem

if TYPE_CHECKING:
    import onnx
    import onnxruntime

# Key of the JSON in the metadata of an ONNX file.
METADATA_KEY = "normfree"
# Name of the extra file with the same JSON in a .pt2 file.
PT2_METADATA = "normfree.json"
# Required keys of the JSON. "row" is the name of the variant.
METADATA_FIELDS = ("row", "version", "classes", "preprocessing", "opset", "folded")
INPUT, OUTPUT = "images", "logits"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNet(nn.Module):
    """A network whose forward pass runs in onnxruntime: normalized float images B C S S -> logits B K.

    It has no parameters and cannot be trained. Images may be on any device; the logits are on the same device. `name`
    is the variant that the file was exported from.
    """

    def __init__(self, session: onnxruntime.InferenceSession, *, name: str) -> None:
        super().__init__()
        self.session, self.name = session, name
        _, self.in_channels, *sides = session.get_inputs()[0].shape
        self.image_size: int | tuple[int, int] = sides[0] if sides[0] == sides[1] else (sides[0], sides[1])
        self.shape = (self.in_channels, *sides)
        self.num_classes = int(session.get_outputs()[0].shape[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Return logits B K, float32.

        Raises:
            ValueError: the images do not have the channels and the size that the file was exported for.
        """
        wanted = self.shape
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                problem(
                    f"images have the shape {tuple(images.shape)}",
                    allowed=f"B x {' x '.join(map(str, wanted))}, for which the file was exported",
                    fix="resize the images, or export the network for their size",
                )
            )
        # Pooling in onnxruntime fails for an empty batch.
        if not len(images):
            return torch.empty(0, self.num_classes, device=images.device)
        array = images.detach().to("cpu", torch.float32).contiguous().numpy()
        try:
            logits = self.session.run([OUTPUT], {INPUT: array})[0]
        except Exception as error:  # for example a constant that needs more memory than there is
            raise ValueError(f"onnxruntime cannot run {self.name}: {_first_line(error)}") from None
        return torch.from_numpy(logits).to(images.device)


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
    runtime = _runtime()
    provider = PROVIDERS.get(device)
    if provider not in runtime.get_available_providers():
        allowed = [d for d, p in PROVIDERS.items() if p in runtime.get_available_providers()]
        raise ValueError(
            problem(f"device is {device!r}", allowed=f"{', '.join(allowed)} for ONNX files", fix="use 'cpu'")
        )
    model = read_onnx(path)
    metadata = read_metadata(model, path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # The graph is nearly a chain, so operators do not run in parallel.
    options.inter_op_num_threads = 1
    # Log nothing: errors are raised as exceptions.
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(path, options, providers=[provider])
        return OnnxNet(session, name=str(metadata["row"])), metadata
    # The exceptions of onnxruntime have no common base class.
    except Exception as error:
        raise ValueError(f"{path}: onnxruntime refuses this file: {_first_line(error)}") from None


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read the graph of an ONNX file, without weights in other files.

    Raises:
        ValueError: the file cannot be read, contains no graph, or refers to weights outside its folder.
        ModuleNotFoundError: onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            problem("ONNX files need onnx", fix="pip install 'normfree[onnx]'")
        ) from None
    if not path.is_file():
        raise ValueError(
            problem(f"{str(path)!r} does not exist", allowed="an ONNX file that `normfree export` wrote")
        )
    try:
        # Always parse protobuf. By default, files with the suffixes .json and .onnxtxt are parsed as text.
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    # Exceptions of protobuf and of the operating system.
    except Exception as error:
        raise ValueError(f"{path} is not an ONNX file or is truncated: {_first_line(error)}") from None
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


def read_metadata(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """Return the JSON in the metadata of an ONNX file, after a check of its keys and types.

    Raises:
        ValueError: there is none, or it is not as `export` writes it.
    """
    texts = [p.value for p in model.metadata_props if p.key == METADATA_KEY]
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
    ]
    names = [v.name for v in (*model.graph.input, *model.graph.output)]
    if not texts or names != [INPUT, OUTPUT] or list(map(len, shapes)) != [4, 2]:
        raise ValueError(
            problem(
                f"{path} was not written by normfree: it does not contain class names and preprocessing",
                fix="export the network with `normfree export`",
            )
        )
    try:
        metadata = json.loads(texts[0])
        missing = [k for k in METADATA_FIELDS if k not in metadata]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} is not a JSON object.") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} is not a JSON object.")
    if missing:
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} lacks {', '.join(missing)}.")
    classes = metadata["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"{path}: 'classes' in its metadata is not a list of strings.")
    if len(classes) != shapes[1][1]:
        raise ValueError(f"{path}: its metadata has {len(classes)} classes for {shapes[1][1]} outputs.")
    if not isinstance(metadata["preprocessing"], dict):
        raise ValueError(f"{path}: 'preprocessing' in its metadata is not a JSON object.")
    size = metadata["preprocessing"].get("image_size")
    if shapes[0][2:] != (size if isinstance(size, list) else [size] * 2):
        raise ValueError(
            f"{path}: its input is {shapes[0][2]} x {shapes[0][3]} pixels, but the image size of its preprocessing is "
            f"{size!r}."
        )
    return metadata


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


def _runtime() -> Any:
    """Import onnxruntime."""
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            problem("ONNX files need onnxruntime", fix="pip install 'normfree[onnx]'")
        ) from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    """Return the first line of an error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
