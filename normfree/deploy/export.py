"""Export of a network to a file for other runtimes: ONNX, OpenVINO, or the .pt2 format of torch.export.

The file is written under a temporary name, opened by the runtime that will use it, compared with the network on
images, and only then renamed to its final name.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from normfree._version import __version__
from normfree.deploy import fold as fold_module
from normfree.deploy.comparison import BATCHES, TOLERANCE, WIDE_TOLERANCE, Run, compare, joined
from normfree.deploy.graph_writers import ExportJob, open_pt2, write_onnx, write_pt2
from normfree.deploy.openvino_writer import write_openvino, write_two_files
from normfree.deploy.preprocessed import PreprocessedNet, as_pixels, compare_with_pillow, example_pixels
from normfree.exported_net import IMAGE, INPUT, OUTPUT, PROBABILITIES, ExportedNet, first_line
from normfree.files import atomic_write
from normfree.models.net import Net
from normfree.onnx_net import open_graph
from normfree.openvino_net import OpenVinoNet, compile_openvino, read_openvino
from normfree.pretrained import TrainedModel
from normfree.suggest import problem, unknown

# Suffix of the file by format.
FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
# Batch sizes at which a module of a user is compared, whose inputs may be large.
FEW_BATCHES = (1, 2, 5)
# Largest allowed difference of a probability in a file with its preprocessing, where single pixels differ by one level.
PROBABILITY_TOLERANCE = 5e-3
# Versions of the ONNX operator set that PyTorch's exporter writes correctly and onnxruntime 1.32 reads.
OPSETS = range(18, 26)


@dataclass(frozen=True)
class ExportReport:
    """The exported file, and its difference to the network.

    Attributes:
        path: the file.
        format: "onnx", "pt2" or "openvino".
        bytes: size of the file; for OpenVINO, of both files.
        opset: version of the ONNX operator set; None for pt2.
        folded: True if the folded network was exported.
        census: number of nodes of the graph by kind.
        weight_arithmetic: number of nodes that do not depend on the images, so they compute on weights alone.
        errors: batch size -> largest ||file - network|| / ||network|| of the outputs of an image; for a file with its
            preprocessing, 1 -> largest difference of a probability.
        top1_agreement: percent of the images for which file and network predict the same class.
        images: number of different images used for the comparison, up to 64.
        noise: True if the images were noise, because none were given.
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
        """Number of batch norm nodes, with batch or running statistics."""
        return sum(n for kind, n in self.census.items() if "batch" in kind.lower() and "norm" in kind.lower())


def export(
    model: TrainedModel | nn.Module,
    path: str | Path,
    *,
    format: Literal["onnx", "pt2", "openvino"] = "onnx",
    folded: bool = True,
    images: Any = None,
    opset: int = 20,
    with_preprocessing: bool = False,
    dynamic_batch: bool = True,
) -> ExportReport:
    """Write a network to a file for other runtimes, and compare the file with the network.

    A trained network is written with its preprocessing and class names. The input of the file is `images`, float32
    B C H W, normalized; its output is `logits`, B K. The commands accept the file where they accept a model.

    A module is written as it is: one input, `images`, with the shape and the number of channels of `images`; and one
    output, `logits`, or one for each tensor of its output, named after the keys of a dict. Wrap the module as
    `TrainedModel(module, preprocessing, classes)` to store preprocessing and class names.

    Args:
        model: a trained network, or any module that torch.export can trace; it is left unchanged.
        path: the file to write, with the suffix .onnx, .pt2 or .xml. An existing file is replaced. OpenVINO writes its
            weights to a .bin file next to it.
        format: "onnx" (needs `normfree[onnx]`), "openvino" (needs `normfree[openvino]`) or "pt2" (torch.export).
        folded: export the model after `fold`: plain convolutions, fewer nodes, the same outputs.
        images: inputs on which file and network are compared, at batch sizes 1, 2, 5 and 64 (1, 2 and 5 for a module);
            the first 64 are used, and repeated if there are fewer. They are required for a module. Without images, a
            trained network is compared on noise, which detects fewer errors. For `with_preprocessing`, a list of
            images, uint8 H W 3, of any sizes.
        opset: version of the ONNX operator set, 18 to 25; ignored for pt2.
        with_preprocessing: put the preprocessing into the graph. The input is then `image`, uint8 H W 3 of any size,
            the upright RGB pixels; the output is `probabilities`, K.
        dynamic_batch: False to fix the batch size to that of `images`, for modules that allow no other.

    Returns:
        Size and nodes of the file, and its difference to the network.

    Raises:
        ValueError: an argument is invalid, or torch.export cannot trace the model. Or the outputs of the file differ
            from those of the network by more than 1e-5 (1e-4 for modules and for OpenVINO, 5e-3 for the probabilities
            of a file with its preprocessing), it predicts another class, or the folded file of a network of
            `create_model` still contains norms or computes on weights; then no file is written.
        ModuleNotFoundError: onnx, onnxscript, onnxruntime or openvino is not installed.

    Examples:
        >>> import tempfile
        >>> import normfree
        >>> from normfree.preprocessing import Preprocessing
        >>> from normfree.pretrained import TrainedModel
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2, depths=(1,), widths=(16,), strides=(2,))
        >>> model = TrainedModel(net, Preprocessing(image_size=16), ("cat", "dog"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = normfree.export(model, f"{folder}/model.pt2", format="pt2")
        >>> max(report.errors.values()) < 1e-5, report.batch_norms, report.weight_arithmetic
        (True, 0, 0)
    """
    path = Path(path)
    _check(model, path, format=format, opset=opset)
    if with_preprocessing:
        plan = _plan_with_preprocessing(model, images)
    elif isinstance(model, TrainedModel):
        plan = _plan_of_trained(model, images, dynamic_batch)
    else:
        plan = _plan_of_module(model, images, dynamic_batch)
    return _export(
        plan, path, format, folded=folded, opset=None if format == "pt2" else opset, noise=images is None
    )


