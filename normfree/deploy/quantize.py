"""Quantization of a module or an ONNX file to 8-bit weights and activations, calibrated on inputs.

It is static quantization by onnxruntime, with quantize/dequantize pairs around each quantized node (QDQ), or for
OpenVINO by NNCF. The choice of nodes and settings was made by measurements, which docs/export.md lists.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfree.deploy.comparison import joined
from normfree.deploy.export import export
from normfree.deploy.graph_writers import silence
from normfree.deploy.openvino_writer import write_two_files
from normfree.deploy.quantize_openvino import LayerCounts, quantize_openvino
from normfree.exported_net import IMAGE, METADATA_KEY, ExportedNet, parse_metadata
from normfree.files import atomic_write
from normfree.onnx_net import OnnxNet, files_of, metadata_text, open_graph, read_onnx
from normfree.openvino_net import OpenVinoNet, compile_openvino, read_openvino
from normfree.pretrained import TrainedModel
from normfree.suggest import problem, some_names, unknown

if TYPE_CHECKING:
    import onnx

# The quantized nodes are those with weights: convolutions, and linear layers, which are products in graphs with several
# rows per image. To quantize the nodes between them (gates, sums, pooling) as well would cost accuracy and save no
# bytes. The -inf padding of a max pool would also make the range of its scale infinite.
QUANTIZED = ("Conv", "Gemm", "MatMul")
# A file whose median relative error of the logits is at least this is rejected. Correct files have about 0.03, files
# with wrong scales about 1.
BROKEN = 0.5
# Scales per output channel need this version of the ONNX operator set.
LOWEST_OPSET = 13


@dataclass(frozen=True)
class QuantizeReport:
    """The quantized file, and its difference to the float file.

    Attributes:
        path: the file.
        bytes: size of the file; for OpenVINO, of both files.
        float_bytes: size of the float ONNX file, with files of weights beside it.
        quantized: number of convolutions and linear layers that compute in 8 bits.
        left_float: number of convolutions and linear layers that stay in float.
        images: number of calibration images.
        error: median of ||int8 - float|| / ||float|| of the outputs for the calibration images.
        top1_agreement: percent of the calibration images for which the largest output is the same in both files.
    """

    path: Path
    bytes: int
    float_bytes: int
    quantized: int
    left_float: int
    images: int
    error: float
    top1_agreement: float


def quantize(
    model: str | Path | nn.Module | TrainedModel,
    out_path: str | Path,
    *,
    calibration: Iterable[Tensor],
    keep_float: Sequence[str] | None = None,
) -> QuantizeReport:
    """Write the 8-bit version of a module, a trained network or an ONNX file.

    A module is folded and exported first. An ONNX file may come from any program: it needs one float input of any shape
    and stored weights, or weights that are computed from stored ones. Metadata of `export` are copied.

    Weights are int8 with one scale per output channel. In an ONNX file, activations are uint8, because products of
    unsigned and signed bytes are the fastest on x86 in onnxruntime; their range is the mean over batches of the minimum
    and the maximum of each batch. Only convolutions and linear layers are quantized. The outputs of linear layers are
    float: with 8 bits, logits would have only 256 levels, so classes could tie. A file for OpenVINO is quantized by
    NNCF with its defaults, which also has operations between convolutions in 8 bits.

    Args:
        model: the float network.
        out_path: the file to write, with the suffix .onnx, or .xml for OpenVINO. An existing file is replaced.
        calibration: batches of inputs as the network will see them, float B ..., normalized. A few hundred images in
            batches of 32 are enough.
        keep_float: names of convolutions and linear layers of the ONNX file that stay in float, or of their outputs if
            the file has no names. The default is the first convolution: with few input channels it has little work, and
            its errors affect all later layers. For OpenVINO it is none, as in NNCF.

    Returns:
        Size of the file, and its difference to the float network on the calibration inputs.

    Raises:
        TypeError: calibration yields something else than float tensors, or keep_float is no list.
        ValueError: there are no inputs, they have the wrong shape or are not finite; the file has several inputs, is
            already quantized or has weights that depend on its input; or the outputs of the quantized file are too
            different, and then no file is written.
        ModuleNotFoundError: onnx, onnxruntime, openvino or nncf is not installed.

    Examples:
        It needs `normfree[onnx]`; `tests/deploy/test_quantize.py` runs this code.

        >>> import torch
        >>> import normfree
        >>> images = torch.randn(256, 3, 32, 32)
        >>> report = normfree.quantize("model.onnx", "model.int8.onnx", calibration=images.split(32))  # doctest: +SKIP
        >>> round(report.bytes / report.float_bytes, 2)  # doctest: +SKIP
        0.32
    """
    out_path = Path(out_path)
    batches = list(_checked(calibration))
    if not batches:
        raise ValueError(
            problem("calibration has no images", allowed="at least one batch B C H W with B at least 1")
        )
    if isinstance(keep_float, str):
        raise TypeError(
            problem("keep_float is a string", allowed="a list of names", fix=f"keep_float=[{keep_float!r}]")
        )
    if not all(isinstance(name, str) for name in keep_float or ()):
        raise TypeError(problem(f"keep_float is {keep_float!r}", allowed="a list of names of nodes"))
    if isinstance(model, nn.Module | TrainedModel):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / f"{type(model).__name__}.onnx"
            images = None if isinstance(model, TrainedModel) else batches[0]
            export(model, source, images=images)
            return _quantize_file(source, out_path, batches, keep_float)
    return _quantize_file(Path(model), out_path, batches, keep_float)


def _checked(calibration: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the batches that are not empty, as contiguous float32 tensors on the CPU."""
    if isinstance(calibration, Tensor):
        raise TypeError(
            problem("calibration is a tensor", allowed="batches", fix="calibration=images.split(32)")
        )
    for number, batch in enumerate(calibration):
        given, allowed = f"calibration batch {number}", "float tensors B C H W, normalized"
        if not isinstance(batch, Tensor):
            fix = "(images for images, _ in loader), or torch.from_numpy(array).split(32)"
            raise TypeError(problem(f"{given} is a {type(batch).__name__}", allowed=allowed, fix=fix))
        if not batch.is_floating_point():
            fix = "preprocess the images as for the network"
            raise TypeError(problem(f"{given} has the type {batch.dtype}", allowed=allowed, fix=fix))
        if not batch.ndim:
            raise ValueError(problem(f"{given} is a single number", allowed=allowed))
        batch = batch.detach().cpu().float().contiguous()
        if not batch.isfinite().all():
            raise ValueError(problem(f"{given} has values that are not finite in float32", allowed=allowed))
        if len(batch):
            yield batch


