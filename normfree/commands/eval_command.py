"""`normfree eval`: scores of a trained network on labeled images."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError, check_classifies, check_target, tell, with_classes
from normfree.suggest import number_of, problem

if TYPE_CHECKING:
    from normfree.data.record import SampleRecord
    from normfree.data.source import Source
    from normfree.pretrained import TrainedModel
    from normfree.scores import Evaluation

_PARTS = ("test", "val", "train")
_SHOWN = {"test": "test", "val": "validation", "train": "training"}
_USED = {"test": "of the test part", "val": "that chose the best step", "train": "that it was trained on"}


@dataclass
class EvalArguments:
    """Measure a trained network on labeled images, preprocessed as its config states.

    Images that the run was trained on are left out, and their number is printed."""

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A run or model folder. A run may be finished or not."""
    data: Annotated[Positional[str], tyro.conf.arg(metavar="DATA")] = ""
    """A folder with one subfolder per class, a table of paths and classes, or the name of a data set; default: the data
    of the run. Classes are found by name, and some may be missing."""
    part: Literal["auto", "test", "val", "train", "all"] = "auto"
    """Which part of the data to score. auto: the test part, else the validation part, else all images, without
    those that the run was trained on. train, all: also images that it was trained on."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.csv")] = ""
    """Write the answer for each image to this file; its name ends in .csv or .jsonl."""
    confusion: Annotated[str, tyro.conf.arg(metavar="FILE.png")] = ""
    """Write the confusion matrix to this file, a plot (.png) or a table (.csv)."""
    batch_size: int = 128
    """Images per forward pass."""
    workers: int = 0
    """Processes that load images; 0 loads them in this process."""
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    """cpu, cuda or mps; auto: the first GPU if there is one, else the CPU."""
    json: bool = False
    """Print one JSON object instead of a table."""


def eval_(arguments: EvalArguments) -> int:
    """Evaluate the model and print its scores; return 0."""
    from normfree.commands.eval_output import write_answers, write_confusion
    from normfree.data.multilabel import as_multilabel
    from normfree.exported_net import ExportedNet
    from normfree.inference import evaluate
    from normfree.pretrained import from_pretrained

    if arguments.out:
        check_target(arguments.out, ("csv", "jsonl"), "--out")
    if arguments.confusion:
        check_target(arguments.confusion, ("png", "csv"), "--confusion")
    model = from_pretrained(arguments.model)
    tell(model.note)
    source = _source(arguments, model)
    if as_multilabel(source) is not None and not model.sigmoid:
        given = f"the images of {arguments.data} have several classes, and {arguments.model} learned one for each image"
        raise UsageError(problem(given, fix="evaluate a model that was trained with --objective bce"))
    if as_multilabel(source) is not None and arguments.confusion:
        given = f"--confusion, and the images of {arguments.data or 'the run'} have several classes"
        raise UsageError(problem(given, allowed="images with one class each", fix="leave it out"))
    score = evaluate(model.net, source, preprocessing=model.preprocessing, batch_size=arguments.batch_size,
                     workers=arguments.workers, device=arguments.device, sigmoid=model.sigmoid)  # fmt: skip
    if arguments.out:
        write_answers(score, [source.name(i) for i in range(len(source))], Path(arguments.out))
    if arguments.confusion:
        write_confusion(score, Path(arguments.confusion))
    if arguments.json:
        print(json.dumps(_as_json(score)))
    else:
        exported = isinstance(model.net, ExportedNet)  # which may compute in 8 bits
        _print_table(score, f"computed by {arguments.model}" if exported else "in float32")
    return 0


# --- which images ---------------------------------------------------------------------------------------------


def _source(arguments: EvalArguments, model: TrainedModel) -> Source:
    """Return the images to score, with the model's classes."""
    from normfree.training.run_data import open_run_data, run_of

    check_classifies(model.classes, arguments.model)
    run = run_of(arguments.model)
    if not arguments.data and run is None:
        raise UsageError(
            problem(
                f"no data are given, and {arguments.model} is not a run", fix="add a folder of labeled images"
            )
        )
    own = run is not None and (not arguments.data or _is_data_of(run, arguments.data))
    if own:
        assert run is not None
        split = open_run_data(run, fix=f"normfree eval {run} DATA")
        parts = split.parts()
        if not split.held_out:  # its images are those of the training part
            del parts["val"]
        source, shown = _choose(parts, arguments.part), "the run's data"
    else:
        source, shown = _open_other(arguments, model), arguments.data
    source = with_classes(shown, source, model.classes)
    if run is None or (own and arguments.part != "auto") or arguments.part in ("train", "all"):
        return source
    return _without_trained(source, run, shown)


def _is_data_of(run: Path, data: str) -> bool:
    """Return True if `data` is what the run was trained on."""
    from normfree.training.config_io import load_config
    from normfree.training.run_data import located

    config = load_config(run / "config.toml")
    try:
        known = located(config, run).data
    except ValueError:
        known = config.data
    return (
        data in (config.data, known)
        or Path(data).expanduser().resolve() == Path(known).expanduser().resolve()
    )