def _export(
    plan: _Plan, path: Path, format: str, *, folded: bool, opset: int | None, noise: bool
) -> ExportReport:
    """Write the file, compare it, and return the report."""
    metadata = plan.metadata | {"version": __version__, "opset": opset, "folded": folded}
    job = ExportJob(
        plan.net, plan.example, plan.axes, json.dumps(metadata, ensure_ascii=False),
        plain=folded and isinstance(plan.net, Net), opset=opset, name=path.name, inputs=plan.inputs,
        outputs=plan.outputs,
    )  # fmt: skip
    tolerance = max(plan.tolerance, WIDE_TOLERANCE) if format == "openvino" else plan.tolerance
    done: list[_Written] = []

    def write(temporary: Path) -> None:
        done.append(
            _write_and_compare(job, temporary, plan, folded=folded, format=format, tolerance=tolerance)
        )

    (write_two_files if format == "openvino" else atomic_write)(path, write)
    (written,) = done
    files = [path, path.with_suffix(".bin")] if format == "openvino" else [path]
    return ExportReport(
        path=path, format=format, bytes=sum(file.stat().st_size for file in files), opset=opset, folded=folded,
        census=written.census, weight_arithmetic=written.weight_arithmetic, errors=written.errors,
        top1_agreement=written.top1_agreement, images=plan.count, noise=noise,
    )  # fmt: skip


# --- what is exported ------------------------------------------------------------------------------------------

Measure = Callable[[Run], tuple[dict[int, float], float]]


@dataclass(frozen=True)
class _Plan:
    """What is exported, and how the file is compared.

    Attributes:
        net: the module to write, in evaluation mode.
        example: an input.
        axes: names of the free axes of the input.
        metadata: facts for the metadata of the file.
        measure: compares the file, a function of an input, with the network; returns errors and top-1 agreement.
        tolerance: the largest allowed error.
        count: number of different images for the comparison.
        inputs: name of the input.
        outputs: names of the outputs.
    """

    net: nn.Module
    example: Tensor
    axes: dict[int, str]
    metadata: dict[str, Any]
    measure: Measure
    tolerance: float
    count: int
    inputs: str = INPUT
    outputs: tuple[str, ...] = (OUTPUT,)


def _plan_of_trained(model: TrainedModel, images: Tensor | None, dynamic_batch: bool) -> _Plan:
    """Return the plan for a network with preprocessing and classes."""
    net = _prepared(model.net)
    compared = _comparison_images(images, model)
    batches = _batches(compared, dynamic_batch, BATCHES if isinstance(net, Net) else FEW_BATCHES)
    example = _example(compared, dynamic_batch)
    shape = tuple(_first_run(net, example).shape)
    if shape != (len(example), len(model.classes)):
        raise ValueError(
            problem(
                f"there are {len(model.classes)} class names for outputs of the shape {shape}",
                allowed="outputs B x K, with one class name per column",
            )
        )
    return _Plan(
        net, example, {0: "batch"} if dynamic_batch else {}, _metadata_of(model),
        lambda run: compare(run, net, compared, batches=batches),
        TOLERANCE if isinstance(net, Net) else WIDE_TOLERANCE, min(len(compared), max(batches)),
    )  # fmt: skip


