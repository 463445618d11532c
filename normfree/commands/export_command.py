"""`normfree export`: one file for other runtimes, compared on real pictures, and its int8 form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from normfree.commands.usage import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from normfree.data.source import Source
    from normfree.deploy.export import ExportReport
    from normfree.preprocessing import Preprocessing
    from normfree.pretrained import TrainedModel

COMPARED = 64  # pictures on which file and network are compared: the largest of the compared batches
CALIBRATED = 512  # pictures that set the int8 ranges; docs/export.md has what fewer do
BATCH = 32


@dataclass
class ExportArguments:
    """One file for other runtimes, with preprocessing and class names inside, compared with the network on real
    pictures before it is kept."""

    model: Positional[str]
    """A run or model folder, or hf-hub:OWNER/NAME."""
    format: Literal["onnx", "pt2"] = "onnx"
    """onnx: for onnxruntime and others; pt2: torch.export."""
    out: str = ""
    """The file; default: model.onnx or model.pt2 in the folder."""
    images: tuple[str, ...] = ()
    """Pictures to compare on: files and folders; default: the validation part of the run's data."""
    unfolded: bool = False
    """Keep weight standardization and norms as they are in training."""
    int8: bool = False
    """Also write the int8 form, calibrated on the pictures, and print what it costs (onnx only)."""
    opset: int = 20
    """Version of ONNX's operators, 18 to 25."""


@dataclass(frozen=True)
class _Pictures:
    """Where pictures come from. `get(n)` gives up to n, normalized; `labelled` is a source to score on, if any."""

    compare: Callable[[int], Tensor]
    calibrate: Callable[[int], Tensor]
    labelled: Source | None
    words: tuple[str, str]
    """What `compare` and `calibrate` hold, in words."""


def export_(arguments: ExportArguments) -> int:
    from normfree.deploy.export import export
    from normfree.pretrained import from_pretrained

    if arguments.int8 and (arguments.format != "onnx" or arguments.unfolded):
        raise UsageError("--int8 quantizes the folded ONNX file; drop --unfolded and --format pt2.")
    if Path(arguments.model).is_file():
        raise UsageError(f"{arguments.model!r} is a file. Give the run or model folder that it came from.")
    model = from_pretrained(arguments.model)
    pictures = _pictures(arguments, model)
    out = Path(arguments.out) if arguments.out else _default(arguments.model, arguments.format)
    report = export(model, out, format=arguments.format, folded=not arguments.unfolded,
                    images=pictures.compare(COMPARED), opset=arguments.opset)  # fmt: skip
    _say_export(report, pictures.words[0])
    if arguments.int8:
        _int8(report, model, pictures)
    return 0


def _default(model: str, format: str) -> Path:
    folder = Path(model)
    return (
        folder / f"model.{format}" if folder.is_dir() else Path(f"{folder.name.partition('@')[0]}.{format}")
    )


def _say_export(report: ExportReport, pictures: str) -> None:
    form = f"ONNX opset {report.opset}" if report.opset else "torch.export"
    nodes = sum(report.census.values())
    kind = "folded" if report.folded else "not folded"
    print(f"{report.path}: {_megabytes(report.bytes)}, {form}, {kind}, {nodes} nodes")
    print(f"  {_census(report.census)}")
    print(
        f"  {report.batch_norms} batch norms, {report.weight_arithmetic} nodes that compute on weights alone"
    )
    errors = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in report.errors.items())
    print(f"  against the network on {report.images} {pictures}: largest relative error {errors}; "
          f"first class the same on {report.top1_agreement:.0f} %")  # fmt: skip


