"""The page of the batch-size experiment: verdict, table and plot, made from its JSON file alone."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARMS = {"bn": "BN", "nf": "NF", "nf_agc": "NF + AGC"}
Row = Mapping[str, Any]  # a cell and its outcome
Scores = Mapping[tuple[str, int], Sequence[float]]

# [B] figure 2a, top-1 in percent on ImageNet; read off the figure; points hidden by others ± 0.1. None: below 70.
PAPER_BATCHES = (256, 512, 1024, 2048, 4096)
PAPER: dict[tuple[str, int], tuple[float | None, ...]] = {
    ("bn", 50): (76.9, 76.8, 76.4, 76.8, 76.8),
    ("nf", 50): (76.6, 76.7, 76.9, 76.9, None),
    ("nf_agc", 50): (76.8, 76.95, 76.95, 76.95, 76.7),
    ("bn", 200): (78.7, 79.0, 78.9, 79.0, 78.9),
    ("nf", 200): (79.3, 79.5, 79.5, 79.6, None),
    ("nf_agc", 200): (79.2, 79.45, 79.6, 79.45, 79.15),
}


def scores_of(rows: Iterable[Row]) -> dict[tuple[str, int], list[float]]:
    """Return top-1 of every seed by (arm, batch)."""
    scores: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        scores.setdefault((row["arm"], row["batch"]), []).append(row["top1"])
    return scores


def diverged(rows: Iterable[Row], arm: str, batch: int) -> int:
    """Return how many seeds of an arm diverged at a batch size."""
    return sum(r["status"] == "diverged" for r in rows if (r["arm"], r["batch"]) == (arm, batch))


def gap(scores: Scores, better: str, arm: str, batch: int) -> tuple[float, float]:
    """Return how many points the mean of `arm` is below that of `better`, and the standard error of that difference."""
    one, two = scores[better, batch], scores[arm, batch]
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(two) / len(two))
    return statistics.fmean(one) - statistics.fmean(two), error


def verdict(scores: Scores) -> tuple[str, str, str]:
    """Return whether AGC recovers the accuracy that large batches lose: a short verdict, a sentence, the numbers.

    A gap counts if it exceeds two standard errors. Accuracy is lost if NF is below BN by such a gap at the largest
    batch size, and the gap is larger than at the smallest batch size. AGC then recovers it if NF + AGC is not below
    BN by such a gap, recovers part of it if it is but NF + AGC is above NF by such a gap, and otherwise recovers none
    of it.
    """
    small, large = min(b for _, b in scores), max(b for _, b in scores)
    if min(len(own) for own in scores.values()) < 2:
        return "undecided", "A single seed has no spread, so there is no verdict.", ""
    (lost, lost_se), (before, _) = gap(scores, "bn", "nf", large), gap(scores, "bn", "nf", small)
    (left, left_se), (gained, gained_se) = (
        gap(scores, "bn", "nf_agc", large),
        gap(scores, "nf_agc", "nf", large),
    )
    numbers = (
        f"At batch {large}, NF is {lost:.1f} ± {lost_se:.1f} points below BN (at batch {small}: {before:.1f}), "
        f"and NF + AGC is {left:.1f} ± {left_se:.1f} below BN and {gained:.1f} ± {gained_se:.1f} above NF."
    )
    if not (lost > 2 * lost_se and lost > before):
        return "nothing lost", "Large batches lose no accuracy here, so there is nothing to recover.", numbers
    if left <= 2 * left_se:
        return "recovered", "AGC recovers the accuracy lost at large batch sizes.", numbers
    if gained > 2 * gained_se:
        return "partly recovered", "AGC recovers part of the accuracy lost at large batch sizes.", numbers
    return "not recovered", "AGC does not recover the accuracy lost at large batch sizes.", numbers


def table(batches: Sequence[int], rows: Sequence[Row]) -> list[str]:
    """Return the Markdown table of our results and the paper's, aligned at their largest batch sizes."""
    head = ["batch", *ARMS.values(), "λ (clipped units)", "[B]: batch"]
    head += [f"{name}-{depth}" for depth in (50, 200) for name in ("BN", "NF", "NF+AGC")]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    scores, shift = scores_of(rows), len(PAPER_BATCHES) - len(batches)
    for i, batch in enumerate(batches):
        fields = [str(batch)]
        for arm in ARMS:
            own = scores.get((arm, batch), [])
            lost = diverged(rows, arm, batch)
            text = f"{statistics.fmean(own):.1f}" if own else "–"
            text += f" ± {statistics.stdev(own):.1f}" if len(own) > 1 else ""
            fields.append(text + (f" ({lost} of {len(own)} diverged)" if lost else ""))
        agc = [r for r in rows if r["arm"] == "nf_agc" and r["batch"] == batch]
        clipped = 100 * statistics.fmean(r["clipped"] for r in agc) if agc else 0.0
        fields.append(f"{agc[0]['clipping']:g} ({clipped:.1f} %)" if agc else "–")
        fields.append(str(PAPER_BATCHES[i + shift]) if i + shift >= 0 else "")
        for depth in (50, 200):
            for arm in ARMS:
                value = PAPER[arm, depth][i + shift] if i + shift >= 0 else ""
                fields.append("fails (< 70)" if value is None else str(value))
        lines.append("| " + " | ".join(fields) + " |")
    return lines


