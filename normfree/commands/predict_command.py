"""`normfree predict`: the most probable classes of images."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError, check_given, check_target, tell
from normfree.suggest import number_of, printable, problem

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import IO

    from normfree.prediction import Answer
    from normfree.pretrained import TrainedModel


@dataclass
class PredictArguments:
    """Predict the classes of images: files, all images in folders and their subfolders, URLs, videos and cameras.

    The network computes in float32, whatever it was trained in.
    """

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder."""
    paths: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH...")]
    """Image files, folders, patterns such as 'photos/*.jpg', http and https URLs, video files, and camera:0 for the
    first camera. Videos and cameras need normfree[video]."""
    top: int = 5
    """Number of classes to print for each image."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.csv")] = ""
    """Write to this file instead; its name ends in .csv, .jsonl, .json or .html (a page with the images)."""
    wide: bool = False
    """For CSV: one line for each image, with a column for the probability of each class."""
    heatmap: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Write the images to this folder with Grad-CAM heat maps of what the most probable class is seen in."""
    every: int = 1
    """Use every N-th frame of videos and cameras."""
    embeddings: Annotated[str, tyro.conf.arg(metavar="FILE.npz")] = ""
    """Write the embeddings (the features before the classifier) to this .npz file, with arrays paths and embeddings,
    instead of predicting classes."""
    format: Literal["table", "csv", "jsonl", "json"] = "table"
    """What to print without --out."""
    batch_size: int = 64
    """Images per forward pass."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""


def predict_(arguments: PredictArguments) -> int:
    """Print or write the predictions; return 0, or 2 if an image cannot be read."""
    from normfree.data.walk import left_out, walk_images
    from normfree.pretrained import from_pretrained

    if arguments.heatmap and not arguments.paths:
        given = f"no path was given, and {arguments.heatmap!r} is the folder of --heatmap"
        fix = f"normfree predict {arguments.model} {arguments.heatmap} --heatmap FOLDER"
        raise UsageError(problem(given, fix=fix))
    check_given(arguments.paths, "path")
    if arguments.embeddings:
        return _embed(arguments)
    format = _format(arguments)
    model = from_pretrained(arguments.model)
    tell(model.note)
    failed = _write_answers(arguments, format, model, _answers(arguments, format, model))
    others = sum((walk_images(Path(p))[1] for p in arguments.paths if Path(p).is_dir()), Counter[str]())
    tell("".join(left_out(others)))
    if failed:
        tell(f"images that could not be read: {failed}; the output states the reason for each")
    return 2 if failed else 0


def _answers(arguments: PredictArguments, format: str, model: TrainedModel) -> Iterator[Answer]:
    """Return the predictions, with copies of the images if they are shown or written."""
    from normfree.commands.predict_output import HEATMAP, THUMBNAIL
    from normfree.prediction import answers

    view = HEATMAP if arguments.heatmap else THUMBNAIL if format == "html" else None
    top = max(arguments.top, len(model.classes)) if arguments.wide else arguments.top
    return answers(model, arguments.paths, top=top, every=arguments.every, batch_size=arguments.batch_size,
                   device=arguments.device, view=view, heat=bool(arguments.heatmap))  # fmt: skip


def _write_answers(
    arguments: PredictArguments, format: str, model: TrainedModel, answers: Iterator[Answer]
) -> int:
    """Write the predictions and the heat maps; return the number of images that cannot be read."""
    from normfree.commands.predict_output import HeatmapFolder, writer_of

    maps = HeatmapFolder(Path(arguments.heatmap)) if arguments.heatmap else None
    count = failed = 0
    with _output(arguments.out) as file:
        title = f"Predictions of {arguments.model}"
        writer = writer_of(format, file, classes=model.classes, wide=arguments.wide, title=title)
        try:
            for answer in answers:
                count += 1
                failed += bool(answer.prediction.error)
                writer.write(answer, maps.save(answer) if maps else "")
        finally:  # a camera is ended by Ctrl-C
            writer.close()
    if arguments.out:
        print(f"{arguments.out}: {number_of(count - failed, 'image')}")
    if maps and (arguments.out or format == "table"):
        print(f"{arguments.heatmap}: {number_of(maps.count, 'heat map')}")
    return failed


def _output(out: str) -> AbstractContextManager[IO[str]]:
    """Return the file to write, or the standard output, which stays open."""
    from contextlib import nullcontext

    return open(out, "w", encoding="utf-8", newline="") if out else nullcontext(sys.stdout)


def _embed(arguments: PredictArguments) -> int:
    """Write the embeddings; return 0, or 2 if an image cannot be read."""
    from normfree.embeddings import embed_files, save_embeddings
    from normfree.pretrained import from_pretrained

    others = [name for name in ("out", "wide", "heatmap") if getattr(arguments, name)]
    if others:
        given = f"--embeddings with {' and '.join(f'--{name}' for name in others)}"
        raise UsageError(problem(given, allowed="embeddings or predictions", fix="run the command twice"))
    out = Path(arguments.embeddings)
    if out.suffix != ".npz":
        given = f"--embeddings is {arguments.embeddings!r}"
        fix = f"--embeddings {out.with_suffix('.npz')}"
        raise UsageError(problem(given, allowed="a name that ends in .npz", fix=fix))
    model = from_pretrained(arguments.model)
    tell(model.note)
    found = embed_files(model, arguments.paths, every=arguments.every, batch_size=arguments.batch_size,
                        device=arguments.device)  # fmt: skip
    save_embeddings(found, out)
    count, width = found.values.shape
    print(f"{arguments.embeddings}: {number_of(count, 'embedding')} of {width} numbers")
    for path, error in found.errors.items():
        print(f"{printable(path)}   {printable(error)}", file=sys.stderr)
    return 2 if found.errors else 0


def _format(arguments: PredictArguments) -> str:
    """Return the format of the output: that of --out by its suffix, else --format."""
    format: str = arguments.format
    if arguments.out:
        format = check_target(arguments.out, ("csv", "jsonl", "json", "html"), "--out")
    if arguments.wide and format != "csv":
        given = f"--wide with --out {arguments.out}" if arguments.out else f"--wide with --format {format}"
        raise UsageError(problem(given, allowed="--wide with CSV", fix="--wide --out predictions.csv"))
    return format
