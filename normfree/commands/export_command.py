"""`normfree export`: one file for other runtimes, compared with the network on real images, and its int8 form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError, tell
from normfree.suggest import number_of, problem

if TYPE_CHECKING:
    from torch import Tensor

    from normfree.data.source import Source
    from normfree.deploy.export import ExportReport
    from normfree.preprocessing import Preprocessing
    from normfree.pretrained import TrainedModel

# Images on which file and network are compared: as many as the largest batch of the comparison has.
COMPARED = 64
# Images that determine the int8 ranges; docs/export.md states the cost of fewer.
CALIBRATED = 512
BATCH = 32


@dataclass
class ExportArguments:
    """Write one file for other runtimes, with preprocessing and class names inside, after comparing it with the network
    on real images."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder, or hf-hub:OWNER/NAME."""
    format: Literal["onnx", "openvino", "pt2"] = "onnx"
    """onnx: for onnxruntime and others; openvino: an .xml and a .bin file; pt2: for torch.export."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """File to write; default: model.onnx, model.xml or model.pt2 in the folder, and model.with-preprocessing.onnx, .xml
    or .pt2 for --with-preprocessing."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Files and folders of images to compare on; default: the validation part of the run's data."""
    unfolded: bool = False
    """Keep weight standardization and norms as they are in training."""
    with_preprocessing: bool = False
    """Put the preprocessing into the graph: an image of bytes, H x W x 3, of any size in, probabilities out."""
    int8: bool = False
    """Also write an int8 file, calibrated on the images, and print its accuracy and speed (not for pt2)."""
    opset: int = 20
    """Version of the ONNX operator set, 18 to 25."""


@dataclass(frozen=True)
class _Images:
    """The images of an export: functions that return up to n of them, normalized or as they are, and names."""

    compare: Callable[[int], Tensor]
    calibrate: Callable[[int], Tensor]
    pixels: Callable[[int], list[Any]]
    # A source to measure accuracy on, or None if the images have no labels.
    labeled: Source | None
    compare_name: str
    calibrate_name: str


def export_(arguments: ExportArguments) -> int:
    """Export the model and print the reports; return 0."""
    from normfree.deploy.export import FORMATS, export
    from normfree.pretrained import from_pretrained

    if arguments.int8 and (arguments.format == "pt2" or arguments.unfolded or arguments.with_preprocessing):
        raise UsageError(
            problem("--int8 is given with --unfolded, --with-preprocessing or --format pt2",
                    allowed="--int8 with a folded ONNX or OpenVINO file", fix="leave out the other option")
        )  # fmt: skip
    if Path(arguments.model).is_file():
        raise UsageError(
            problem(f"{arguments.model!r} is a file", allowed="a run or model folder",
                    fix="give the folder that the file was made from")
        )  # fmt: skip
    model = from_pretrained(arguments.model)
    model.require_classes()
    tell(model.note)
    images = _images(arguments, model)
    suffix = ".with-preprocessing" * arguments.with_preprocessing + FORMATS[arguments.format]
    out = Path(arguments.out) if arguments.out else _default_out(arguments.model, suffix)
    compared = (images.pixels if arguments.with_preprocessing else images.compare)(COMPARED)
    report = export(model, out, format=arguments.format, folded=not arguments.unfolded, images=compared,
                    opset=arguments.opset, with_preprocessing=arguments.with_preprocessing)  # fmt: skip
    _print_report(report, images.compare_name, with_preprocessing=arguments.with_preprocessing)
    if arguments.int8:
        _quantize(report, model, images)
    return 0


def _default_out(model: str, suffix: str) -> Path:
    """Return the file to write if --out is not given."""
    folder = Path(model)
    return folder / f"model{suffix}" if folder.is_dir() else Path(f"{folder.name.partition('@')[0]}{suffix}")


# --- reports -----------------------------------------------------------------------------------------


def _print_report(report: ExportReport, images: str, *, with_preprocessing: bool) -> None:
    """Print what was written and how it compares with the network."""
    format = {"onnx": f"ONNX opset {report.opset}", "openvino": "OpenVINO", "pt2": "torch.export"}[
        report.format
    ]
    folded = "folded" if report.folded else "not folded"
    census = ", ".join(f"{kind.removeprefix('aten.')} {n}" for kind, n in report.census.most_common())
    errors = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in report.errors.items())
    print(
        f"{report.path}: {_megabytes(report.bytes)}, {format}, float32, {folded}, {sum(report.census.values())} nodes"
    )
    print(f"  {census}")
    print(
        f"  {report.batch_norms} batch norms, {report.weight_arithmetic} nodes that compute on weights alone"
    )
    if with_preprocessing:
        found = f"against normfree predict on {report.images} {images}: largest difference of a probability "
        found += f"{report.errors[1]:.1e}"
    else:
        found = f"against the network on {report.images} {images}: largest relative error {errors}"
    print(f"  {found}; first class the same on {report.top1_agreement:.0f} %")


