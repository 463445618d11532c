"""Writers of exported networks, as ONNX and .pt2 files, and facts about their graphs."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfree.exported_net import INPUT, METADATA_KEY, OUTPUT, PT2_METADATA, first_line
from normfree.suggest import needs, problem

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ExportJob:
    """A network to export.

    Attributes:
        net: the network, in evaluation mode.
        example: an input, from which the free axes and the outputs are traced.
        axes: names of the axes of the input that are free.
        metadata: JSON that is stored in the file.
        plain: True if the graph must contain no norms and no arithmetic on weights, as that of a folded network.
        opset: version of the ONNX operator set; None for pt2.
        name: name of the file, for error messages.
        inputs: name of the input.
        outputs: names of the outputs.
    """

    net: nn.Module
    example: Tensor
    axes: dict[int, str]
    metadata: str
    plain: bool
    opset: int | None
    name: str
    inputs: str = INPUT
    outputs: tuple[str, ...] = (OUTPUT,)

    @property
    def dynamic_shapes(self) -> Any:
        """The free axes as torch.export takes them."""
        return ({axis: torch.export.Dim(name) for axis, name in self.axes.items()},)


def _require_plain(census: Counter[str], idle: list[str], name: str) -> None:
    """Check that the graph of a folded network contains no norms and no nodes that compute on weights alone."""
    norms = sorted(kind for kind in census if "norm" in kind.lower())
    if norms or idle:
        what = ", ".join(norms + sorted(set(idle)))
        raise ValueError(
            problem(
                f"{name} was not kept: the folded graph still contains {what}",
                fix="export it with folded=False",
            )
        )


@contextlib.contextmanager
def _named_failure(job: ExportJob) -> Iterator[None]:
    """Raise a `ValueError` with the reason if torch.export cannot trace the network."""
    try:
        yield
    # torch.export and the ONNX exporter have many exceptions; their messages have pages, with the reason at a cause.
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        free = ", ".join(job.axes.values())
        raise ValueError(
            problem(
                f"torch.export cannot trace {type(job.net).__name__}: {type(cause).__name__}: {first_line(cause)}",
                allowed="models whose control flow does not depend on the values of tensors",
                fix="move such code out of forward"
                + (f", or fix the {free} with dynamic_batch=False" if free else ""),
            )
        ) from None


# --- ONNX --------------------------------------------------------------------------------------------


def write_onnx(net: nn.Module, path: Path, job: ExportJob, *, opset: int) -> tuple[Counter[str], int]:
    """Write `net`, which computes what `job.net` does; return its census and the number of nodes that compute on
    weights alone."""
    with needs("export to ONNX", install="normfree[onnx]"):
        import onnx
        import onnxscript  # noqa: F401  PyTorch's exporter needs it; its own error message is long
    with silence(), _named_failure(job):
        program = torch.onnx.export(
            net, (job.example,), dynamo=True, dynamic_shapes=job.dynamic_shapes, input_names=[job.inputs],
            output_names=list(job.outputs), opset_version=opset, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    _strip(model)
    model.metadata_props.add(key=METADATA_KEY, value=job.metadata)
    onnx.checker.check_model(model)
    if model.opset_import[0].version != opset:
        written = model.opset_import[0].version
        raise ValueError(
            problem(f"opset is {opset}, but PyTorch's exporter wrote {written}", fix=f"use opset={written}")
        )
    census, idle, computed = graph_facts(model)
    if job.plain:
        _require_plain(census, idle + computed, job.name)
    onnx.save_model(model, path)
    return census, len(idle)


def graph_facts(model: onnx.ModelProto) -> tuple[Counter[str], list[str], list[str]]:
    """Return facts about the nodes of an ONNX graph.

    Returns:
        The number of nodes by kind; the kinds of nodes that do not depend on the images, so they compute on weights
        alone; and one entry for each convolution or matrix product whose weight is not stored in the file.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    reached = {value.name for value in model.graph.input}
    idle, computed = [], []
    # The nodes of an ONNX graph are in topological order.
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
        elif node.op_type != "Constant":
            idle.append(node.op_type)
        if node.op_type in ("Conv", "Gemm", "MatMul") and not stored.intersection(node.input[1:2]):
            computed.append(f"{node.op_type} with a computed weight")
    return Counter(node.op_type for node in model.graph.node), idle, computed


def _strip(model: onnx.ModelProto) -> None:
    """Remove the annotations of the exporter, which contain paths of source files on this machine."""
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
    """Suppress logging, warnings and printing of exporters and quantizers.

    They report progress, advice and deprecations. Errors are raised as exceptions, or found when the file is opened.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# --- torch.export ------------------------------------------------------------------------------------


def write_pt2(net: nn.Module, path: Path, job: ExportJob) -> tuple[Counter[str], int]:
    """Write the file; return its census and the number of nodes that compute on weights alone."""
    with silence():
        with _named_failure(job):
            program = torch.export.export(net, (job.example,), dynamic_shapes=job.dynamic_shapes)
        reached = set(program.graph_signature.user_inputs)
        idle, census = [], Counter[str]()
        for node in program.graph.nodes:
            # It contains paths of source files on this machine.
            node.meta.pop("stack_trace", None)
            if node.op != "call_function":
                continue
            kind = str(node.target).removesuffix(".default")
            census[kind] += 1
            if reached.intersection(n.name for n in node.all_input_nodes):
                reached.add(node.name)
            else:
                idle.append(kind)
        if job.plain:
            _require_plain(census, idle, job.name)
        # A buffer, because `torch.export.save` expects a file name that ends in .pt2.
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={PT2_METADATA: job.metadata})
    path.write_bytes(buffer.getbuffer())
    return census, len(idle)


def open_pt2(path: Path) -> Callable[[Tensor], Any]:
    """Load a .pt2 file that this process wrote. Not safe for other files, because the format contains pickles."""
    with silence():
        module: Callable[[Tensor], Any] = torch.export.load(io.BytesIO(path.read_bytes())).module()
    return module
