"""The run folder: its lock, the files written at the start and at the end of a run, and the result.

config.toml  samples.csv  metrics.jsonl  log.txt  environment.txt  results.json  curves.png  checkpoints/  model/
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from normfree._version import __version__
from normfree.data.record import SAMPLES_FILE, check_same, read_records, write_records
from normfree.data.source import Split
from normfree.diagnose.metrics_file import read_metrics
from normfree.diagnose.run_figures import draw_curves
from normfree.files import atomic_write_text, flush, remove_leftovers
from normfree.models.net import Net
from normfree.pretrained import TrainedModel, save_description, save_pretrained
from normfree.scores import Evaluation
from normfree.suggest import number_of, problem
from normfree.training.choices import learns_embeddings, uses_sigmoid
from normfree.training.config import Config
from normfree.training.config_io import load_config, to_toml
from normfree.training.console import RunLog
from normfree.training.identity import decisive, require_same
from normfree.training.multilabel_run import saved_scores, scores_text
from normfree.training.privacy import privacy_text
from normfree.training.resolve import OpenedData, preprocessing
from normfree.training.run_data import DATA_AT, FOLDER, path_of, recorded
from normfree.weights.run_weights import MODEL_FILE


@dataclass(frozen=True)
class TrainResult:
    """Result of a finished run.

    Attributes:
        out: the run folder.
        steps: optimizer steps taken, those before a resume included.
        step: the step after which the scores were measured and the model was saved: the last one, or with `patience`
            that of the best averaged weights.
        weights: evaluation of the weights on the validation images.
        average: evaluation of their exponential moving average, which is the saved model.
        seconds: wall time of this call.
        test: evaluation of the average on the test images, None if the data have none.
        rollbacks: how often the run went back to its last checkpoint, because a gradient was not finite.
        privacy: what a private run has spent, by the names in results.json; None for other runs.

    Examples:
        >>> from pathlib import Path
        >>> import torch
        >>> from normfree.scores import Evaluation
        >>> labels = torch.tensor([0, 1, 1])
        >>> scores = Evaluation(66.7, 100.0, 0.7, 3, ("cat", "dog"), labels, torch.tensor([0, 1, 0]), torch.zeros(3))
        >>> result = TrainResult(Path("runs/pets"), steps=100, step=80, weights=scores, average=scores, seconds=9.0)
        >>> result.out / "model", result.average.per_class()
        (PosixPath('runs/pets/model'), {'cat': 100.0, 'dog': 50.0})
    """

    out: Path
    steps: int
    step: int
    weights: Evaluation
    average: Evaluation
    seconds: float
    test: Evaluation | None = None
    rollbacks: int = 0
    privacy: dict[str, Any] | None = None


def check_folder(out: Path) -> None:
    """Check, before anything is read or written, that `out` is or can become a run folder.

    Raises:
        ValueError: it is a file, or a folder that holds something else.
    """
    if out.exists() and not out.is_dir():
        given = f"{str(out)!r} is a file; a run needs a folder"
        raise ValueError(problem(given, fix="choose another --out"))
    is_run = (out / "config.toml").exists() or (out / ".lock").exists()
    if out.is_dir() and any(out.iterdir()) and not is_run:
        given = f"{str(out)!r} is not empty and holds no run"
        raise ValueError(
            problem(given, allowed="a new or empty folder, or a run", fix="choose another --out")
        )


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the run folder and lock it against other processes.

    Raises:
        ValueError: another process holds the lock.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(out / ".lock", timeout=0))
        except Timeout:
            given = f"{str(out)!r} is being trained by another process"
            raise ValueError(problem(given, fix="wait for it or stop it")) from None
        for folder in (out, out / "model"):
            remove_leftovers(folder)
        yield


def list_file(out: Path) -> Path:
    """Return the file, next to the run folder, for the names of bad images that keep a run from starting."""
    return out.with_name(f"{out.name}.bad_images.txt")


def check_samples(out: Path, data: OpenedData, config: Config) -> None:
    """Check that a run continues with the images that it was started with, in any folder.

    Raises:
        ValueError: images are gone, new or changed; the message names some.
    """
    samples = read_records(out / SAMPLES_FILE)
    if samples is not None and data.records:
        check_same(samples, data.records, data=config.data, out=out)


def begin(out: Path, config: Config, data: OpenedData, net: Net, total_steps: int, run_log: RunLog) -> None:
    """Write config.toml, environment.txt, samples.csv and model/config.json, and print what will be run.

    Raises:
        ValueError: the folder holds a run with another config.
    """
    split = data.split
    path = out / "config.toml"
    folders = {*recorded(out, DATA_AT), path_of(config.data)}
    if path.exists():
        before = load_config(path)
        require_same(out, decisive(before), decisive(config))
        folders |= {path_of(str(Path(folder) / before.data)) for folder in recorded(out, FOLDER)}
    atomic_write_text(path, to_toml(config))
    if data.records:
        write_records(data.records, out / SAMPLES_FILE)
    if data.bad:
        atomic_write_text(out / "bad_images.txt", "".join(f"{line}\n" for line in split.left_out))
    # The model of a finished run is complete, and changes only as a whole.
    if not learns_embeddings(config.objective) and not (out / "model" / MODEL_FILE).exists():
        save_description(_trained(config, split, net), out / "model")
    environment = {
        "normfree": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "device": str(next(net.parameters()).device), "threads": torch.get_num_threads(),
        "machine": platform.machine(), "cuda": torch.version.cuda if torch.cuda.is_available() else "none",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", FOLDER: str(Path.cwd()),
    }  # fmt: skip
    lines = [*environment.items(), *((DATA_AT, folder) for folder in sorted(filter(None, folders)))]
    atomic_write_text(out / "environment.txt", "".join(f"{k} {v}\n" for k, v in lines))
    parameters = sum(p.numel() for p in net.parameters())
    tested = f", {len(split.test):,} to test" if split.test is not None else ""
    run_log.info(
        f"{config.model}: {parameters:,} parameters on {environment['device']}; {config.data}: {len(split.train):,} "
        f"images to train on, {len(split.val):,} to validate{tested}, {number_of(len(split.classes), 'class')}; "
        f"{number_of(total_steps, 'step')} of {config.input.batch_size}; {out}/",
    )  # fmt: skip


def finish(
    config: Config, split: Split, average: torch.nn.Module, result: TrainResult, run_log: RunLog
) -> None:
    """Write results.json, curves.png and the model folder with the averaged weights, and print the scores."""
    out = result.out
    scores = {"weights": _scores(result.weights), "average": _scores(result.average),
              "steps": result.steps, "step": result.step}  # fmt: skip
    if result.test is not None:
        scores["test"] = _scores(result.test)
    if result.rollbacks:
        scores["rollbacks"] = result.rollbacks
    if result.privacy is not None:
        scores["privacy"] = result.privacy
        run_log.info(privacy_text(result.privacy))
    atomic_write_text(out / "results.json", json.dumps(scores, indent=2) + "\n")
    trained = _trained(config, split, average)
    write_model(trained, out / "model", card=_card(config, split, result))
    largest = result.weights.majority
    if result.step != result.steps:
        run_log.info(f"the model is that of step {result.step}, which scored best")
    images = number_of(result.weights.count, f"{_scored(split)} image")
    run_log.info(
        f"top-1 on {images}, with 95 % intervals: {result.weights.top1_text()} % "
        f"(weights), {result.average.top1_text()} % (averaged weights); the largest class has {largest:.1f} %",
    )  # fmt: skip
    if result.test is not None:
        tested = (
            f"top-1 on {number_of(result.test.count, 'test image')}, scored once: {result.test.top1_text()} %"
        )
        run_log.info(f"{tested} (averaged weights)")
    if text := scores_text(result.average):
        run_log.info(f"averaged weights: {text}")
    # Classes so unequal that top-1 hides the rare ones.
    if largest > 200 / len(split.classes) and not text:
        mean = fmean(result.average.per_class().values())
        run_log.info(
            f"mean over classes: {mean:.2f} % (averaged weights); for rare classes see --optim.class_balance"
        )
    try:
        draw_curves(
            read_metrics(out / "metrics.jsonl"), out / "curves.png", title=f"{config.model} on {config.data}"
        )
        run_log.info(f"curves: {out}/curves.png")
    except Exception as error:  # matplotlib is missing, or rows are damaged; a plot must not cost the run
        run_log.info(f"no plot of the curves: {error or type(error).__name__}")
    run_log.info(f"model:  {out}/model/    next: normfree predict {out} IMAGE..., normfree diagnose {out}")
    run_log.info(f"{result.seconds:.0f} s")


def write_model(trained: TrainedModel, folder: Path, *, card: str) -> None:
    """Write the model folder as a whole: a kill or a full disk leaves the old one, or none, but no mixture of both.

    A folder that already holds the same files is left alone.
    """
    work, old = (folder.with_name(f".{folder.name}.{name}.{os.getpid()}.partial") for name in ("new", "old"))
    try:
        save_pretrained(trained, work, card=card)
        if folder.is_dir():
            if _same_files(work, folder):
                return
            for path in folder.iterdir():  # files of others, such as exports, stay
                if path.is_file() and not (work / path.name).exists():
                    shutil.copy2(path, work / path.name)
            folder.rename(old)
        work.rename(folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for path in (work, old):
            shutil.rmtree(path, ignore_errors=True)


def _same_files(new: Path, old: Path) -> bool:
    """Return True if each file of the folder `new` is in the folder `old` with the same content."""
    return all(
        (old / path.name).is_file() and filecmp.cmp(path, old / path.name, shallow=False)
        for path in new.iterdir()
    )


def _trained(config: Config, split: Split, net: torch.nn.Module) -> TrainedModel:
    """Return a network with all that predictions need."""
    assert isinstance(net, Net)
    return TrainedModel(net, preprocessing(config), tuple(split.classes), uses_sigmoid(config.objective))


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    """Return the scores of one evaluation for results.json."""
    per_class = evaluation.per_class()
    return {
        "top1": evaluation.top1, "top1_interval": list(evaluation.top1_interval), "top5": evaluation.top5,
        "loss": evaluation.loss, "images": evaluation.count, "majority": evaluation.majority,
        "balanced_top1": fmean(per_class.values()), "per_class_top1": per_class,
        "confusion": evaluation.confusion().tolist(), **saved_scores(evaluation),
    }  # fmt: skip


def _scored(split: Split) -> str:
    """Return which images the scores of a run are measured on."""
    return "validation" if split.held_out else "training"


def _card(config: Config, split: Split, result: TrainResult) -> str:
    """Return the model card. It holds measured numbers only."""
    final = result.test or result.average
    per_class = final.per_class()
    measure, mean, each = "top-1 %", fmean(per_class.values()), per_class
    if (several := final.several) is not None:
        measure, mean, each = "average precision %", several.mean_average_precision, several.average_precision
    rows = "\n".join(f"| {in_markdown(name)} | {score:.1f} |" for name, score in each.items())
    best = (
        f"the best of {result.steps} by the {_scored(split)} images, " if result.step != result.steps else ""
    )
    credit = f"\nData: {split.credit}\n" if split.credit else ""
    scored = _scored(split)
    lines = [("averaged weights", scored, result.average), ("weights", scored, result.weights)]
    if result.test is not None:
        lines.insert(0, ("averaged weights", "test", result.test))
    with_top5 = bool(final.top5_text())
    table = "\n".join(
        f"| {name} | {e.count} {part} | {e.top1_text()} | {e.balanced_top1:.1f} | "
        + (f"{e.top5_text()} | " if with_top5 else "")
        + f"{e.loss:.4f} |"
        for name, part, e in lines
    )
    head = (
        "| measured | images | top-1 % (95 % interval) | mean over classes % | "
        + "top-5 % | " * with_top5
        + "loss |"
    )
    note_on_majority = (
        ""
        if final.several
        else f"\nThe largest class has {final.majority:.1f} % of the {lines[0][1]} images.\n"
    )
    note = (
        "\nThe test images were scored once, after training; nothing was chosen by them.\n"
        if result.test
        else ""
    )
    if result.rollbacks:
        times = number_of(result.rollbacks, "time")
        note += f"\nA gradient was not finite {times}; the learning rate was lowered each time.\n"
    if result.privacy is not None:
        note += f"\n{privacy_text(result.privacy)}\n"
    if split.left_out:
        were = "was" if len(split.left_out) == 1 else "were"
        note += f"\n{number_of(len(split.left_out), 'image')} could not be read and {were} left out.\n"
    return f"""---
library_name: normfree
tags: [image-classification, normalizer-free]
---
# {config.model} on {in_markdown(Path(config.data).name)}

{len(split.classes)} classes, {config.input.eval_size} px, {result.step} steps of {config.input.batch_size} images,
{best}trained by normfree {__version__} on {len(split.train)} images; these are the averaged weights.

{head}
{"|---" * (head.count("|") - 1)}|
{table}
{note_on_majority}
{scores_text(final)}
{note}
| class | {measure} on the {"test" if result.test else scored} images |
|---|---|
{rows}
| mean over classes | {mean:.1f} |
{credit}
## Config

```toml
{to_toml(config)}```
"""


def in_markdown(name: str) -> str:
    """Return a name of others as plain text of a Markdown table: no HTML, no links, no further cells."""
    return re.sub(r"[^\w\s.,;:/+-]", lambda match: f"&#{ord(match[0])};", name)
