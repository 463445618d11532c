"""A trained network as one file for other runtimes: ONNX or torch.export's .pt2, proved equal before it is kept.

The file is written beside its place, opened again by the runtime that will use it, compared with the network on
pictures, and only then moved there. Legend: B batch, C channels, S image size, K classes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from normfree._version import __version__
from normfree.models.net import Net
from normfree.onnx_net import INPUT, METADATA_KEY, OUTPUT, PT2_METADATA, open_onnx
from normfree.pretrained import TrainedModel

if TYPE_CHECKING:
    import onnx

FORMATS = ("onnx", "pt2")
#: Batches at which a file is compared: one, the smallest true batch, an odd one, a large one.
BATCHES = (1, 2, 5, 64)
#: Largest ||file - network|| / ||network|| of a picture's logits. Reordered float32 sums of these networks differ by
#: 1e-7 to 5e-6; an error in the graph is far above 1e-5.
TOLERANCE = 1e-5
#: What torch's exporter writes well and onnxruntime 1.32 reads.
OPSETS = range(18, 26)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the network.

    `errors` has, for each batch size, the largest ||file - network|| / ||network|| over the pictures' logits;
    `top1_agreement` is percent over all of them; `pictures` is how many different ones were used (up to 64), `noise`
    True if none were given. `census` counts the nodes by kind; `weight_arithmetic` those that no picture reaches, which
    compute on weights alone.
    """

    path: Path
    format: str
    bytes: int
    opset: int | None
    folded: bool
    census: Counter[str]
    weight_arithmetic: int
    errors: dict[int, float]
    top1_agreement: float
    images: int
    noise: bool

    @property
    def batch_norms(self) -> int:
        """How many nodes normalize over a batch, or with its running statistics."""
        return sum(n for kind, n in self.census.items() if "batch" in kind.lower() and "norm" in kind.lower())


def export(
    model: TrainedModel,
    path: str | Path,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    folded: bool = True,
    images: Tensor | None = None,
    opset: int = 20,
) -> ExportReport:
    """Writes `model` to one file with a free batch size, its preprocessing and class names, and compares.

    Input `images` float32 B C S S, normalized; output `logits` B K. Weights lie inside the file.

    Args:
        model: a network of ours; it is not changed.
        path: where to; it ends in .onnx or .pt2.
        format: "onnx" (with torch's exporter, needs normfree[onnx]) or "pt2" (torch.export).
        folded: export the folded network: plain convolutions, fewer nodes, the same outputs.
        images: B C S S, normalized; real pictures on which file and network are compared at batches 1, 2, 5 and 64
            (the first 64; repeated if they are fewer). Without them noise is used, which shows errors less well.
        opset: version of ONNX's operators, 18 to 25; ignored for pt2.

    Raises:
        ValueError: an argument is not possible; or the file differs from the network by more than 1e-5, answers
            otherwise, or, when folded, still normalizes or computes on weights: then nothing is left behind.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing.
    """
    path = Path(path)
    net = _check(model, path, format=format, opset=opset)
    size, channels = model.preprocessing.image_size, net.in_channels
    noise = images is None
    if images is None:
        images = torch.randn(BATCHES[-1], channels, size, size, generator=torch.Generator().manual_seed(0))
    if images.dim() != 4 or tuple(images.shape[1:]) != (channels, size, size) or not len(images):
        raise ValueError(f"images of shape {tuple(images.shape)}: expected B x {channels} x {size} x {size}, "
                         "normalized, B at least 1. Prepare them with model.preprocessing.")  # fmt: skip
    original = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    plain: nn.Module = _fold(original) if folded else original
    metadata = json.dumps(
        {
            "row": net.name, "version": __version__, "classes": list(model.classes),
            "preprocessing": asdict(model.preprocessing), "opset": opset if format == "onnx" else None,
            "folded": folded,
        },
        ensure_ascii=False,
    )  # fmt: skip
    example = torch.zeros(2, channels, size, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad():
        work = Path(folder) / path.name
        if format == "onnx":
            census, idle = _write_onnx(plain, example, work, metadata=metadata, opset=opset, folded=folded)
            run: Callable[[Tensor], Tensor] = open_onnx(work)[0]
        else:
            census, idle = _write_pt2(plain, example, work, metadata=metadata, folded=folded)
            run = _open_pt2(work)
        errors, agreement = compare(run, original, images.detach().cpu().float())
        worst = max(errors.values())
        if not worst <= TOLERANCE or agreement < 100:
            at = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in errors.items())
            other = f"its first class on {100 - agreement:.2f} % of them"
            raise ValueError(f"{path} was not kept: its logits differ from the network's by {at} "
                             f"(allowed: {TOLERANCE:g}), {other}.")  # fmt: skip
        os.replace(work, path)
    return ExportReport(
        path=path, format=format, bytes=path.stat().st_size, opset=opset if format == "onnx" else None,
        folded=folded, census=census, weight_arithmetic=idle, errors=errors, top1_agreement=agreement,
        images=min(len(images), BATCHES[-1]), noise=noise,
    )  # fmt: skip