def _plan_of_module(model: nn.Module, images: Any, dynamic_batch: bool) -> _Plan:
    """Return the plan for a module of a user."""
    if not isinstance(images, Tensor) or not images.dim() or not len(images):
        raise ValueError(
            problem(
                f"{type(model).__name__} is exported without images, so the shape of its input is not known",
                allowed="a tensor of inputs, B x ..., B at least 1",
                fix="pass images=",
            )
        )
    compared = images.detach().cpu().float()
    net = _prepared(model)
    batches = _batches(compared, dynamic_batch, FEW_BATCHES)
    example = _example(compared, dynamic_batch)
    paths, _ = tree_flatten_with_path(_first_run(net, example))
    names = tuple(_output_name(keys) for keys, _ in paths)
    return _Plan(
        net, example, {0: "batch"} if dynamic_batch else {}, {"row": type(model).__name__},
        lambda run: compare(run, lambda x: joined(net(x), len(x)), compared, batches=batches),
        WIDE_TOLERANCE, min(len(compared), max(batches)), outputs=(OUTPUT,) if len(names) == 1 else names,
    )  # fmt: skip


def _plan_with_preprocessing(model: TrainedModel | nn.Module, images: Any) -> _Plan:
    """Return the plan for a network with its preprocessing inside."""
    if not isinstance(model, TrainedModel):
        raise ValueError(
            problem(
                f"{type(model).__name__} has no preprocessing",
                allowed="a TrainedModel",
                fix="pass TrainedModel(module, preprocessing, classes)",
            )
        )
    net = _prepared(model.net)
    whole = PreprocessedNet(net, model.preprocessing, model.probabilities).eval()
    pixels = example_pixels() if images is None else [as_pixels(image) for image in images][: BATCHES[-1]]

    def measure(run: Run) -> tuple[dict[int, float], float]:
        return compare_with_pillow(run, net, model, pixels, close=PROBABILITY_TOLERANCE)

    return _Plan(
        whole, pixels[0], {0: "height", 1: "width"}, _metadata_of(model), measure, PROBABILITY_TOLERANCE, len(pixels),
        inputs=IMAGE, outputs=(PROBABILITIES,),
    )  # fmt: skip


def _metadata_of(model: TrainedModel) -> dict[str, Any]:
    """Return the metadata of a trained model."""
    name = getattr(model.net, "name", "") or type(model.net).__name__
    return {
        "row": name, "classes": list(model.classes), "preprocessing": asdict(model.preprocessing),
        **({"sigmoid": True} if model.sigmoid else {}),
    }  # fmt: skip


def _prepared(net: nn.Module) -> nn.Module:
    """Return a copy on the CPU in float32 and in evaluation mode, for which no gradients are computed."""
    return copy.deepcopy(net).cpu().float().eval().requires_grad_(False)


