"""Export of a trained network to one file for other runtimes: ONNX, or the .pt2 format of torch.export.

The file is written under a temporary name, opened by the runtime that will use it, compared with the network on
images, and only then renamed to its final name.

Shapes: B batch, C channels, S image size, K classes.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normfree._version import __version__
from normfree.deploy import fold as fold_module
from normfree.deploy.graph_writers import ExportJob, open_pt2, write_onnx, write_pt2
from normfree.files import atomic_write
from normfree.models.net import Net
from normfree.onnx_net import open_onnx
from normfree.pretrained import TrainedModel
from normfree.suggest import problem, unknown

FORMATS = ("onnx", "pt2")
# Batch sizes at which a file is compared: one, the smallest batch above one, an odd size and a large one.
BATCHES = (1, 2, 5, 64)
# Largest allowed ||file - network|| / ||network|| of the logits of an image. Sums in a different order change the
# float32 logits of these networks by 1e-7 to 5e-6; an error in the graph changes them by far more than 1e-5.
TOLERANCE = 1e-5
# Versions of the ONNX operator set that PyTorch's exporter writes correctly and onnxruntime 1.32 reads.
OPSETS = range(18, 26)


@dataclass(frozen=True)
class ExportReport:
    """The exported file, and its difference to the network.

    Attributes:
        path: the file.
        format: "onnx" or "pt2".
        bytes: size of the file.
        opset: version of the ONNX operator set; None for pt2.
        folded: True if the folded network was exported.
        census: number of nodes of the graph by kind.
        weight_arithmetic: number of nodes that do not depend on the images, so they compute on weights alone.
        errors: batch size -> largest ||file - network|| / ||network|| of the logits of an image.
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
    model: TrainedModel,
    path: str | Path,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    folded: bool = True,
    images: Tensor | None = None,
    opset: int = 20,
) -> ExportReport:
    """Write `model` to one file with weights, preprocessing and class names, and compare the file with the network.

    The file has a free batch size. Its input is `images`, float32 B C S S, normalized; its output is `logits`, B K.

    Args:
        model: a trained network with its preprocessing and classes; it is left unchanged.
        path: the file to write, with the suffix .onnx or .pt2. An existing file is replaced.
        format: "onnx" (needs `normfree[onnx]`) or "pt2" (torch.export).
        folded: export the folded network: plain convolutions, fewer nodes, the same outputs.
        images: normalized images B C S S on which file and network are compared at batch sizes 1, 2, 5 and 64. The
            first 64 are used, and repeated if there are fewer. Without images, noise is used, which detects fewer
            errors.
        opset: version of the ONNX operator set, 18 to 25; ignored for pt2.

    Returns:
        Size and nodes of the file, and its difference to the network.

    Raises:
        ValueError: an argument is invalid. Or the logits of the file differ from those of the network by more than
            1e-5, it predicts another class, or a folded file still contains norms or computes on weights; then no file
            is written.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.

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
    net = _check(model, path, format=format, opset=opset)
    compared = _comparison_images(images, model, net)
    original = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    metadata = json.dumps(
        {
            "row": net.name, "version": __version__, "classes": list(model.classes),
            "preprocessing": asdict(model.preprocessing), "opset": opset if format == "onnx" else None,
            "folded": folded, **({"sigmoid": True} if model.sigmoid else {}),
        },
        ensure_ascii=False,
    )  # fmt: skip
    job = ExportJob(
        original, metadata, folded=folded, opset=opset if format == "onnx" else None, name=path.name
    )
    done: list[_Written] = []
    atomic_write(path, lambda temporary: done.append(_write_and_compare(job, temporary, compared)))
    (written,) = done
    return ExportReport(
        path=path, format=format, bytes=path.stat().st_size, opset=job.opset, folded=folded, census=written.census,
        weight_arithmetic=written.weight_arithmetic, errors=written.errors, top1_agreement=written.top1_agreement,
        images=min(len(compared), BATCHES[-1]), noise=images is None,
    )  # fmt: skip


class _Written(NamedTuple):
    census: Counter[str]
    weight_arithmetic: int
    errors: dict[int, float]
    top1_agreement: float


@torch.no_grad()
def _write_and_compare(job: ExportJob, path: Path, images: Tensor) -> _Written:
    """Write the file, open it again and compare it with the network."""
    plain = fold_module.fold(job.net).eval().requires_grad_(False) if job.folded else job.net
    example = torch.zeros(2, *images.shape[1:])
    if job.opset is not None:
        census, idle = write_onnx(plain, example, path, job, opset=job.opset)
        run: Callable[[Tensor], Tensor] = open_onnx(path)[0]
    else:
        census, idle = write_pt2(plain, example, path, job)
        run = open_pt2(path)
    errors, agreement = compare(run, job.net, images)
    if not max(errors.values()) <= TOLERANCE or agreement < 100:
        found = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in errors.items())
        raise ValueError(
            problem(
                f"{job.name} was not kept: its logits differ from those of the network by {found}, and its top-1 class "
                f"on {100 - agreement:.2f} % of the images",
                allowed=f"{TOLERANCE:g} and 0 %",
            )
        )
    return _Written(census, idle, errors, agreement)


def _comparison_images(images: Tensor | None, model: TrainedModel, net: Net) -> Tensor:
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


def compare(
    run: Callable[[Tensor], Tensor], net: Callable[[Tensor], Tensor], images: Tensor
) -> tuple[dict[int, float], float]:
    """Measure the difference of two functions of images, B C S S -> logits B K, at each batch size of `BATCHES`.

    Images are repeated to fill a batch.

    Returns:
        For each batch size, the largest ||run - net|| / ||net|| of the logits of an image; and the percent of images
        with the same top-1 class. Two classes whose logits in `net` are closer than the tolerance count as the same.
    """
    errors: dict[int, float] = {}
    same = total = 0
    for batch in BATCHES:
        x = images[torch.arange(batch) % len(images)].contiguous()
        expected, actual = net(x).double(), run(x).double()
        norm = expected.norm(dim=1)
        gap = (actual - expected).norm(dim=1)
        # The logits of an untrained classifier are all 0, so 0 / 0 counts as 0.
        errors[batch] = float((gap / norm).where(gap > 0, gap).max())
        chosen = expected.gather(1, actual.argmax(dim=1, keepdim=True))[:, 0]
        same += int((expected.max(dim=1).values - chosen <= 2 * TOLERANCE * norm).sum())
        total += batch
    return errors, 100 * same / total


def _check(model: TrainedModel, path: Path, *, format: str, opset: int) -> Net:
    """Check the arguments of `export`, and return the network."""
    net = model.net
    if not isinstance(net, Net):
        raise ValueError(
            problem(
                f"{net.name} was read from an exported file",
                fix="export the run or model folder that the file was made from",
            )
        )
    model.require_classes()
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    if path.suffix != f".{format}":
        raise ValueError(
            problem(
                f"path is {str(path)!r} with format={format!r}",
                allowed=f"names that end in .{format}",
                fix=f"use {str(path.with_suffix('.' + format))!r}",
            )
        )
    if path.is_dir():
        raise ValueError(problem(f"{str(path)!r} is a folder", allowed="the name of a file"))
    if format == "onnx" and opset not in OPSETS:
        near = min(max(opset, OPSETS[0]), OPSETS[-1])
        raise ValueError(
            problem(f"opset is {opset}", allowed=f"{OPSETS[0]} to {OPSETS[-1]}", fix=f"use {near}")
        )
    if len(model.classes) != net.num_classes:
        raise ValueError(
            problem(
                f"there are {len(model.classes)} class names for {net.num_classes} outputs",
                allowed="one class name per output",
            )
        )
    return net