def _quantize_file(
    source: Path, out_path: Path, batches: list[Tensor], keep_float: Sequence[str] | None
) -> QuantizeReport:
    """Write the 8-bit version of an ONNX file."""
    float_net, metadata = _open_float(source, out_path)
    float_bytes = sum(file.stat().st_size for file in files_of(source))
    # Fail early if an image has the wrong shape.
    for batch in batches:
        float_net.check_shape(batch)
    facts: dict[str, Any] = {}
    openvino = out_path.suffix == ".xml"
    keep_float = None if keep_float is None else list(dict.fromkeys(keep_float))  # each name once

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            layers = _prepare(source, prepared)
            for name in keep_float or ():
                if name not in layers:
                    raise ValueError(unknown("convolution or linear layer in keep_float", name, layers))
            int8_net: ExportedNet
            if openvino:
                text = json.dumps(metadata, ensure_ascii=False)
                counts = quantize_openvino(
                    prepared, temporary, batches, keep_float=keep_float or (), metadata=text
                )
                int8_net = OpenVinoNet(compile_openvino(read_openvino(temporary)), name=out_path.name)
            else:
                convolutions = [name for name, kind in layers.items() if kind == "Conv"]
                kept = convolutions[:1] if keep_float is None else keep_float
                _quantize(prepared, temporary, batches, float_net.input_name, layers.keys() - set(kept))
                counts = _finish(temporary, metadata, layers)
                int8_net = open_graph(temporary)
            facts.update(counts._asdict())
        facts["error"], facts["top1_agreement"] = _compare(float_net, int8_net, batches, name=out_path.name)

    (write_two_files if openvino else atomic_write)(out_path, write)
    files = [out_path, out_path.with_suffix(".bin")] if openvino else [out_path]
    return QuantizeReport(
        path=out_path, bytes=sum(file.stat().st_size for file in files), float_bytes=float_bytes,
        images=sum(map(len, batches)), **facts,
    )  # fmt: skip


