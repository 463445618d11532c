"""A network read back from an ONNX file: onnxruntime computes, the rest of the house sees a module.

The file says itself what it is: one metadata key `normfree` holds JSON with the row, the class names and the
preprocessing. Files without it are refused, since nobody could say what goes in and what comes out.
Legend: B batch, C channels, S image size, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: The key of an ONNX file's metadata, and the name of a .pt2 file's extra file, that hold our JSON.
METADATA_KEY = "normfree"
PT2_METADATA = "normfree.json"
#: What the JSON must hold.
METADATA_FIELDS = ("row", "version", "classes", "preprocessing", "opset", "folded")
INPUT, OUTPUT = "images", "logits"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxNet(nn.Module):
    """A network whose forward pass is onnxruntime's: normalized float images B C S S -> logits B K.

    It has no parameters and cannot be trained. Images may lie on any device; logits come back to the same one.
    `name` is the row that the file was made from.
    """

    def __init__(self, session: onnxruntime.InferenceSession, *, name: str) -> None:
        super().__init__()
        self.session, self.name = session, name
        _, self.in_channels, self.image_size, _ = session.get_inputs()[0].shape
        self.num_classes = int(session.get_outputs()[0].shape[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits B K, float32.

        Raises:
            ValueError: the images do not have the file's channels and size.
        """
        wanted = (self.in_channels, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(f"images of shape {tuple(images.shape)}: this file was exported for B x "
                             f"{' x '.join(map(str, wanted))}. Resize them, or export for their size.")  # fmt: skip
        if not len(images):  # onnxruntime's pooling fails on nothing
            return torch.empty(0, self.num_classes, device=images.device)
        array = images.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self.session.run([OUTPUT], {INPUT: array})[0]).to(images.device)


def open_onnx(path: str | Path, *, device: str = "cpu") -> tuple[OnnxNet, dict[str, Any]]:
    """The network of an ONNX file that `normfree export` wrote, and its metadata (`METADATA_FIELDS`).

    Weights may lie in files beside it, never outside its folder. It runs with as many threads as torch has now.

    Args:
        path: the file.
        device: "cpu", or "cuda" with onnxruntime-gpu.

    Raises:
        ValueError: no such file, no ONNX file, none of ours, one that reads outside its folder, or no such device.
        ModuleNotFoundError: onnx or onnxruntime is missing.
    """
    path = Path(path)
    runtime = _runtime()
    provider = PROVIDERS.get(device)
    if provider not in runtime.get_available_providers():
        allowed = [d for d, p in PROVIDERS.items() if p in runtime.get_available_providers()]
        raise ValueError(f"device={device!r}. Allowed for ONNX files here: {', '.join(allowed)}. Use 'cpu'.")
    model = read_onnx(path)
    metadata = read_metadata(model, path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1  # the graph is a chain
    options.log_severity_level = 4  # errors come as exceptions, and nothing else matters here
    try:
        session = runtime.InferenceSession(path, options, providers=[provider])
        return OnnxNet(session, name=str(metadata["row"])), metadata
    except Exception as error:  # onnxruntime has a class of its own for each kind, and no base for all
        raise ValueError(f"{path}: onnxruntime refuses this file: {_first_line(error)}") from None


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph of an ONNX file, without weights that lie in other files.

    Raises:
        ValueError: it cannot be read, holds no graph, or names weights outside its folder.
        ModuleNotFoundError: onnx is missing.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise ModuleNotFoundError("ONNX files need onnx: pip install 'normfree[onnx]'") from None
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Give an ONNX file that `normfree export` wrote.")
    try:
        # parsed as protobuf whatever the suffix: .json and .onnxtxt would go through text parsers
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's and the operating system's
        raise ValueError(f"{path} is no ONNX file, or cut short: {_first_line(error)}") from None
    if not model.graph.node:
        raise ValueError(f"{path} is no ONNX file, or cut short: it holds no graph.")
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and not (folder / entry.value).resolve().is_relative_to(folder):
                raise ValueError(f"{path}: its tensor {tensor.name!r} names the file {entry.value!r}, outside the "
                                 "file's own folder. It was not opened.")  # fmt: skip
    return model


def read_metadata(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """Our JSON in an ONNX file, checked for its keys and their types.

    Raises:
        ValueError: there is none, or it is not as we write it.
    """
    texts = [p.value for p in model.metadata_props if p.key == METADATA_KEY]
    shapes = [
        [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*model.graph.input, *model.graph.output)
    ]
    names = [v.name for v in (*model.graph.input, *model.graph.output)]
    if not texts or names != [INPUT, OUTPUT] or list(map(len, shapes)) != [4, 2]:
        raise ValueError(f"{path} was not written by normfree: it does not say which classes it knows and how "
                         "pictures are prepared. Export it with `normfree export`.")  # fmt: skip
    try:
        metadata = json.loads(texts[0])
        missing = [k for k in METADATA_FIELDS if k not in metadata]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} is no JSON object.") from None
    if missing or not isinstance(metadata, dict):
        raise ValueError(f"{path}: the metadata {METADATA_KEY!r} lacks {', '.join(missing) or 'everything'}.")
    classes = metadata["classes"]
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ValueError(f"{path}: 'classes' in its metadata is no list of names.")
    if len(classes) != shapes[1][1]:
        raise ValueError(f"{path} names {len(classes)} classes for {shapes[1][1]} outputs.")
    if not isinstance(metadata["preprocessing"], dict):
        raise ValueError(f"{path}: 'preprocessing' in its metadata is no table.")
    if shapes[0][2:] != [metadata["preprocessing"].get("image_size")] * 2:
        raise ValueError(f"{path}: its input is {shapes[0][2]} x {shapes[0][3]} pixels, its preprocessing makes "
                         f"{metadata['preprocessing'].get('image_size')!r}.")  # fmt: skip
    return metadata


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in an ONNX message: weights, attributes, inner graphs, functions."""
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
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise ModuleNotFoundError("ONNX files need onnxruntime: pip install 'normfree[onnx]'") from None
    return onnxruntime


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
