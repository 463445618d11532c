"""Figures of one run or of several over each other, from metrics.jsonl and from the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfree.diagnose.plotting import BLUE, GRAY, GREEN, ORANGE, new_figure

Rows = Sequence[Mapping[str, Any]]

#: Colours of runs, in order; more runs are not told apart.
RUN_COLORS = (BLUE, ORANGE, GREEN, GRAY)
_CLASSES_WITH_NAMES = 30  # in a confusion matrix; more are not readable


@dataclass(frozen=True)
class Panel:
    """One figure: its metrics (name, word, dash), what they are multiplied by, and the scale of its axis."""

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
    """(figure, what it shows) for each of `PANELS` of which a run has values, over epochs; every run in its colour.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
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
    figure = new_figure(4.2, 2.9)
    axis = figure.add_subplot()
    for (run, rows), colour in zip(runs.items(), RUN_COLORS, strict=False):
        for name, word, dash in panel.lines:
            found = [(row["epoch"], panel.factor * row[name]) for row in rows if name in row]
            if found:
                label = ", ".join(filter(None, (run if len(runs) > 1 else "", word)))
                axis.plot(
                    *zip(*found, strict=True),
                    color=colour,
                    ls=dash,
                    lw=1.0 if dash == ":" else 1.6,
                    label=label,
                )
    if panel.log:
        axis.set_yscale("log")
    if len(runs) > 1 or len(panel.lines) > 1:
        axis.legend(frameon=False, fontsize=8)
    _plain(axis, panel.title, "epoch")
    return figure


def _ratios(runs: Mapping[str, Rows]) -> Any:
    """What AGC compares, over a run: the ratio below which half of the units lie, and that of 90 %."""
    figure = new_figure(4.2, 2.9)
    axis = figure.add_subplot()
    for (run, rows), colour in zip(runs.items(), RUN_COLORS, strict=False):
        epochs = [row["epoch"] for row in rows]
        for place, word, dash in ((1, "half of the units", ":"), (2, "90 %", "-")):
            values = [row["ratios"]["all"][place] for row in rows]
            label = ", ".join(filter(None, (run if len(runs) > 1 else "", word)))
            axis.plot(epochs, values, color=colour, ls=dash, marker="o", ms=2.5, lw=1.4, label=label)
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8)
    _plain(axis, "|gradient| / |weights|", "epoch")
    return figure


def draw_curves(metrics: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Loss, accuracy and clipped fraction over epochs, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
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
    figure.suptitle(title, fontsize=11, parse_math=False)  # a path may hold dollar signs
    figure.savefig(path, dpi=130)


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str) -> Any:
    """Share of the images of each true class (row) that got each answer (column); percent from 1 on are written."""
    size = len(classes)
    figure = new_figure(min(9.0, 1.8 + 0.34 * size), min(8.6, 1.4 + 0.34 * size))
    axis = figure.add_subplot()
    from matplotlib.patches import Rectangle

    named = size <= _CLASSES_WITH_NAMES
    for i, row in enumerate(confusion):
        total = sum(row)
        for j, count in enumerate(row):
            share = count / total if total else 0.0
            if share > 0.0:
                colour = BLUE if i == j else ORANGE
                axis.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, color=colour, alpha=0.08 + 0.62 * share, lw=0)
                )
            if named and share >= 0.01:
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
    axis.set_xlim(-0.5, size - 0.5)
    axis.set_ylim(size - 0.5, -0.5)
    axis.set_aspect("equal")
    if named:
        axis.set_xticks(
            range(size), [_short(c) for c in classes], rotation=60, ha="right", rotation_mode="anchor"
        )
        axis.set_yticks(range(size), [_short(c) for c in classes])
        for tick in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            tick.set_parse_math(False)
    axis.set_ylabel("true class", fontsize=9)
    _plain(axis, title, "answer")
    axis.grid(False)
    return figure


def class_figure(scores: Mapping[str, Mapping[str, float]], *, title: str, most: int = 30) -> Any:
    """Top-1 of every class in percent for each named run, the worst of the first run on top; at most `most` classes."""
    first = next(iter(scores.values()))
    names = sorted(first, key=lambda name: first[name])[:most]
    figure = new_figure(5.2, min(8.6, 1.1 + 0.24 * len(names)))
    axis = figure.add_subplot()
    for place, ((run, own), colour) in enumerate(zip(scores.items(), RUN_COLORS, strict=False)):
        shift = (place - (len(scores) - 1) / 2) * 0.2
        heights = [i + shift for i in range(len(names))]
        values = [own.get(name, 0.0) for name in names]
        axis.hlines(heights, 0, values, color=colour, lw=1.2, alpha=0.5)
        axis.plot(values, heights, color=colour, marker="os^D"[place], ms=5, ls="", label=run)
    axis.set_yticks(range(len(names)), [_short(name) for name in names])
    for tick in axis.get_yticklabels():
        tick.set_parse_math(False)
    axis.invert_yaxis()
    axis.set_xlim(0, 102)
    if len(scores) > 1:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    _plain(axis, title, "top-1, %")
    return figure


def most_confused(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], *, most: int = 10
) -> list[tuple[str, str, int, float]]:
    """The pairs most often taken for one another: (true class, answer, images, percent of the true class)."""
    pairs = [
        (classes[i], classes[j], count, 100.0 * count / sum(row))
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: (-pair[2], -pair[3]))[:most]


def _short(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _plain(axis: Any, title: str, below: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)
    axis.set_xlabel(below, fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
