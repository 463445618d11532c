"""Figures of one or several runs, drawn from metrics.jsonl and from the predictions of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.diagnose.plotting import BLUE, GRAY, GREEN, ORANGE, new_figure

Rows = Sequence[Mapping[str, Any]]

# Colors of the runs, in order. More than four are hard to distinguish.
RUN_COLORS = (BLUE, ORANGE, GREEN, GRAY)
# A confusion matrix with more classes than this has no labels, because they would be too small to read.
MAX_LABELED_CLASSES = 30


@dataclass(frozen=True)
class Panel:
    """One figure of a run.

    Attributes:
        title: title of the figure.
        lines: (key in metrics.jsonl, label, matplotlib line style) of each curve.
        factor: the values are multiplied by this.
        log: True for a logarithmic axis.
    """

    title: str
    lines: tuple[tuple[str, str, str], ...]
    factor: float = 1.0
    log: bool = False


PANELS = (
    Panel("loss, nats", (("loss", "training", ":"), ("val_loss", "validation", "-"))),
    Panel("validation top-1, %", (("top1", "weights", "-"), ("ema_top1", "averaged", "--"))),
    Panel("clipped units, %", (("clipped", "", "-"),), factor=100.0),
    Panel("norm of the gradient", (("grad_norm", "", "-"),), log=True),
    Panel("learning rate", (("lr", "", "-"),)),
    Panel("images per second", (("images_per_s", "", "-"),)),
)


def curve_figures(runs: Mapping[str, Rows]) -> Iterator[tuple[Any, str]]:
    """Yield (figure, description) for each of `PANELS` for which a run has values. Each run has its own color.

    Args:
        runs: rows of metrics.jsonl by name of the run, at most as many as `RUN_COLORS`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    for panel in PANELS:
        if any(name in row for rows in runs.values() for row in rows for name, _, _ in panel.lines):
            yield _curves(panel, runs), f"{panel.title} over epochs"
    sampled = {
        run: found for run, rows in runs.items() if (found := [row for row in rows if row.get("ratios")])
    }
    if sampled:
        yield _ratios(sampled), "gradient to weight over epochs"


def _curves(panel: Panel, runs: Mapping[str, Rows]) -> Any:
    """Draw one panel."""
    figure = new_figure(4.2, 2.9)
    axis = figure.add_subplot()
    for (run, rows), color in zip(runs.items(), RUN_COLORS, strict=False):
        for name, label, dash in panel.lines:
            found = [(row["epoch"], panel.factor * row[name]) for row in rows if name in row]
            if found:
                full = ", ".join(filter(None, (run if len(runs) > 1 else "", label)))
                axis.plot(
                    *zip(*found, strict=True),
                    color=color,
                    ls=dash,
                    lw=1.0 if dash == ":" else 1.6,
                    label=full,
                )
    if panel.log:
        axis.set_yscale("log")
    if len(runs) > 1 or len(panel.lines) > 1:
        axis.legend(frameon=False, fontsize=8)
    _style(axis, panel.title, "epoch")
    return figure


def _ratios(runs: Mapping[str, Rows]) -> Any:
    """Draw the median and the 0.9 quantile of the ratios of gradient to weight, which AGC clips, over epochs."""
    figure = new_figure(4.2, 2.9)
    axis = figure.add_subplot()
    for (run, rows), color in zip(runs.items(), RUN_COLORS, strict=False):
        epochs = [row["epoch"] for row in rows]
        for quantile, name, dash in ((1, "half of the units", ":"), (2, "90 %", "-")):
            values = [row["ratios"]["all"][quantile] for row in rows]
            label = ", ".join(filter(None, (run if len(runs) > 1 else "", name)))
            axis.plot(epochs, values, color=color, ls=dash, marker="o", ms=2.5, lw=1.4, label=label)
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8)
    _style(axis, "|gradient| / |weights|", "epoch")
    return figure


