"""An exported ONNX file with 8-bit weights and activations, calibrated on the user's pictures.

Static quantization by onnxruntime, with quantize/dequantize pairs around each quantized node (QDQ). What is
quantized, and how, was chosen by measuring; docs/export.md has the table.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normfree.deploy.export import silence
from normfree.onnx_net import INPUT, METADATA_KEY, OnnxNet, open_onnx, read_onnx

if TYPE_CHECKING:
    import onnx

#: Nodes with weights. Quantizing what lies between them (gates, sums, pooling) costs accuracy and saves no bytes; and a
#: max pool's padding of -inf would take the range of its scale to infinity and every answer with it.
QUANTIZED = ("Conv", "Gemm")
#: Relative error of the logits, median over pictures, from which a file is no longer the network: a sound one has about
#: 0.03, one whose scales broke has 1.
BROKEN = 0.5


@dataclass(frozen=True)
class QuantizeReport:
    """What was written: sizes in bytes; how many convolutions and products compute in 8 bits and how many stay float;
    and on the calibration pictures, the median ||int8 - float|| / ||float|| of the logits and in percent how often
    the first class is the same."""

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
    """Writes `out_path`, the int8 form of a file that `export` wrote, folded. Metadata is carried over.

    Weights int8, a scale for each output channel; activations uint8 (onnxruntime's products of unsigned by signed
    bytes are the fast ones on x86), their range the mean over batches of each batch's smallest and largest value.
    Linear layers give float: in 8 bits the logits would have 256 levels, and classes would tie.

    Args:
        onnx_path: the float file.
        out_path: where to; it ends in .onnx.
        calibration: batches of pictures as the network will meet them, float B C S S, normalized. some hundred
            pictures in batches of 32 are enough.
        keep_float: names of nodes that stay float; default: the first convolution, whose three input channels hold
            little work and where an error enters everything after.

    Raises:
        ValueError: there are no pictures; the file is none of ours, is not folded or int8 already; or the int8 file
            no longer answers like the float one, and then nothing is left behind.
        ModuleNotFoundError: onnx or onnxruntime is missing.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    if out_path.suffix != ".onnx" or out_path.resolve() == onnx_path.resolve():
        raise ValueError(f"{str(out_path)!r}: expected a name that ends in .onnx, and is not the float file's. "
                         f"Use {str(onnx_path.with_suffix('.int8.onnx'))!r}.")  # fmt: skip
    float_net, metadata = open_onnx(onnx_path)
    if not metadata["folded"] or metadata.get("int8"):
        what = (
            "is int8 already"
            if metadata.get("int8")
            else "is not folded: it standardizes its weights in float"
        )
        raise ValueError(f"{onnx_path} {what}. Export it folded, in float, then quantize.")
    batches = [batch.detach().cpu().float().contiguous() for batch in calibration]
    if not sum(map(len, batches)):
        raise ValueError(f"no pictures to calibrate {onnx_path} on. Give batches of at least one.")
    for batch in batches:
        float_net(batch[:1])  # refuses wrong shapes in one line, before any work
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=".quantize-") as folder:
        work, prepared = Path(folder) / out_path.name, Path(folder) / "prepared.onnx"
        kept = _quantize(onnx_path, prepared, work, batches, keep_float)
        quantized, left = _finish(work, {**metadata, "int8": True}, kept)
        error, agreement = _differ(float_net, open_onnx(work)[0], batches)
        if not error < BROKEN:
            raise ValueError(f"{out_path} was not kept: its logits differ from the float file's by {100 * error:.0f} % "
                             f"on the calibration pictures (allowed: {100 * BROKEN:.0f} %). Calibrate on pictures like "
                             "those that it was trained on.")  # fmt: skip
        os.replace(work, out_path)
    return QuantizeReport(
        path=out_path, bytes=out_path.stat().st_size, float_bytes=onnx_path.stat().st_size, quantized=quantized,
        left_float=left, images=sum(map(len, batches)), error=error, top1_agreement=agreement,
    )  # fmt: skip


def images_per_second(nets: Sequence[OnnxNet], images: Tensor, *, rounds: int = 7) -> list[float]:
    """Speed of each network on one batch of images, B C S S: the median over `rounds`, the networks taking turns, so
    that a busy machine slows them alike. Each runs once before, uncounted."""
    times: list[list[float]] = [[] for _ in nets]
    for turn in range(rounds + 1):
        for net, spent in zip(nets, times, strict=True):
            start = time.perf_counter()
            net(images)
            if turn:
                spent.append(time.perf_counter() - start)
    return [len(images) / sorted(spent)[len(spent) // 2] for spent in times]


def _quantize(
    source: Path, prepared: Path, target: Path, batches: list[Tensor], keep_float: Sequence[str] | None
) -> list[str]:
    """Prepares and quantizes; returns the names of the nodes that were kept in float."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {INPUT: batch.numpy()}

    with silence():
        # onnxruntime recommends to optimize and to infer shapes first; shapes here are plain, no symbols needed
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        nodes = list(onnx.load_model(prepared).graph.node)
        names = {node.name for node in nodes if node.op_type in QUANTIZED}
        if keep_float is None:
            keep_float = [node.name for node in nodes if node.op_type == "Conv"][:1]
        unknown = sorted(set(keep_float) - names)
        if unknown:
            raise ValueError(f"keep_float names {', '.join(unknown)}. Allowed: {', '.join(sorted(names))}.")
        quantization.quantize_static(
            prepared, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(QUANTIZED), nodes_to_exclude=list(keep_float),
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )  # fmt: skip
    return list(keep_float)


def _finish(path: Path, metadata: dict[str, Any], kept: list[str]) -> tuple[int, int]:
    """Rewrites the metadata and drops what the preparation only mentions; counts quantized and float nodes."""
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


def _differ(float_net: OnnxNet, int8_net: OnnxNet, batches: list[Tensor]) -> tuple[float, float]:
    reference = torch.cat([float_net(batch) for batch in batches])
    logits = torch.cat([int8_net(batch) for batch in batches])
    length = reference.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    error = ((logits - reference).norm(dim=1) / length).median()
    return float(error), float(100 * (logits.argmax(1) == reference.argmax(1)).float().mean())
