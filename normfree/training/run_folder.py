"""The run folder: how it begins, what it holds at the end, and that only one process works in it.

config.toml  metrics.jsonl  log.txt  environment.txt  results.json  curves.png  checkpoints/  model/
"""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from normfree._version import __version__
from normfree.data.source import Split
from normfree.diagnose.metrics_file import read_metrics
from normfree.diagnose.run_figures import draw_curves
from normfree.inference import Evaluation
from normfree.models.net import Net
from normfree.pretrained import (
    TrainedModel,
    save_pretrained,
)
from normfree.training.config import Config
from normfree.training.config_io import load_config, to_toml
from normfree.training.console import RunLog
from normfree.training.resolve import preprocessing

#: Keys in which a continued run may not differ from how it began; further ones, of `input`, stand in `begin`.
DECISIVE = ("data", "model", "weights", "length", "patience", "seed", "precision", "net", "augment", "optim")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reached: scores of the weights and of their average after `step`, seconds of this process.

    `step` is the last of the `steps` taken, or with patience that of the best averaged weights.
    """

    out: Path
    steps: int
    step: int
    weights: Evaluation
    average: Evaluation
    seconds: float


def check_folder(out: Path) -> None:
    """Refuses a run folder that cannot become one, before anything is read or written.

    Raises:
        ValueError: it is a file, or holds something that is no run.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; a run needs a folder. Choose another --out.")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not (out / "config.toml").exists()
        and not (out / ".lock").exists()
    ):
        raise ValueError(f"{str(out)!r} is not empty and holds no run. Choose another --out.")


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the run folder and keeps other processes out of it.

    Raises:
        ValueError: another process trains there.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{str(out)!r} is being trained by another process. Wait for it or stop it."
            ) from None
        yield


def begin(out: Path, config: Config, split: Split, net: Net, total_steps: int, run_log: RunLog) -> None:
    """Writes config.toml and environment.txt and prints what will be run.

    Raises:
        ValueError: the folder's run has another config.
    """
    path = out / "config.toml"
    if path.exists():
        before = load_config(path)
        changed = [k for k in DECISIVE if getattr(before, k) != getattr(config, k)]
        changed += [f"input.{k}" for k in ("image_size", "batch_size", "micro_batch", "val_fraction")
                    if getattr(before.input, k) != getattr(config.input, k)]  # fmt: skip
        if before.parallel != config.parallel and "exact" in (before.parallel, config.parallel):
            changed.append("parallel")  # the others agree up to rounding; exact promises bits
        if changed:
            raise ValueError(f"{out} was started with another {', '.join(changed)}. Drop the change, or start another "
                             "run with --out.")  # fmt: skip
    work = out / ".config.toml.tmp"  # a kill in the middle must not leave half a config
    work.write_text(to_toml(config), encoding="utf-8")
    work.replace(path)
    environment = {
        "normfree": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "device": str(next(net.parameters()).device), "threads": torch.get_num_threads(),
        "machine": platform.machine(), "cuda": torch.version.cuda if torch.cuda.is_available() else "none",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }  # fmt: skip
    (out / "environment.txt").write_text(
        "".join(f"{k} {v}\n" for k, v in environment.items()), encoding="utf-8"
    )
    parameters = sum(p.numel() for p in net.parameters())
    run_log.info(
        f"{config.model}: {parameters:,} parameters on {environment['device']}; {config.data}: {len(split.train):,} "
        f"images to train on, {len(split.val):,} to validate, {len(split.classes)} classes; {total_steps:,} steps of "
        f"{config.input.batch_size}; {out}/",
    )  # fmt: skip
    if config.precision == "bfloat16" and environment["device"] == "cpu":
        run_log.info("bfloat16 on a CPU without such units is many times slower than float32")


def finish(
    config: Config, split: Split, average: torch.nn.Module, result: TrainResult, run_log: RunLog
) -> None:
    """Writes results.json, curves.png and the model folder (averaged weights), and prints the scores."""
    out = result.out
    scores = {"weights": _scores(result.weights), "average": _scores(result.average),
              "steps": result.steps, "step": result.step}  # fmt: skip
    (out / "results.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    assert isinstance(average, Net)
    trained = TrainedModel(average, preprocessing(config), tuple(split.classes))
    save_pretrained(trained, out / "model", card=_card(config, split, result))
    largest = int(torch.bincount(result.weights.labels).max()) / result.weights.count
    if result.step != result.steps:
        run_log.info(f"the model is that of step {result.step}, which scored best")
    run_log.info(
        f"top-1 on {result.weights.count} validation images: {result.weights.top1:.2f} % (weights), "
        f"{result.average.top1:.2f} % (averaged weights); the largest class has {100 * largest:.1f} %",
    )  # fmt: skip
    if largest > 2 / len(split.classes):  # then top-1 says little about the others
        mean = fmean(result.average.per_class().values())
        run_log.info(
            f"mean over classes: {mean:.2f} % (averaged weights); for rare classes see --optim.class_balance"
        )
    try:
        draw_curves(
            read_metrics(out / "metrics.jsonl"), out / "curves.png", title=f"{config.model} on {config.data}"
        )
        run_log.info(f"curves: {out}/curves.png")
    except ModuleNotFoundError as error:
        run_log.info(f"no picture: {error}")
    run_log.info(f"model:  {out}/model/    next: normfree predict {out} IMAGE..., normfree diagnose {out}")
    run_log.info(f"{result.seconds:.0f} s")


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    per_class = evaluation.per_class()
    return {
        "top1": evaluation.top1, "top5": evaluation.top5, "loss": evaluation.loss, "images": evaluation.count,
        "balanced_top1": fmean(per_class.values()), "per_class_top1": per_class,
        "confusion": evaluation.confusion().tolist(),
    }  # fmt: skip


def _card(config: Config, split: Split, result: TrainResult) -> str:
    """The model card: measured numbers only."""
    per_class = result.average.per_class()
    rows = "\n".join(f"| {name} | {score:.1f} |" for name, score in per_class.items())
    best = f"the best of {result.steps} by the images below, " if result.step != result.steps else ""
    credit = f"\nData: {split.credit}\n" if split.credit else ""
    return f"""---
library_name: normfree
tags: [image-classification, normalizer-free]
---
# {config.model} on {Path(config.data).name}

{len(split.classes)} classes, {config.input.eval_size} px, {result.step} steps of {config.input.batch_size} images,
{best}trained by normfree {__version__} on {len(split.train)} images; these are the averaged weights.

| measured on {result.average.count} validation images | top-1 % | top-5 % | loss |
|---|---|---|---|
| averaged weights | {result.average.top1:.2f} | {result.average.top5:.2f} | {result.average.loss:.4f} |
| weights | {result.weights.top1:.2f} | {result.weights.top5:.2f} | {result.weights.loss:.4f} |

| class | top-1 % |
|---|---|
{rows}
| mean over classes | {fmean(per_class.values()):.1f} |
{credit}
## Config

```toml
{to_toml(config)}```
"""