@dataclass(frozen=True)
class Curve:
    """One arm of a plot: (batch, mean, spread) where it trained, and the labels of batch sizes where it did not."""

    points: list[tuple[int, float, float]]
    lost: dict[int, str]


def our_curves(batches: Sequence[int], rows: Sequence[Row]) -> dict[str, Curve]:
    """Return means and standard deviations; a batch size at which a seed diverged gets a label instead of a mean."""
    scores, curves = scores_of(rows), {}
    for arm in ARMS:
        curve = curves[arm] = Curve([], {})
        for batch in batches:
            own, lost = scores.get((arm, batch), []), diverged(rows, arm, batch)
            if lost:
                curve.lost[batch] = f"{lost} of {len(own)}\ndiverge"
            elif own:
                spread = statistics.stdev(own) if len(own) > 1 else 0.0
                curve.points.append((batch, statistics.fmean(own), spread))
    return curves


def paper_curves() -> dict[str, Curve]:
    """Return the paper's curves for ResNet-50."""
    curves = {}
    for arm in ARMS:
        pairs = list(zip(PAPER_BATCHES, PAPER[arm, 50], strict=True))
        curves[arm] = Curve([(b, v, 0.0) for b, v in pairs if v is not None],
                            {b: "fails" for b, v in pairs if v is None})  # fmt: skip
    return curves