def draw_curves(metrics: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Write a PNG file with loss, accuracy and fraction of clipped units over epochs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 3.4)
    loss, accuracy, clipped = figure.subplots(1, 3)
    train = [m for m in metrics if "loss" in m]
    val = [m for m in metrics if "top1" in m]
    loss.plot(
        [m["epoch"] for m in train],
        [m["loss"] for m in train],
        color=GRAY,
        lw=1,
        label="training, mixed labels",
    )
    loss.plot([m["epoch"] for m in val], [m["val_loss"] for m in val], color=BLUE, lw=2, label="validation")
    accuracy.plot([m["epoch"] for m in val], [m["top1"] for m in val], color=BLUE, lw=2, label="weights")
    accuracy.plot([m["epoch"] for m in val], [m["ema_top1"] for m in val], color=ORANGE, lw=2, ls="--",
                  label="averaged weights")  # fmt: skip
    clipped.plot([m["epoch"] for m in train], [100 * m["clipped"] for m in train], color=GREEN, lw=1)
    for axis, name in (
        (loss, "loss, nats"),
        (accuracy, "validation top-1, %"),
        (clipped, "clipped units, %"),
    ):
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.01)
    loss.legend(frameon=False, fontsize=8)
    accuracy.legend(frameon=False, fontsize=8)
    # A path may contain dollar signs, which are not formulas.
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.savefig(path, dpi=130)


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str) -> Any:
    """Draw the fraction of images of each true class (row) by predicted class (column), in percent if 1 or more.

    Args:
        confusion: counts, K x K, row = true class, column = predicted class.
        classes: the K class names.
        title: title of the figure.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    size = len(classes)
    figure = new_figure(min(9.0, 1.8 + 0.34 * size), min(8.6, 1.4 + 0.34 * size))
    axis = figure.add_subplot()
    from matplotlib.patches import Rectangle

    labeled = size <= MAX_LABELED_CLASSES
    for i, row in enumerate(confusion):
        total = sum(row)
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            if share > 0.0:
                color = BLUE if i == j else ORANGE
                axis.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, color=color, alpha=0.08 + 0.62 * share, lw=0)
                )
            if labeled and share >= 0.01:
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    axis.set_xlim(-0.5, size - 0.5)
    axis.set_ylim(size - 0.5, -0.5)
    axis.set_aspect("equal")
    if labeled:
        axis.set_xticks(
            range(size), [_short(c) for c in classes], rotation=60, ha="right", rotation_mode="anchor"
        )
        axis.set_yticks(range(size), [_short(c) for c in classes])
        for tick in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            tick.set_parse_math(False)
    axis.set_ylabel("true class", fontsize=9)
    _style(axis, title, "predicted class")
    axis.grid(False)
    return figure


def class_figure(scores: Mapping[str, Mapping[str, float]], *, title: str, most: int = 30) -> Any:
    """Draw the top-1 accuracy of every class in percent, the worst classes of the first run on top.

    Args:
        scores: percent by class, by name of the run.
        title: title of the figure.
        most: the largest number of classes drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    first = next(iter(scores.values()))
    names = sorted(first, key=lambda name: first[name])[:most]
    figure = new_figure(5.2, min(8.6, 1.1 + 0.24 * len(names)))
    axis = figure.add_subplot()
    for index, ((run, own), color) in enumerate(zip(scores.items(), RUN_COLORS, strict=False)):
        shift = (index - (len(scores) - 1) / 2) * 0.2
        heights = [i + shift for i in range(len(names))]
        values = [own.get(name, 0.0) for name in names]
        axis.hlines(heights, 0, values, color=color, lw=1.2, alpha=0.5)
        axis.plot(values, heights, color=color, marker="os^D"[index], ms=5, ls="", label=run)
    axis.set_yticks(range(len(names)), [_short(name) for name in names])
    for tick in axis.get_yticklabels():
        tick.set_parse_math(False)
    axis.invert_yaxis()
    axis.set_xlim(0, 102)
    if len(scores) > 1:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    _style(axis, title, "top-1, %")
    return figure


def most_confused(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], *, most: int = 10
) -> list[tuple[str, str, int, float]]:
    """Return the most frequent errors as (true class, predicted class, images, percent of the true class)."""
    pairs = [
        (classes[i], classes[j], count, 100.0 * count / sum(row))
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3]))[:most]


def _short(name: str, length: int = 22) -> str:
    """Return a name, shortened to `length` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def _style(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)
    axis.set_xlabel(below, fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