def _choose(parts: dict[str, Source], part: str) -> Source:
    """Return one part of a run's data, or all of them."""
    from normfree.data.subset import Joined

    if part == "all":
        return Joined(list(parts.values()))
    name = next(name for name in _PARTS if name in parts) if part == "auto" else part
    if name not in parts:
        raise UsageError(
            problem(f"--part is {part}", allowed=f"{', '.join(parts)} or all, the parts of the run's data")
        )
    left_out = ", ".join(f"{len(parts[other])} {_USED[other]}" for other in parts if other != name)
    tell(f"scored on the {_SHOWN[name]} part of the run's data, {number_of(len(parts[name]), 'image')}; left out: "
         f"{left_out} (--part all scores them too)")  # fmt: skip
    return parts[name]


def _open_other(arguments: EvalArguments, model: TrainedModel) -> Source:
    """Return the images of other data than the run's."""
    from normfree.data.sources.open import open_labeled, open_source
    from normfree.data.subset import Joined
    from normfree.data.transforms.decode import FULL_RANGE

    data, white = arguments.data, model.preprocessing.pixel_range
    if white != FULL_RANGE and Path(data).is_dir():
        data = f"folder:{data},range={white}"
    if arguments.part in ("train", "all"):
        parts = open_source(data, pipes=True).parts()
        return Joined(list(parts.values())) if arguments.part == "all" else parts["train"]
    return open_labeled(data, pipes=True, part="test" if arguments.part == "auto" else arguments.part)


def _without_trained(source: Source, run: Path, shown: str) -> Source:
    """Return the images that the run was not trained on, or all of them with a warning if there are no others."""
    from normfree.data.record import trained_on
    from normfree.data.subset import Subset

    trained = set(trained_on(source, _samples_of(run)))
    if not trained:
        return source
    others = [index for index in range(len(source)) if index not in trained]
    if not others:
        count = number_of(len(source), "image")
        tell(f"WARNING: {run} was trained on all {count} of {shown}; the score tells nothing about new ones")
        return source
    verb = "is" if len(trained) == 1 else "are"
    tell(f"{len(trained)} of the {len(source)} images of {shown} {verb} left out because {run} was trained on "
         f"{'it' if verb == 'is' else 'them'} (--part all scores {'it' if verb == 'is' else 'them'} too)")  # fmt: skip
    return Subset(source, others)


def _samples_of(run: Path) -> list[SampleRecord]:
    """Return the samples in the run's samples.csv; none if there is no such file.

    Raises:
        ValueError: the file is damaged: among others, its number of training images is not that of the checkpoint.
    """
    from normfree.data.record import SAMPLES_FILE, read_records
    from normfree.training import checkpoint

    records = read_records(run / SAMPLES_FILE)
    if records is None:
        return []
    trained, expected = sum(sample.part == "train" for sample in records), None
    if last := checkpoint.pointed(run / "checkpoints", "last"):
        with contextlib.suppress(KeyError, TypeError):  # of an older version
            expected = checkpoint.read_state(run / "checkpoints" / last)["data"]["train"]["samples"]
    if expected not in (None, trained):
        given = f"{run / SAMPLES_FILE} is damaged: it has {trained} of the {expected} training images"
        raise ValueError(problem(given, fix="restore it, or delete it and score with --part all"))
    return records


# --- output ---------------------------------------------------------------------------------------------------


def _as_json(score: Evaluation) -> dict[str, object]:
    """Return the scores as an object for JSON."""
    classes = {name: vars(value) for name, value in score.class_scores().items()}
    return {
        "top1": score.top1, "top1_interval": list(score.top1_interval), "top5": score.top5, "loss": score.loss,
        "images": score.count, "majority": score.majority, "balanced_top1": score.balanced_top1,
        "macro_f1": score.macro_f1, "calibration_error": score.calibration_error(), "per_class_top1": score.per_class(),
        "classes": classes,
        **(vars(score.several) if score.several else {}),
    }  # fmt: skip


def _print_table(score: Evaluation, how: str) -> None:
    """Print the scores of each class and of all images."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    several = score.several
    titles: tuple[str, ...] = ("class", "images", "precision %", "recall %", "F1 %")
    if several is not None:
        titles = ("class", "average precision %", "F1 % at 0.5")
    for title in titles:
        table.add_column(title, justify="left" if title == "class" else "right")
    # A plain string would be read as markup, and a class may be called "[red]".
    if several is not None:
        for name, value in several.average_precision.items():
            table.add_row(Text(name), f"{value:.1f}", f"{several.f1[name]:.1f}")
    else:
        for name, one in score.class_scores().items():
            shown = [
                "-" if number is None else f"{number:.1f}" for number in (one.precision, one.recall, one.f1)
            ]
            table.add_row(Text(name), str(one.images), *shown)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if several is not None:
        console.print(
            f"mAP {several.mean_average_precision:.2f} %, F1 at 0.5: micro {several.micro_f1:.2f} %, "
            f"macro {several.macro_f1:.2f} %"
        )
    else:
        console.print(
            f"mean over classes: recall {score.balanced_top1:.2f} %, F1 {score.macro_f1:.2f} %; calibration error "
            f"{score.calibration_error():.2f} %; the largest class has {score.majority:.1f} % of the images"
        )
    top5 = f", top-5 {score.top5_text()} %" if score.top5_text() else ""
    console.print(
        f"top-1 {score.top1_text()} %{top5}, loss {score.loss:.4f} on {number_of(score.count, 'image')}, {how}"
    )
