"""Pictures of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers as well.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches, that needs no display.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError('curves need matplotlib, which is not installed. Fix: pip install "normfree[demo]"')\
            from None  # fmt: skip
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
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
        color=GREY,
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