def compare(
    run: Callable[[Tensor], Tensor], net: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[dict[int, float], float]:
    """How far `run` is from `net` (both images B C S S -> logits B K) at each of `BATCHES`.

    Returns for each batch size the largest ||run - net|| / ||net|| of a picture, and in percent how often the first
    class is the same. A tie counts as the same: two classes that in `net` are nearer than the tolerance allows.
    Pictures are repeated to fill a batch.
    """
    errors: dict[int, float] = {}
    same = total = 0
    for batch in BATCHES:
        x = images[torch.arange(batch) % len(images)].contiguous()
        ours, theirs = net(x).double(), run(x).double()
        length = ours.norm(dim=1)
        gap = (theirs - ours).norm(dim=1)
        errors[batch] = float(
            (gap / length).where(gap > 0, gap).max()
        )  # 0 / 0: an untrained head gives zeros
        chosen = ours.gather(1, theirs.argmax(dim=1, keepdim=True))[:, 0]
        same += int((ours.max(dim=1).values - chosen <= 2 * TOLERANCE * length).sum())
        total += batch
    return errors, 100 * same / total


def _check(model: TrainedModel, path: Path, *, format: str, opset: int) -> Net:
    net = model.net
    if not isinstance(net, Net):
        raise ValueError(
            f"{net.name} was read from an exported file. Export the run or model folder that it came from."
        )
    if format not in FORMATS:
        raise ValueError(f"format={format!r}. Allowed: {', '.join(FORMATS)}. Use 'onnx' for other runtimes.")
    if path.suffix != f".{format}":
        raise ValueError(f"{str(path)!r} for format={format!r}: the name must end in .{format}. "
                         f"Use {str(path.with_suffix('.' + format))!r}.")  # fmt: skip
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; a file's name is needed.")
    if format == "onnx" and opset not in OPSETS:
        near = min(max(opset, OPSETS[0]), OPSETS[-1])
        raise ValueError(f"opset={opset}. Allowed: {OPSETS[0]} to {OPSETS[-1]}. Use {near}.")
    if len(model.classes) != net.num_classes:
        raise ValueError(
            f"{len(model.classes)} class names for {net.num_classes} outputs; give one for each."
        )
    return net


def _fold(net: Net) -> nn.Module:
    from normfree.deploy.fold import fold

    return fold(net).eval().requires_grad_(False)


def _require_plain(census: Counter[str], idle: list[str], path: Path) -> None:
    """A folded file normalizes nothing and computes nothing from weights alone; read from the graph itself."""
    norms = sorted(kind for kind in census if "norm" in kind.lower())
    if norms or idle:
        what = ", ".join(norms + sorted(set(idle)))
        raise ValueError(
            f"{path.name} was not kept: the folded graph still holds {what}. Export it unfolded."
        )


# --- ONNX --------------------------------------------------------------------------------------------


def _write_onnx(
    net: nn.Module, example: Tensor, path: Path, *, metadata: str, opset: int, folded: bool
) -> tuple[Counter[str], int]:
    """Writes the file; returns its census and the count of nodes that compute on weights alone."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so at length
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"exporting to ONNX needs {error.name}: pip install 'normfree[onnx]'"
        ) from None
    with silence():
        program = torch.onnx.export(
            net, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=[INPUT],
            output_names=[OUTPUT], opset_version=opset, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _strip(model)
    model.metadata_props.add(key=METADATA_KEY, value=metadata)
    onnx.checker.check_model(model)
    if model.opset_import[0].version != opset:
        raise ValueError(f"opset={opset}: torch's exporter wrote {model.opset_import[0].version}. Use that.")
    census, idle, computed = graph_facts(model)
    if folded:
        _require_plain(census, idle + computed, path)
    onnx.save_model(model, path)
    return census, len(idle)


def graph_facts(model: onnx.ModelProto) -> tuple[Counter[str], list[str], list[str]]:
    """What an ONNX graph consists of: nodes by kind; kinds of nodes that no picture reaches, so that they compute on
    weights alone; and kinds of convolutions and products whose weight is not stored in the file (one entry each)."""
    stored = {tensor.name for tensor in model.graph.initializer}
    reached = {value.name for value in model.graph.input}
    idle, computed = [], []
    for node in model.graph.node:  # ONNX graphs are in the order of computation
        if reached.intersection(node.input):
            reached.update(node.output)
        elif node.op_type != "Constant":
            idle.append(node.op_type)
        if node.op_type in ("Conv", "Gemm", "MatMul") and not stored.intersection(node.input[1:2]):
            computed.append(f"{node.op_type} with a computed weight")
    return Counter(node.op_type for node in model.graph.node), idle, computed


def _strip(model: onnx.ModelProto) -> None:
    """Removes the exporter's notes: they hold the paths of the machine's source files, line by line."""
    graph = model.graph
    parts: list[Any] = [
        model,
        graph,
        *graph.node,
        *graph.initializer,
        *graph.value_info,
        *graph.input,
        *graph.output,
    ]
    for part in parts:
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps exporters and quantizers from talking: they log progress and advice, warn of their own future and print.
    What they find wrong comes as an exception, or is found when the file is opened again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- torch.export ------------------------------------------------------------------------------------


def _write_pt2(
    net: nn.Module, example: Tensor, path: Path, *, metadata: str, folded: bool
) -> tuple[Counter[str], int]:
    """Writes the file; returns its census and the count of nodes that compute on weights alone."""
    with silence():
        program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        reached = set(program.graph_signature.user_inputs)
        idle, census = [], Counter[str]()
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
            if node.op != "call_function":
                continue
            kind = str(node.target).removesuffix(".default")
            census[kind] += 1
            if reached.intersection(n.name for n in node.all_input_nodes):
                reached.add(node.name)
            else:
                idle.append(kind)
        if folded:
            _require_plain(census, idle, path)
        torch.export.save(program, path, extra_files={PT2_METADATA: metadata})
    return census, len(idle)


def _open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """The program in a file that was written just now. Never for others' files: parts of the format are pickles."""
    with silence():
        module: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return module