def _megabytes(size: int) -> str:
    """Return a size in bytes as text in megabytes."""
    return f"{size / 1e6:.2f} MB"


def _quantize(report: ExportReport, model: TrainedModel, images: _Images) -> None:
    """Write the int8 form of the exported file and print its size, accuracy and speed."""
    import torch

    from normfree.deploy.quantize import images_per_second, quantize
    from normfree.inference import evaluate
    from normfree.pretrained import from_pretrained

    batches = images.calibrate(CALIBRATED).split(BATCH)
    out = report.path.with_suffix(f".int8{report.path.suffix}")
    small = quantize(report.path if report.format == "onnx" else model, out, calibration=batches)
    print(f"{small.path}: {_megabytes(small.bytes)}, {100 * small.bytes / small.float_bytes:.1f} % of the float file; "
          f"{small.quantized} convolutions and products in 8 bits, {small.left_float} in float")  # fmt: skip
    if small.images < BATCH:
        print(f"  only {number_of(small.images, 'image')} set its ranges. Fix: --images with a few hundred")
    print(f"  against the float file on {small.images} {images.calibrate_name} that set its ranges: median "
          f"relative error {100 * small.error:.1f} %, first class the same on "
          f"{small.top1_agreement:.1f} %")  # fmt: skip
    nets = [from_pretrained(path).net for path in (report.path, small.path)]
    if images.labeled is None:
        print("  accuracy not measured, because the images have no labels. Fix: --images FOLDER with one subfolder for "
              "each of the model's classes")  # fmt: skip
    else:
        float_, int8 = (
            evaluate(net, images.labeled, preprocessing=model.preprocessing, device="cpu") for net in nets
        )
        print(f"  top-1 on {number_of(len(images.labeled), 'labeled image')}: float {float_.top1_text()} %, int8 "
              f"{int8.top1_text()} %, {int8.top1 - float_.top1:+.2f} points")  # fmt: skip
    for size in (1, BATCH):
        before, after = images_per_second(nets, batches[0][torch.arange(size) % len(batches[0])])
        print(f"  images/s at batch {size}: float {before:.0f}, int8 {after:.0f} ({after / before:.2f}x)")


# --- images ------------------------------------------------------------------------------------------


def _images(arguments: ExportArguments, model: TrainedModel) -> _Images:
    """Return the images that the arguments name, or those of the run."""
    config = Path(arguments.model) / "config.toml"
    if arguments.images:
        return _images_of_paths(arguments.images, model)
    if config.is_file():
        return _images_of_run(config, model.preprocessing)
    raise UsageError(
        problem(f"{arguments.model} names no data, because it is not a run, and the exported file is compared on real "
                "images", fix="add --images FOLDER; a few dozen images are enough")
    )  # fmt: skip


def _images_of_run(path: Path, pre: Preprocessing) -> _Images:
    """Return the images of a run's data."""
    from normfree.data.subset import spread_indices
    from normfree.inference import sample_images
    from normfree.training.run_data import open_run_data

    try:
        split = open_run_data(path.parent, fix=f"normfree export {path.parent} --images FOLDER")
    except ModuleNotFoundError as error:
        raise UsageError(f"{error} Or give other images with --images FOLDER.") from None
    return _Images(
        lambda n: sample_images(split.val, count=n, preprocessing=pre),
        lambda n: sample_images(split.train, count=n, preprocessing=pre),
        lambda n: [split.val.image(i) for i in spread_indices(len(split.val), n)],
        split.val, "validation images", "training images",
    )  # fmt: skip


def _images_of_paths(paths: tuple[str, ...], model: TrainedModel) -> _Images:
    """Return the images in files and folders."""
    from normfree.data.subset import spread_indices
    from normfree.data.transforms.decode import load_image
    from normfree.data.walk import find_images
    from normfree.inference import sample_images

    files = find_images(paths)

    def sample(count: int) -> Tensor:
        return sample_images(files, count=count, preprocessing=model.preprocessing)

    def pixels(count: int) -> list[Any]:
        return [load_image(files[i]) for i in spread_indices(len(files), count)]

    return _Images(sample, sample, pixels, _labeled(paths, model), "images", "images")


def _labeled(paths: tuple[str, ...], model: TrainedModel) -> Source | None:
    """Return the source of a single folder with one subfolder for each of the model's classes; None for others."""
    from normfree.data.sources.open import open_labeled

    try:
        source = open_labeled(paths[0]) if len(paths) == 1 and Path(paths[0]).is_dir() else None
    except ValueError:
        return None
    return source if source is not None and tuple(source.classes) == model.classes else None