def _batches(images: Tensor, dynamic_batch: bool, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch sizes of the comparison."""
    return sizes if dynamic_batch else (len(images),)


def _example(images: Tensor, dynamic_batch: bool) -> Tensor:
    """Return the input for tracing. A batch of one would be taken for a constant."""
    return images[torch.arange(2) % len(images)].contiguous() if dynamic_batch else images


@torch.no_grad()
def _first_run(net: nn.Module, example: Tensor) -> Any:
    """Return the output of a network for the example."""
    try:
        return net(example)
    # A module of a user may raise anything.
    except Exception as error:
        raise ValueError(
            problem(
                f"{type(net).__name__} cannot be run on a batch of {len(example)}: {first_line(error)}",
                fix="pass images of its input shape; if it needs this batch size, dynamic_batch=False",
            )
        ) from None


def _output_name(keys: tuple[Any, ...]) -> str:
    """Return the name of an output from its keys in a dict, tuple or named tuple."""
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in keys]
    return "_".join(f"output_{part}" if part.isdigit() else part for part in parts)


# --- writing and comparison --------------------------------------------------------------------------------------


class _Written(NamedTuple):
    census: Counter[str]
    weight_arithmetic: int
    errors: dict[int, float]
    top1_agreement: float


@torch.no_grad()
def _write_and_compare(
    job: ExportJob, path: Path, plan: _Plan, *, folded: bool, format: str, tolerance: float
) -> _Written:
    """Write the file, open it again and compare it with the network."""
    net = job.net
    if folded:
        # With an example, batch norm is also folded in models that torch.fx cannot trace.
        net = fold_module.fold(net) if job.plain else fold_module.fold(net, job.example)
        net = net.eval().requires_grad_(False)
    if format == "pt2":
        census, idle = write_pt2(net, path, job)
        module = open_pt2(path)
        run: Run = lambda x: joined(module(x), len(x))  # noqa: E731
    elif format == "onnx":
        assert job.opset is not None
        census, idle = write_onnx(net, path, job, opset=job.opset)
        run = _runner(open_graph(path))
    else:
        assert job.opset is not None
        with tempfile.TemporaryDirectory() as folder:
            onnx_path = Path(folder) / "model.onnx"
            _, idle = write_onnx(net, onnx_path, job, opset=job.opset)
            census = write_openvino(onnx_path, path, job.metadata)
        run = _runner(OpenVinoNet(compile_openvino(read_openvino(path)), name=job.name))
    errors, agreement = plan.measure(run)
    if not max(errors.values()) <= tolerance or agreement < 100:
        found = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in errors.items())
        raise ValueError(
            problem(
                f"{job.name} was not kept: its {job.outputs[0]} differ from those of the network by {found}, and its "
                f"top-1 class on {100 - agreement:.2f} % of the images",
                allowed=f"{tolerance:g} and 0 %",
            )
        )
    return _Written(census, idle, errors, agreement)


def _runner(net: ExportedNet) -> Run:
    """Return the outputs of a file as one tensor, as `joined` does."""
    return lambda x: joined(net.run(x.contiguous()), len(x))


def _comparison_images(images: Tensor | None, model: TrainedModel) -> Tensor:
    """Return `images` after a check of their shape, or a batch of Gaussian noise if there are none."""
    shape = model.preprocessing.shape
    if images is None:
        return torch.randn(BATCHES[-1], *shape, generator=torch.Generator().manual_seed(0))
    if images.dim() != 4 or tuple(images.shape[1:]) != shape or not len(images):
        raise ValueError(
            problem(
                f"images have the shape {tuple(images.shape)}",
                allowed=f"B x {' x '.join(map(str, shape))}, B at least 1",
                fix="prepare them with model.preprocessing",
            )
        )
    return images.detach().cpu().float()


def _check(model: TrainedModel | nn.Module, path: Path, *, format: str, opset: int) -> None:
    """Check the arguments of `export`."""
    net = model.net if isinstance(model, TrainedModel) else model
    if isinstance(net, ExportedNet):
        raise ValueError(
            problem(
                f"{net.name} was read from an exported file",
                fix="export the run or model folder that the file was made from",
            )
        )
    if not isinstance(net, nn.Module):
        raise ValueError(
            problem(
                f"export cannot write {type(net).__name__}", allowed="a TrainedModel or a torch.nn.Module"
            )
        )
    if isinstance(model, TrainedModel):
        model.require_classes()
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    suffix = FORMATS[format]
    if path.suffix != suffix:
        meant = next((name for name, own in FORMATS.items() if own == path.suffix), "")
        raise ValueError(
            problem(
                f"path is {str(path)!r} with format={format!r}",
                allowed=f"names that end in {suffix}",
                fix=f"use {str(path.with_suffix(suffix))!r}" + (f", or format={meant!r}" if meant else ""),
            )
        )
    if path.is_dir():
        raise ValueError(problem(f"{str(path)!r} is a folder", allowed="the name of a file"))
    if format != "pt2" and opset not in OPSETS:
        near = min(max(opset, OPSETS[0]), OPSETS[-1])
        raise ValueError(
            problem(f"opset is {opset}", allowed=f"{OPSETS[0]} to {OPSETS[-1]}", fix=f"use {near}")
        )
    if isinstance(net, Net) and isinstance(model, TrainedModel) and len(model.classes) != net.num_classes:
        raise ValueError(
            problem(
                f"there are {len(model.classes)} class names for {net.num_classes} outputs",
                allowed="one class name per output",
            )
        )