def images_per_second(nets: Sequence[nn.Module], images: Tensor, *, rounds: int = 7) -> list[float]:
    """Measure the speed of each network on one batch of images, B C S S, as the median over `rounds`.

    The networks take turns, so that other load on the machine slows them equally. The first round is not counted.
    """
    times: list[list[float]] = [[] for _ in nets]
    for index in range(rounds + 1):
        for net, spent in zip(nets, times, strict=True):
            start = time.perf_counter()
            net(images)
            if index:
                spent.append(time.perf_counter() - start)
    return [len(images) / sorted(spent)[len(spent) // 2] for spent in times]


def _open_float(source: Path, out_path: Path) -> tuple[OnnxNet, dict[str, Any]]:
    """Check both paths; return the network of the float file, and the metadata of the quantized file."""
    if out_path.suffix not in (".onnx", ".xml") or out_path.resolve() == source.resolve():
        raise ValueError(
            problem(
                f"out_path is {str(out_path)!r}",
                allowed="names that end in .onnx or .xml, except that of the float file",
                fix=f"use {str(source.with_suffix('.int8.onnx'))!r}",
            )
        )
    if source.is_dir() or source.suffix == ".xml":
        kind = "a folder" if source.is_dir() else "an OpenVINO file"
        fix = "quantize the ONNX file, or the network with normfree.from_pretrained(FOLDER)"
        raise ValueError(problem(f"{source} is {kind}", allowed="ONNX files and networks", fix=fix))
    graph = read_onnx(source)
    text = metadata_text(graph)
    metadata = {"int8": True} if text is None else parse_metadata(text, source) | {"int8": True}
    if any(
        node.op_type in ("QuantizeLinear", "DequantizeLinear", "QLinearConv") for node in graph.graph.node
    ):
        raise ValueError(
            problem(f"{source} is already quantized", allowed="float files", fix="quantize the float file")
        )
    if [value.name for value in graph.graph.input] == [IMAGE] and text is not None:
        given = f"{source} contains its preprocessing, and calibration needs normalized inputs"
        raise ValueError(problem(given, fix="quantize a file that was exported without preprocessing"))
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < LOWEST_OPSET:
        raise ValueError(
            problem(
                f"{source} has version {opset} of the ONNX operator set",
                allowed=f"{LOWEST_OPSET} or newer",
                fix="convert it with onnx.version_converter, or export it again",
            )
        )
    return open_graph(source), metadata


def _prepare(source: Path, target: Path) -> dict[str, str]:
    """Write the file as both tools read it; return names and kinds of its convolutions and linear layers.

    Nodes without a name, or with that of another node, get the names of their outputs.

    onnxruntime recommends optimization and shape inference before quantization. Symbolic shape inference is not needed,
    because only the batch size is symbolic.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with silence():
        whole = target.with_name("whole.onnx")  # with the weights that `source` keeps in other files
        onnx.save_model(onnx.load_model(source), whole)
        quant_pre_process(whole, target, skip_symbolic_shape=True)
    model: onnx.ModelProto = onnx.load_model(target)
    seen: set[str] = set()
    for node in model.graph.node:
        if not node.name or node.name in seen:
            node.name = next(filter(None, node.output), node.name)
        seen.add(node.name)
    onnx.save_model(model, target)
    weighted = _with_stored_weights(model.graph, source)
    if not weighted:
        allowed = "networks with convolutions or linear layers"
        raise ValueError(problem(f"{source} has no layers with weights", allowed=allowed))
    return weighted


def _quantize(
    prepared: Path, target: Path, batches: list[Tensor], input_name: str, chosen: Collection[str]
) -> None:
    """Quantize the nodes `chosen` of a file by onnxruntime."""
    import onnx
    from onnxruntime import quantization

    others = [node.name for node in onnx.load_model(prepared).graph.node if node.name not in chosen]

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {input_name: batch.numpy()}

    with silence():
        quantization.quantize_static(
            prepared, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(QUANTIZED), nodes_to_exclude=others,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )  # fmt: skip


def _with_stored_weights(graph: onnx.GraphProto, source: Path) -> dict[str, str]:
    """Return names and kinds of the convolutions, linear layers and products with a stored weight.

    Raises:
        ValueError: the weight of a convolution or linear layer is not stored after optimization.
    """
    stored = {tensor.name for tensor in graph.initializer}
    stored |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    layers = [node for node in graph.node if node.op_type in QUANTIZED]
    found = {node.name: node.op_type for node in layers if node.input[1] in stored}
    computed = [node.name for node in layers if node.name not in found and node.op_type != "MatMul"]
    if computed:
        raise ValueError(
            problem(
                f"{source} computes the weight of {some_names(computed, limit=1)}",
                allowed="files with stored weights",
                fix="export the network after normfree.fold",
            )
        )
    return found


def _finish(path: Path, metadata: dict[str, Any], layers: Collection[str]) -> LayerCounts:
    """Write the metadata, remove unused operator sets, and return how many `layers` have weights of 8 bits."""
    import onnx

    model: onnx.ModelProto = read_onnx(path)
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(imports)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata, ensure_ascii=False))
    onnx.checker.check_model(model)
    onnx.save_model(model, path)
    of_bytes = {
        name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output
    }
    quantized = sum(node.name in layers and node.input[1] in of_bytes for node in model.graph.node)
    return LayerCounts(quantized, len(layers) - quantized)


def _compare(
    float_net: ExportedNet, int8_net: ExportedNet, batches: list[Tensor], *, name: str
) -> tuple[float, float]:
    """Return the median relative error of the outputs, and the percent of images with the same largest output."""
    reference, outputs = (
        torch.cat([joined(net.run(batch), len(batch)) for batch in batches]) for net in (float_net, int8_net)
    )
    norm = reference.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((outputs - reference).norm(dim=1) / norm).median())
    if not error < BROKEN:
        raise ValueError(
            problem(
                f"{name} was not kept: its logits differ from those of the float file by {100 * error:.0f} % on the "
                "calibration images",
                allowed=f"below {100 * BROKEN:.0f} %",
                fix="calibrate on images like those of the training",
            )
        )
    return error, float(100 * (outputs.argmax(1) == reference.argmax(1)).float().mean())
