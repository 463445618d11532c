"""Figures of a network: signal propagation, and ratios of gradient to weight.

They are readable at the width of a phone. Curves differ in color, marker and dash, so that color-blind readers can
distinguish them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from normfree.diagnose.gradients import CLIPPINGS, GradientReport
from normfree.diagnose.plotting import BLUE, GRAY, GREEN, ORANGE, new_figure
from normfree.diagnose.propagation import BlockSignal, SignalReport

# Resolution of PNG files.
DPI = 110


def draw_signal(reports: Mapping[str, SignalReport], path: Path) -> None:
    """Write `signal_figure` to `path` as PNG."""
    signal_figure(reports).savefig(path, dpi=DPI)


def signal_figure(reports: Mapping[str, SignalReport]) -> Any:
    """Draw one panel per named report: squared mean, variance and branch variance of every block.

    Predictions are dashed. A second plot below shows the cosine similarity between images.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.

    Source: [A] figure 1.
    """
    figure = new_figure(5.2, 4.1 * len(reports) + 0.7)
    grid = figure.add_gridspec(2 * len(reports), height_ratios=[2.6, 1] * len(reports))
    for row, (name, report) in enumerate(reports.items()):
        above = figure.add_subplot(grid[2 * row])
        below = figure.add_subplot(grid[2 * row + 1], sharex=above)
        _signal_panel(above, below, report, name)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _signal_panel(above: Any, below: Any, report: SignalReport, title: str) -> None:
    """Draw the curves of one report into two axes."""
    blocks = report.blocks
    curves: tuple[tuple[str, str, str, Sequence[float | None], Sequence[float | None]], ...] = (
        ("variance", BLUE, "o", [b.variance for b in blocks], _predicted(blocks, "variance")),
        ("branch variance", GREEN, "^", [b.branch_variance for b in blocks],
         _predicted(blocks, "branch_variance")),
        ("squared mean", ORANGE, "s", [b.squared_mean for b in blocks], _predicted(blocks, "squared_mean")),
    )  # fmt: skip
    positions = range(1, len(blocks) + 1)
    size = 4 if len(blocks) <= 40 else 2
    for label, color, marker, values, predicted in curves:
        if any(v is not None for v in values):
            above.plot(positions, values, color=color, marker=marker, ms=size, lw=1.4, label=label)
        if any(v is not None for v in predicted):
            above.plot(positions, predicted, color=color, ls=(0, (4, 2)), lw=1, alpha=0.8)
    if any(b.predicted for b in blocks):
        above.plot([], [], color=GRAY, ls=(0, (4, 2)), lw=1, label="predicted")
    below.plot(positions, [b.cosine for b in blocks], color=GRAY, marker="D", ms=size, lw=1.4)
    below.set_ylim(-0.1, 1.05)
    below.set_ylabel("cosine", fontsize=9)
    below.set_xlabel("residual block", fontsize=9)
    above.set_title(fill(title, 58), loc="left", fontsize=10, parse_math=False)
    above.tick_params(labelbottom=False)
    below.set_xticks(list(positions)[:: max(1, -(-len(blocks) // 10))])
    above.set_ylim(bottom=min(0.0, above.get_ylim()[0]))
    for axis in (above, below):
        for first in (i for i, b in zip(positions, blocks, strict=True) if b.index == 1 and i > 1):
            # The boundary between two stages.
            axis.axvline(first - 0.5, color=GRAY, lw=0.7, alpha=0.5)
        _style(axis)


def _predicted(blocks: Sequence[BlockSignal], what: str) -> list[float | None]:
    """Return the predicted values of one statistic, None where there is no prediction."""
    return [None if b.predicted is None else getattr(b.predicted, what) for b in blocks]


def draw_ratios(report: GradientReport, path: Path, *, title: str) -> None:
    """Write `ratios_figure` to `path` as PNG."""
    ratios_figure(report, title=title).savefig(path, dpi=DPI)


def ratios_figure(report: GradientReport, *, title: str) -> Any:
    """Draw the ratio of gradient to weight of every layer's weights: the median, and a bar from the 10 % to the 90 %
    quantile of the units. Dashed lines show values of λ.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(5.2, 4.4)
    axis = figure.add_subplot()
    # Gains and biases are one unit each.
    layers = [layer for layer in report.layers if layer.units > 1]
    drawn = [(i, layer) for i, layer in enumerate(layers, start=1) if layer.quantile(0.9) > 0]
    for exempt, color, marker in ((False, BLUE, "o"), (True, ORANGE, "s")):
        chosen = [(i, layer) for i, layer in drawn if layer.exempt is exempt]
        if not chosen:
            continue
        lowest = min(x for _, layer in drawn if (x := layer.quantile(0.5) or layer.quantile(0.9)) > 0) / 3
        lows = [max(layer.quantile(0.1), lowest) for _, layer in chosen]
        highs = [layer.quantile(0.9) for _, layer in chosen]
        positions = [i for i, _ in chosen]
        axis.vlines(positions, lows, highs, color=color, lw=2, alpha=0.45)
        axis.plot(positions, [max(layer.quantile(0.5), lowest) for _, layer in chosen], color=color, marker=marker,
                  ms=4, ls="", label="exempt from clipping" if exempt else "median, 10 % to 90 % of units")  # fmt: skip
    for clipping in CLIPPINGS:
        axis.axhline(clipping, color=GRAY, ls=(0, (4, 2)), lw=0.8)
        axis.annotate(f"λ {clipping:g}", (1.0, clipping), xycoords=("axes fraction", "data"), xytext=(2, 0),
                      textcoords="offset points", va="center", fontsize=7, color=GRAY)  # fmt: skip
    starts = {layer.stage: i for i, layer in reversed(list(enumerate(layers, start=1)))}
    for start in starts.values():
        axis.axvline(start - 0.5, color=GRAY, lw=0.7, alpha=0.5)
    axis.set_xticks([start for start in starts.values()], list(starts), rotation=30, ha="left", fontsize=8)
    axis.set_yscale("log")
    axis.set_ylabel("|gradient| / |weights|", fontsize=9)
    axis.set_title(fill(title, 58), loc="left", fontsize=10, parse_math=False)
    _style(axis)
    if drawn:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _style(axis: Any) -> None:
    axis.grid(alpha=0.25, axis="y")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