def _census(census: Counter[str]) -> str:
    return ", ".join(f"{kind.removeprefix('aten.')} {count}" for kind, count in census.most_common())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _int8(report: ExportReport, model: TrainedModel, pictures: _Pictures) -> None:
    import torch

    from normfree.deploy.quantize import images_per_second, quantize
    from normfree.inference import evaluate
    from normfree.onnx_net import open_onnx

    batches = pictures.calibrate(CALIBRATED).split(BATCH)
    small = quantize(report.path, report.path.with_suffix(".int8.onnx"), calibration=batches)
    print(f"{small.path}: {_megabytes(small.bytes)}, {100 * small.bytes / small.float_bytes:.1f} % of the float file; "
          f"{small.quantized} convolutions and products in 8 bits, {small.left_float} in float")  # fmt: skip
    print(f"  against the float file on the {small.images} {pictures.words[1]} that set its ranges: median relative "
          f"error {100 * small.error:.1f} %, first class the same on {small.top1_agreement:.1f} %")  # fmt: skip
    nets = [open_onnx(path)[0] for path in (report.path, small.path)]
    if pictures.labelled is None:
        print(
            "  accuracy not measured: no labels; give --images a folder of class folders with the model's classes"
        )
    else:
        before, after = (
            evaluate(net, pictures.labelled, preprocessing=model.preprocessing, device="cpu").top1
            for net in nets
        )
        print(f"  top-1 on {len(pictures.labelled)} labelled pictures: float {before:.2f} %, int8 {after:.2f} %, "
              f"{after - before:+.2f} points")  # fmt: skip
    for size in (1, BATCH):
        before, after = images_per_second(nets, batches[0][torch.arange(size) % len(batches[0])])
        print(f"  images/s at batch {size}: float {before:.0f}, int8 {after:.0f} ({after / before:.2f}x)")


# --- where the pictures come from --------------------------------------------------------------------


def _pictures(arguments: ExportArguments, model: TrainedModel) -> _Pictures:
    config = Path(arguments.model) / "config.toml"
    if arguments.images:
        return _given(arguments.images, model)
    if config.is_file():
        return _of_run(config, model.preprocessing)
    raise UsageError(f"{arguments.model} is no run, so it names no data, and the file must be compared on real "
                     "pictures. Add --images FOLDER; a few dozen are enough.")  # fmt: skip


def _of_run(path: Path, pre: Preprocessing) -> _Pictures:
    from normfree.data.sources.open import open_source
    from normfree.training.config_io import load_config

    config = load_config(path)
    try:
        split = open_source(config.data, val_fraction=config.input.val_fraction, seed=config.seed)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(
            f"the run's data cannot be read: {error}. Or give other pictures: --images FOLDER"
        ) from None
    return _Pictures(
        lambda n: _of_source(split.val, n, pre), lambda n: _of_source(split.train, n, pre), split.val,
        ("validation pictures", "training pictures"),
    )  # fmt: skip


def _given(paths: tuple[str, ...], model: TrainedModel) -> _Pictures:
    import torch

    from normfree.data.transforms.decode import load_image
    from normfree.data.transforms.normalize import normalize
    from normfree.inference import find_images

    pre, files = model.preprocessing, find_images(paths)

    def get(count: int) -> Tensor:
        transform = pre.transform()
        images = torch.stack([transform(load_image(files[i])) for i in _spread(len(files), count)])
        return normalize(images, mean=pre.mean, std=pre.std)

    return _Pictures(get, get, _labelled(paths, model), ("pictures", "pictures"))


def _labelled(paths: tuple[str, ...], model: TrainedModel) -> Source | None:
    """A single folder of class folders with the model's classes is labelled."""
    from normfree.data.sources.open import open_labeled

    try:
        source = open_labeled(paths[0]) if len(paths) == 1 and Path(paths[0]).is_dir() else None
    except ValueError:  # a folder of loose pictures
        return None
    return source if source is not None and tuple(source.classes) == model.classes else None


def _of_source(source: Source, count: int, pre: Preprocessing) -> Tensor:
    import torch

    from normfree.data.transforms.normalize import normalize

    transform = pre.transform()
    images = torch.stack([transform(source.image(i)) for i in _spread(len(source), count)])
    return normalize(images, mean=pre.mean, std=pre.std)


def _spread(have: int, want: int) -> list[int]:
    """Up to `want` of `have` positions, evenly spread, since neighbours are often of one class."""
    count = min(have, want)
    return [i * have // count for i in range(count)]
