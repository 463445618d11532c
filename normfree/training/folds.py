"""Cross-validation: one run for each fold, in one folder, and a summary of their scores.

    PARENT/  folds.toml  folds.json  folds.md  fold-1/ ... fold-K/

Each fold is a run of its own, with its own checkpoints, that trains on all images except its fold and the test part
(`input.val_fraction` is "fold:2/5"). folds.json holds the scores of the folds that are finished.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from pydantic import BaseModel, Field
from rich.console import Console

from normfree.data.record import SAMPLES_FILE, read_records, records_of
from normfree.device import run_device
from normfree.files import atomic_write_text, read_model
from normfree.scores import Evaluation
from normfree.suggest import problem
from normfree.training.choices import is_private, learns_embeddings
from normfree.training.config import Config
from normfree.training.config_io import load_config, to_toml
from normfree.training.config_values import MAX_FOLDS, fold_in
from normfree.training.console import RunLog
from normfree.training.default_network import with_network
from normfree.training.distributed.world import World
from normfree.training.identity import decisive, require_same, with_free_keys
from normfree.training.loop import train
from normfree.training.precision import with_precision
from normfree.training.run_data import located, open_config_data
from normfree.training.run_folder import TrainResult, check_folder, in_markdown
from normfree.uncertainty import accuracy_text

CONFIG_FILE, SCORES_FILE, SUMMARY_FILE = "folds.toml", "folds.json", "folds.md"
_BYTES = 64_000_000  # of a folds.json; 100 folds with the confusion matrix of 1000 classes have fewer
SHOWN_CLASSES = 20  # of the confusion matrix in folds.md


@dataclass(frozen=True)
class FoldScores:
    """Scores of the averaged weights of one fold's run; rates are percent.

    Attributes:
        fold: its number, from 1.
        length: length of training, as in the config.
        step: the step after which the scores were measured.
        images: images of the fold.
        top1: accuracy on them.
        balanced_top1: mean accuracy of the classes.
        loss: mean loss on them.
        confusion: counts; row = true class, column = predicted class.
        mean_average_precision: if images have several classes.
        test_top1: accuracy on the test images, if there are any.
    """

    fold: int
    length: str
    step: int
    images: int
    top1: float
    balanced_top1: float
    loss: float
    confusion: list[list[int]]
    mean_average_precision: float | None = None
    test_top1: float | None = None


@dataclass(frozen=True)
class FoldsResult:
    """Scores of a finished cross-validation; rates are percent.

    Attributes:
        out: the parent folder.
        classes: the class names.
        folds: scores of each fold.

    Examples:
        >>> from pathlib import Path
        >>> one = FoldScores(1, "9ep", 90, 4, 75.0, 75.0, 0.6, [[2, 0], [1, 1]])
        >>> two = FoldScores(2, "9ep", 90, 4, 100.0, 100.0, 0.1, [[2, 0], [0, 2]])
        >>> result = FoldsResult(Path("runs/pets"), ("cat", "dog"), (one, two))
        >>> result.confusion, [round(value, 1) for value in result.mean_and_deviation()]
        ([[4, 0], [1, 3]], [87.5, 17.7])
    """

    out: Path
    classes: tuple[str, ...]
    folds: tuple[FoldScores, ...]

    @property
    def confusion(self) -> list[list[int]]:
        """The sum of the confusion matrices: each image once, classified by the network that was not trained on it."""
        tables = [one.confusion for one in self.folds]
        return [[sum(counts) for counts in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]

    @property
    def hits_and_images(self) -> tuple[int, int]:
        """The number of images that were classified correctly by these networks, and the number of images."""
        confusion = self.confusion
        return sum(counts[k] for k, counts in enumerate(confusion)), sum(map(sum, confusion))

    def mean_and_deviation(self, score: str = "top1") -> tuple[float, float]:
        """Return mean and standard deviation over the folds of a field of `FoldScores`."""
        values = [getattr(one, score) for one in self.folds]
        return fmean(values), stdev(values)


def train_folds(
    config: Config, out: str | Path, *, folds: int = 5, console: Console | None = None
) -> FoldsResult:
    """Train a run for each of several stratified folds of the data, or go on where a stopped cross-validation was.

    The images outside the test part are divided into folds; each run is validated on one fold and trained on the
    others. The test part, if there is one, is in no fold.

    Args:
        config: the runs. `input.val_fraction` is replaced; the test part is that of a run with the default fraction.
        out: parent folder of the runs fold-1, fold-2, ... A new or empty folder starts; one of an earlier call goes on
            with the runs that are not finished.
        folds: number of folds.
        console: where to print; None is the standard output.

    Raises:
        ValueError: data, model or folder cannot be used, the runs are private, or there are several processes.
        DivergedError: see `normfree.train`.
        StoppedBySignal: a signal arrived; a checkpoint was written first.

    Examples:
        >>> import tempfile
        >>> from normfree import Config, train_folds
        >>> from rich.console import Console
        >>> config = Config(
        ...     data="synthetic:classes=2,size=16,train=8,val=4", model="nf_resnet_nano", length="1st", device="cpu",
        ...     input={"image_size": 16, "batch_size": 4, "workers": 0},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train_folds(config, folder, folds=2, console=Console(quiet=True))
        >>> [one.images for one in result.folds], result.hits_and_images[1]
        ([6, 6], 12)
    """
    out, run_log = Path(out), RunLog(console or Console())
    _check(config, folds)
    world = World(device=run_device(config.device))
    config = with_network(config, world, run_log)  # the same for all folds, as is the data type
    config = with_precision(config, _started(out), world=world, run_log=run_log)
    _begin(config, out, folds)
    scores: list[FoldScores] = []
    classes: tuple[str, ...] = ()
    done = finished(out)
    for fold in range(1, folds + 1):
        one = fold_config(config, out, fold, folds)
        if fold in done and done[fold].length == one.length:
            run_log.info(f"fold {fold} of {folds}: finished, top-1 {done[fold].top1:.2f} %")
            scores.append(done[fold])
            continue
        run_log.info(f"fold {fold} of {folds}: {folder_of(out, fold)}/")
        _check_images(one, out)
        result = train(one, folder_of(out, fold), console=console)
        classes = result.average.classes
        scores.append(_scores(result, fold, one.length))
        done[fold] = scores[-1]
        _write(out, folds, list(done.values()), classes)
    summary = FoldsResult(out, tuple(_stored(out).classes), tuple(scores))
    atomic_write_text(out / SUMMARY_FILE, _page(summary, config))
    for line in summary_lines(summary, config):
        run_log.info(line)
    run_log.info(f"summary: {out / SUMMARY_FILE}    to train on all images: {_to_train_all(config, out)}")
    return summary


def folder_of(out: Path, fold: int) -> Path:
    """Return the run folder of a fold."""
    return out / f"fold-{fold}"


def number_of_folds(out: Path) -> int:
    """Return the number of folds of a parent folder; 0 if it is none."""
    path = out / SCORES_FILE
    return _stored(out).folds if path.is_file() else 0


def finished(out: Path) -> dict[int, FoldScores]:
    """Return the scores of the folds that are finished and whose run folders are there, by their numbers."""
    return {
        one.fold: one for one in _stored(out).scores if (folder_of(out, one.fold) / "results.json").is_file()
    }


def fold_config(config: Config, out: Path, fold: int, folds: int) -> Config:
    """Return the config of one fold: that of its run, if it was started, with what may change taken from `config`."""
    path = folder_of(out, fold) / "config.toml"
    if path.is_file():
        return with_free_keys(load_config(path), config)
    inputs = config.input.model_copy(update={"val_fraction": f"fold:{fold}/{folds}"})
    return config.model_copy(update={"input": inputs})


def load_folds(out: Path) -> Config:
    """Return the config of an earlier call, with a path of its data that is valid in this working directory."""
    config, first = load_config(out / CONFIG_FILE), folder_of(out, 1)
    return located(config, first) if (first / "config.toml").is_file() else config


def _started(out: Path) -> Path:
    """Return the config of the first fold, if it was started, else that of all folds."""
    first = folder_of(out, 1) / "config.toml"
    return first if first.is_file() else out / CONFIG_FILE


def _check(config: Config, folds: int) -> None:
    """Raise `ValueError` if a config cannot be cross-validated."""
    if not 2 <= folds <= MAX_FOLDS:
        raise ValueError(problem(f"{folds} folds", allowed=f"2 to {MAX_FOLDS}", fix="--folds 5"))
    if fold_in(config.input.val_fraction):
        given = f"input.val_fraction={config.input.val_fraction!r} together with {folds} folds"
        raise ValueError(problem(given, allowed="one of the two", fix="drop --input.val_fraction"))
    if learns_embeddings(config.objective):
        given = f"folds with objective={config.objective!r}"
        raise ValueError(problem(given, allowed="objectives that learn classes", fix="--objective classify"))
    if is_private(config.optim.clip):  # an image trains all runs but one, and that one publishes scores on it
        fix = f"drop --folds, or --input.val_fraction fold:1/{folds} for a single run"
        allowed = "a single run, since the epsilons of the folds add up"
        raise ValueError(problem("folds with --privacy", allowed=allowed, fix=fix))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        fix = f"torchrun ... train --input.val_fraction fold:1/{folds} for each fold, or one process"
        raise ValueError(problem("folds in several processes", allowed="one process", fix=fix))


def _begin(config: Config, out: Path, folds: int) -> None:
    """Write the files of a new parent folder, or check that an earlier call had the same config.

    Raises:
        ValueError: the folder holds something else, or another config.
    """
    known = number_of_folds(out) if out.is_dir() else 0
    if not known:
        check_folder(out)
        if (out / "config.toml").exists():
            given = f"{out} contains a run"
            raise ValueError(problem(given, allowed="a folder without a run", fix="choose another --out"))
    elif known != folds:
        given = f"{out} contains {known} folds, not {folds}"
        raise ValueError(problem(given, fix=f"normfree train {out}, or choose another --out"))
    else:
        before = load_config(out / CONFIG_FILE)
        if before.precision == "auto":  # written by an earlier version
            first = _started(out)
            chosen = config if first == out / CONFIG_FILE else load_config(first)
            before = before.model_copy(update={"precision": chosen.precision})
        require_same(out, decisive(before), decisive(config))
    atomic_write_text(out / CONFIG_FILE, to_toml(config))
    if not known:
        _write(out, folds, [], ())


def _check_images(config: Config, out: Path) -> None:
    """Check that a fold divides the images that the first one did.

    Raises:
        ValueError: images are gone or new.
    """
    before = read_records(folder_of(out, 1) / SAMPLES_FILE)
    if before is None:
        return
    old, new = (
        {(s.label, s.name) for s in samples} for samples in (before, records_of(open_config_data(config)))
    )
    if new and old != new:
        given = (
            f"the images of {config.data} are not those of {folder_of(out, 1)}: {len(old - new)} are gone, "
            f"{len(new - old)} are new"
        )
        raise ValueError(problem(given, fix="restore them, or start again with another --out"))


class _Stored(BaseModel):
    """A folds.json."""

    folds: int = Field(ge=2, le=MAX_FOLDS)
    classes: list[str]
    scores: list[FoldScores]


def _stored(out: Path) -> _Stored:
    """Return the folds.json of a parent folder."""
    return read_model(out / SCORES_FILE, _Stored, limit=_BYTES, fix="restore it, or start again with --out")


def _write(out: Path, folds: int, scores: list[FoldScores], classes: tuple[str, ...]) -> None:
    """Write folds.json."""
    content = {"folds": folds, "classes": classes, "scores": [asdict(one) for one in scores]}
    atomic_write_text(out / SCORES_FILE, json.dumps(content, indent=1) + "\n")


def _scores(result: TrainResult, fold: int, length: str) -> FoldScores:
    """Return the scores of a finished run."""
    average: Evaluation = result.average
    several = average.several.mean_average_precision if average.several else None
    return FoldScores(
        fold, length, result.step, average.count, average.top1, average.balanced_top1, average.loss,
        average.confusion().tolist(), several, result.test.top1 if result.test else None,
    )  # fmt: skip


# --- the summary ------------------------------------------------------------------------------------------------


def summary_lines(result: FoldsResult, config: Config) -> list[str]:
    """Return the summary in a few sentences."""
    count, images = len(result.folds), sum(one.images for one in result.folds)
    several = result.folds[0].mean_average_precision is not None
    name, field = ("mAP", "mean_average_precision") if several else ("top-1", "top1")
    lines = [
        f"{count} folds of {images} images: {name} {_spread(result, field)}, mean and standard deviation of the folds"
    ]
    if not several:
        lines.append(
            f"each image by the network that was not trained on it: top-1 {accuracy_text(*result.hits_and_images)} %, "
            "the 95 % Wilson interval in parentheses"
        )
    if result.folds[0].test_top1 is not None:
        lines.append(f"test images, which are in no fold: top-1 {_spread(result, 'test_top1')}")
    if config.patience:
        lines.append(
            f"with patience {config.patience}, the images of a fold also chose its step, so its scores are somewhat "
            "high; those of the test images are not"
        )
    return lines


def _spread(result: FoldsResult, field: str) -> str:
    mean, deviation = result.mean_and_deviation(field)
    return f"{mean:.2f} ± {deviation:.2f} %"


def _to_train_all(config: Config, out: Path) -> str:
    """Return the command that trains one run on the images of all folds."""
    return (
        f"normfree train {out / CONFIG_FILE} --input.val_fraction 0{' --patience 0' * bool(config.patience)}"
    )


def _page(result: FoldsResult, config: Config) -> str:
    """Return folds.md."""
    head = ["fold", "images", "step", "top-1 %", "mean over classes %", "loss"]
    fields = ["fold", "images", "step", "top1", "balanced_top1", "loss"]
    for field, title in (("mean_average_precision", "mAP %"), ("test_top1", "test top-1 %")):
        if getattr(result.folds[0], field) is not None:
            head.append(title)
            fields.append(field)
    rows = [[_cell(getattr(one, field)) for field in fields] for one in result.folds]
    text = [f"# Cross-validation of {config.model} on {in_markdown(Path(config.data).name)}", ""]
    text += [line + "." for line in summary_lines(result, config)] + ["", *_table(head, rows)]
    if len(result.classes) <= SHOWN_CLASSES and result.folds[0].mean_average_precision is None:
        names = [in_markdown(name) for name in result.classes]
        counts = [[name, *map(str, row)] for name, row in zip(names, result.confusion, strict=True)]
        text += [
            "",
            "Confusion matrix of all folds: a line for each true class.",
            "",
            *_table(["", *names], counts),
        ]
    text += ["", f"To train on the images of all folds: `{_to_train_all(config, result.out)}`", ""]
    return "\n".join(text)


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