def draw(preset: Mapping[str, Any], rows: Sequence[Row], path: Path) -> None:
    """Draw two plots into a PNG: our results with one standard deviation, and the paper's ResNet-50."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ours, paper = figure.subplots(1, 2)
    draw_panel(ours, preset["batches"], our_curves(preset["batches"], rows))
    draw_panel(paper, PAPER_BATCHES, paper_curves())
    title = f"ours: {preset['train_images']:,} images of 32 px, {preset['seeds']} seeds"
    ours.set_title(title, loc="left", fontsize=11)
    paper.set_title("the paper: ResNet-50 on ImageNet", loc="left", fontsize=11)
    paper.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=130)


def draw_panel(axis: Any, batches: Sequence[int], curves: Mapping[str, Curve]) -> None:
    """Draw one curve for each arm. Batch sizes without a mean are labeled crosses at the bottom."""
    from normfree.diagnose.plotting import BLUE, GREEN, ORANGE

    looks = {"bn": (BLUE, "s", "--", 0.97), "nf": (ORANGE, "^", ":", 1.0), "nf_agc": (GREEN, "o", "-", 1.03)}
    ends = [mean + side * spread for c in curves.values() for _, mean, spread in c.points for side in (-1, 1)]
    low, high = min(ends, default=0.0), max(ends, default=100.0)
    bottom = low - 0.25 * (high - low or 1.0)
    for arm, curve in curves.items():
        color, marker, line, shift = looks[arm]  # `shift` keeps error bars from hiding each other
        spreads = [spread for _, _, spread in curve.points]
        at = [batch * (shift if any(spreads) else 1.0) for batch, _, _ in curve.points]
        axis.errorbar(at, [mean for _, mean, _ in curve.points], yerr=spreads if any(spreads) else None, color=color,
                      marker=marker, ls=line, lw=2, ms=7, capsize=4, label=ARMS[arm])  # fmt: skip
        for batch, label in curve.lost.items():
            before = max((point for point in curve.points if point[0] < batch), default=None)
            if before and batch == min(b for b in curve.lost if b > before[0]):
                axis.plot([before[0], batch], [before[1], bottom], color=color, ls=line, lw=2)
            axis.plot([batch], [bottom], color=color, marker="X", ms=9, ls="none", clip_on=False)
            axis.annotate(label, (batch, bottom), color=color, ha="right", va="bottom", xytext=(-10, 3), fontsize=9,
                          textcoords="offset points", bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
    axis.set_ylim(bottom, high + 0.08 * (high - low or 1.0))
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(b) for b in batches])
    axis.minorticks_off()
    axis.set_xlabel("batch size (learning rate proportional)")
    axis.set_ylabel("top-1, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def probe_table(rows: Sequence[Row]) -> list[str]:
    """Return the Markdown table of the runs that determined rate and λ."""
    lines = ["| arm | batch | rate at 256 | λ | seed | top-1 |", "|---|---|---|---|---|---|"]
    for r in rows:
        score = "diverged" if r["status"] == "diverged" else f"{r['top1']:.1f}"
        clipping = f"{r['clipping']:g}" if r["clipping"] else "–"
        lines.append(
            f"| {ARMS[r['arm']]} | {r['batch']} | {r['lr']:g} | {clipping} | {r['seed']} | {score} |"
        )
    return lines


def settings(preset: Mapping[str, Any], *, network: Mapping[str, Any], data: str) -> str:
    """Return a paragraph on the settings that all cells share."""
    length, warmup = (
        re.sub(r"ep$", " epochs", re.sub(r"^1ep$", "1 epoch", preset[key])) for key in ("length", "warmup")
    )
    return (
        f"{preset['train_images']:,} training and {preset['val_images']:,} validation images at 32 px ({data}; "
        "compare the arms with each other, not with published figures), crops of at least half the area, flips. "
        f"{preset['model']} (blocks {tuple(network['depths'])}, widths {tuple(network['widths'])}, initial skip gain "
        f"{network['skip_gain']:g}) and its batch-norm twin, without dropout and stochastic depth. At every batch size "
        f"{length} (warm-up: {warmup}), cosine to 0, Nesterov momentum 0.9, weight decay 1e-4, label smoothing 0.1, "
        f"evaluated with the last weights. Peak rate {preset['lr']:g} · batch / 256 in every arm; λ is chosen for each "
        f"batch size, as in [B]. Mean ± standard deviation of {preset['seeds']} seeds; a diverged run counts with the "
        "accuracy of guessing. Clipped units: the mean fraction of units that AGC clips in a step."
    )


def write(found: Mapping[str, Any], results: Path) -> str:
    """Write page, plot and JSON of `found` into `results`; return the page."""
    preset, rows, probe = found["preset"], found["cells"], found["probe"]
    done = len(rows)
    short, first, numbers = (
        "unfinished",
        f"{done} of {found['total']} cells are finished: no verdict yet.",
        "",
    )
    if done == found["total"]:
        short, first, numbers = verdict(scores_of(rows))
    name, minutes = found["name"], sum(row["cpu_seconds"] for row in rows) / 60
    stem = "batch_size" if name == "cpu" else f"batch_size_{name}"
    page = [
        "# Accuracy against batch size", "",
        f"**{first}** {numbers}".strip(), "",
        f"![Top-1 against batch size, ours and the paper's]({stem}.png)", "",
        *table(preset["batches"], rows), "",
        "The columns from [B] on are figure 2a of [B] (arXiv 2102.06171), ResNet-50 and -200 on ImageNet, read off the "
        "figure (points hidden by others ± 0.1), aligned at the largest batch.", "",
        "The criterion, set before the runs: " + " ".join((verdict.__doc__ or "").split("\n\n")[1].split()), "",
        settings(preset, network=found["network"], data=found["data"]), "",
        f"`{found['command']}`: {done} cells, {minutes:.0f} minutes of CPU time, one thread each, on "
        f"{found['machine']}; torch {found['torch']}. {found['remark']}".strip(), "",
    ]  # fmt: skip
    if probe:
        page += [
            "These runs (`--probe`) determined the settings: the rate with the highest mean of BN and NF at the middle "
            "batch size, and for each batch size the λ with the highest score; 0.16 is the largest tried, also in [B]. "
            "Runs with seed 0 only show the cost of the smallest λ where it was not chosen. No mean above includes "
            "these runs.", "",
        ]  # fmt: skip
        page += [*probe_table(probe), ""]
    results.mkdir(parents=True, exist_ok=True)
    text = "\n".join(page).rstrip() + "\n"
    (results / f"{stem}.md").write_text(text, encoding="utf-8")
    (results / f"{stem}.json").write_text(
        json.dumps({**found, "verdict": short}, indent=1) + "\n", encoding="utf-8"
    )
    draw(preset, rows, results / f"{stem}.png")
    return text
