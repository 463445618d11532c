"""Quantization of an exported ONNX file to 8-bit weights and activations, calibrated on images.

It is static quantization by onnxruntime, with quantize/dequantize pairs around each quantized node (QDQ). The choice of
nodes and settings was made by measurements, which docs/export.md lists.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfree.deploy.graph_writers import silence
from normfree.files import atomic_write
from normfree.onnx_net import INPUT, METADATA_KEY, OnnxNet, open_onnx, read_onnx
from normfree.suggest import problem, unknown

if TYPE_CHECKING:
    import onnx

# The quantized nodes are those with weights. To quantize the nodes between them (gates, sums, pooling) as well would
# cost accuracy and save no bytes. The -inf padding of a max pool would also make the range of its scale infinite.
QUANTIZED = ("Conv", "Gemm")
# A file whose median relative error of the logits is at least this is rejected. Correct files have about 0.03, files
# with wrong scales about 1.
BROKEN = 0.5


@dataclass(frozen=True)
class QuantizeReport:
    """The quantized file, and its difference to the float file.

    Attributes:
        path: the file.
        bytes: size of the file.
        float_bytes: size of the float file.
        quantized: number of convolutions and linear layers that compute in 8 bits.
        left_float: number of convolutions and linear layers that stay in float.
        images: number of calibration images.
        error: median of ||int8 - float|| / ||float|| of the logits of the calibration images.
        top1_agreement: percent of the calibration images for which both files predict the same class.
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
    onnx_path: str | Path,
    out_path: str | Path,
    *,
    calibration: Iterable[Tensor],
    keep_float: Sequence[str] | None = None,
) -> QuantizeReport:
    """Write the 8-bit version of a folded ONNX file that `export` wrote.

    Weights are int8 with one scale per output channel. Activations are uint8, because products of unsigned and signed
    bytes are the fastest on x86 in onnxruntime; their range is the mean over batches of the minimum and the maximum of
    each batch. The outputs of linear layers are float: with 8 bits, logits would have only 256 levels, so classes could
    tie. The metadata of the file is copied.

    Args:
        onnx_path: the float file.
        out_path: the file to write, with the suffix .onnx. An existing file is replaced.
        calibration: batches of images as the network will see them, float B C S S, normalized. A few hundred images in
            batches of 32 are enough.
        keep_float: names of nodes that stay in float. The default is the first convolution: with three input channels
            it has little work, and its errors affect all later layers.

    Returns:
        Size of the file, and its difference to the float file on the calibration images.

    Raises:
        ValueError: there are no images; the file was not written by `export`, is not folded or already quantized; or
            the logits of the quantized file are too different, and then no file is written.
        ModuleNotFoundError: onnx or onnxruntime is not installed.

    Examples:
        It needs `normfree[onnx]`; `tests/deploy/test_quantize.py` runs this code.

        >>> import torch
        >>> import normfree
        >>> images = torch.randn(256, 3, 32, 32)
        >>> report = normfree.quantize("model.onnx", "model.int8.onnx", calibration=images.split(32))  # doctest: +SKIP
        >>> round(report.bytes / report.float_bytes, 2)  # doctest: +SKIP
        0.32
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    float_net, metadata = _open_float(onnx_path, out_path)
    batches = [batch.detach().cpu().float().contiguous() for batch in calibration]
    if not sum(map(len, batches)):
        raise ValueError(
            problem("calibration has no images", allowed="at least one batch B C S S with B at least 1")
        )
    # Fail early if an image has the wrong shape.
    for batch in batches:
        float_net(batch[:1])
    facts: dict[str, Any] = {}

    def write(temporary: Path) -> None:
        kept = _quantize(onnx_path, temporary, batches, keep_float)
        facts["quantized"], facts["left_float"] = _finish(temporary, {**metadata, "int8": True}, kept)
        int8_net = open_onnx(temporary)[0]
        facts["error"], facts["top1_agreement"] = _compare(float_net, int8_net, batches, name=out_path.name)

    atomic_write(out_path, write)
    return QuantizeReport(
        path=out_path, bytes=out_path.stat().st_size, float_bytes=onnx_path.stat().st_size,
        images=sum(map(len, batches)), **facts,
    )  # fmt: skip


def images_per_second(nets: Sequence[OnnxNet], images: Tensor, *, rounds: int = 7) -> list[float]:
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


def _open_float(onnx_path: Path, out_path: Path) -> tuple[OnnxNet, dict[str, Any]]:
    """Check both paths, and return the network of the float file and its metadata."""
    if out_path.suffix != ".onnx" or out_path.resolve() == onnx_path.resolve():
        raise ValueError(
            problem(
                f"out_path is {str(out_path)!r}",
                allowed="names that end in .onnx, except that of the float file",
                fix=f"use {str(onnx_path.with_suffix('.int8.onnx'))!r}",
            )
        )
    float_net, metadata = open_onnx(onnx_path)
    if not metadata["folded"] or metadata.get("int8"):
        given = "is already quantized" if metadata.get("int8") else "is not folded"
        raise ValueError(
            problem(
                f"{onnx_path} {given}",
                allowed="folded float files",
                fix="export the network with folded=True",
            )
        )
    return float_net, metadata


def _quantize(
    source: Path, target: Path, batches: list[Tensor], keep_float: Sequence[str] | None
) -> list[str]:
    """Quantize the file; return the names of the nodes that stay in float."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with silence(), tempfile.TemporaryDirectory() as folder:
        # onnxruntime recommends optimization and shape inference before quantization. Symbolic shape inference is not
        # needed, because only the batch size is symbolic.
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        nodes = list(onnx.load_model(prepared).graph.node)
        names = {node.name for node in nodes if node.op_type in QUANTIZED}
        if keep_float is None:
            keep_float = [node.name for node in nodes if node.op_type == "Conv"][:1]
        for name in keep_float:
            if name not in names:
                raise ValueError(unknown("node in keep_float", name, sorted(names)))
        quantization.quantize_static(
            prepared, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(QUANTIZED), nodes_to_exclude=list(keep_float),
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )  # fmt: skip
    return list(keep_float)


def _finish(path: Path, metadata: dict[str, Any], kept: list[str]) -> tuple[int, int]:
    """Write the metadata, remove unused operator sets, and return the numbers of quantized and of float nodes."""
    import onnx

    model: onnx.ModelProto = read_onnx(path)
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(imports)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata, ensure_ascii=False))
    onnx.checker.check_model(model)
    onnx.save_model(model, path)
    weighted = [node.name for node in model.graph.node if node.op_type in QUANTIZED]
    return len(weighted) - len(kept), len(kept)


def _compare(
    float_net: OnnxNet, int8_net: OnnxNet, batches: list[Tensor], *, name: str
) -> tuple[float, float]:
    """Return the median relative error of the logits, and the percent of images with the same top-1 class."""
    reference = torch.cat([float_net(batch) for batch in batches])
    logits = torch.cat([int8_net(batch) for batch in batches])
    norm = reference.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((logits - reference).norm(dim=1) / norm).median())
    if not error < BROKEN:
        raise ValueError(
            problem(
                f"{name} was not kept: its logits differ from those of the float file by {100 * error:.0f} % on the "
                "calibration images",
                allowed=f"below {100 * BROKEN:.0f} %",
                fix="calibrate on images like those of the training",
            )
        )
    return error, float(100 * (logits.argmax(1) == reference.argmax(1)).float().mean())
