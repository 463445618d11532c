"""The page of a sweep: a table of our numbers next to the paper's, the comparisons, the plot, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from experiments import candidates
from experiments.pages import markdown, verdict_lines
from experiments.verdicts import RULE, Scores, spread
from normfree.diagnose.plotting import new_figure
from normfree.uncertainty import wilson_interval

if TYPE_CHECKING:
    from experiments.sweep import Sweep


def page(sweep: Sweep, found: Mapping[str, Any]) -> str:
    """Return the page, from what the JSON holds."""
    images, rows = found["images"], found["cells"]
    seconds = [row["cpu_seconds"] for row in rows]
    trained_on = min(sweep.base.images, images["train"])
    lines = [f"# {found['title']}", "", sweep.about, ""]
    if not found["complete"]:
        lines += [
            f"**{found['finished']} of {found['expected']} cells are finished; the test images were not opened.**",
            "",
        ]
    else:
        lines += verdict_lines(found)
        lines += candidates.edge_lines(found["chosen"], sweep.choices)
        lines += ["", f"![Our scores]({found['stem']}.png)", "", *_table(sweep, rows), ""]
    if sweep.source:
        lines += [f"The paper's numbers: {sweep.source}.", ""]
    lines += [
        "The rule: " + " ".join((sweep.decide.__doc__ or "").split()) + f" {RULE}",
        "",
        f"{trained_on:,} training images, {images['choice']:,} other training images that chose rates and λ (V), "
        f"{images['test']:,} test images that chose nothing, {images['size']} px. Mean ± standard deviation of "
        f"{found['seeds']} seeds. {_image_note(rows)}",
        "",
    ]
    lines += candidates.section(found["chosen"], sweep.choices)
    each = f", {fmean(seconds):.0f} s for each cell of the table" if seconds else ""
    lines += [
        f"`{found['command']}`: {found['finished']} cells, {found['cpu_minutes']:.0f} minutes of CPU time{each}, one "
        f"thread each, on {found['machine']}; torch {found['torch']}."
    ]
    return "\n".join(lines) + "\n"


def _image_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return how uncertain one accuracy is because of the number of test images."""
    scores = [(row["top1"], row["test_images"]) for row in rows if "top1" in row]
    if not scores:
        return ""
    top1, count = scores[0]
    low, high = wilson_interval(round(top1 * count / 100), count)
    return (
        f"The level of a single accuracy is uncertain by ±{50 * (high - low):.1f} points (95 %) because of the number "
        "of test images; arms are scored on the same images, so differences are more certain."
    )


def _table(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the main table: a line for each arm and point."""
    scores, pairs = Scores(rows), dict(sweep.pairs)
    several = [row for row in rows if sum(key.startswith("top1@") for key in row) > 1]
    sizes = sorted({int(key[5:]) for row in several for key in row if key.startswith("top1@")})
    more = {f"top1@{size}": f"at {size} px" for size in sizes}
    if any("average_top1" in row for row in rows):
        more["average_top1"] = "averaged weights"
    if any("measured_top1" in row for row in rows):
        more["measured_top1"] = "statistics measured again"
    with_paper, with_axis = bool(sweep.paper), bool(sweep.axis)
    with_advice = any("recommended" in row for row in rows)
    head = [
        "arm",
        *([sweep.axis] if with_axis else []),
        "rate at 256",
        "λ",
        *(["λ recommended by the run"] if with_advice else []),
        "top-1 %",
        *more.values(),
        *(["paper"] if with_paper else []),
        "against",
        "difference in points (95 %)",
        "on trained images %",
        "clipped units %",
        "CPU ms per step",
    ]
    lines = []
    for point in sweep.points:
        for arm in sweep.arms:
            own = [row for row in rows if (row["arm"], row["point"]) == (arm, point)]
            if not own:
                continue
            good = [row for row in own if row["status"] == "done"]
            baseline = pairs.get(arm, "")
            compared = str(scores.compare((arm, point), (baseline, point))) if baseline else "–"
            paper = sweep.paper.get((arm, point), "–")
            lines.append(
                [
                    arm,
                    *([point] if with_axis else []),
                    f"{own[0]['rate']:g}",
                    f"{own[0]['clipping']:g}" if own[0]["clipping"] else "–",
                    *(
                        [spread([r["recommended"] for r in good if "recommended" in r], digits=3)]
                        * with_advice
                    ),
                    scores.text(arm, point),
                    *(spread([row[key] for row in good if key in row]) for key in more),
                    *([str(paper)] if with_paper else []),
                    baseline or "–",
                    compared,
                    spread([row["trained_top1"] for row in good]),
                    f"{100 * fmean(row['clipped'] for row in own):.1f}",
                    spread([row["step_ms"] for row in good]),
                ]
            )
    return markdown(head, lines)


def draw(sweep: Sweep, found: Mapping[str, Any], path: Path) -> None:
    """Draw our scores, and those of the paper where it has numbers, over the points of the axis.

    Both panels show the same number of percentage points. A number that the paper gives as text is a failure.
    """
    paper = {key: [float(value)] for key, value in sweep.paper.items() if not isinstance(value, str)}
    figure = new_figure(9 if paper else 6, 3.8)
    axes = figure.subplots(1, 2 if paper else 1, squeeze=False)[0]
    scores = Scores(found["cells"])
    ours = {(arm, point): scores.good(arm, point) for arm in sweep.arms for point in sweep.points}
    _panel(
        axes[0],
        sweep,
        ours,
        {key: scores.diverged(*key) for key in ours},
        labels=list(sweep.points),
        title=f"ours, {found['seeds']} seeds",
    )
    if paper:
        failed = {key: 1 for key, value in sweep.paper.items() if isinstance(value, str)}
        labels = [sweep.paper_points.get(point, point) for point in sweep.points]
        _panel(axes[1], sweep, paper, failed, labels=labels, title="the paper, on ImageNet")
        limits = [axis.get_ylim() for axis in axes]
        half = max(high - low for low, high in limits) / 2
        for axis, (low, high) in zip(axes, limits, strict=True):
            axis.set_ylim((low + high) / 2 - half, (low + high) / 2 + half)
    if len(sweep.points) > 1:  # else the arms are named below the axis
        axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def _panel(
    axis: Any,
    sweep: Sweep,
    scores: Mapping[tuple[str, str], Sequence[float]],
    diverged: Mapping[tuple[str, str], int],
    *,
    labels: Sequence[str],
    title: str,
) -> None:
    """Draw mean and standard deviation of each arm; a cross at the bottom is a point at which runs diverged."""
    single = len(sweep.points) == 1
    for number, arm in enumerate(sweep.arms):
        at, means, errors = [], [], []
        for position, point in enumerate(sweep.points):
            own = scores.get((arm, point), [])
            x = float(number if single else position)
            if own:
                at.append(x)
                means.append(fmean(own))
                errors.append(stdev(own) if len(own) > 1 else 0.0)
            if diverged.get((arm, point)):
                axis.plot(
                    [x],
                    [0.02],
                    marker="X",
                    color=f"C{number % 10}",
                    transform=axis.get_xaxis_transform(),
                    ls="none",
                )
        axis.errorbar(at, means, yerr=errors, marker="o", capsize=3, color=f"C{number % 10}", label=arm)
    names = list(sweep.arms) if single else labels
    axis.set_xticks(
        range(len(names)), names, rotation=30 if single else 0, ha="right" if single else "center", fontsize=8
    )
    axis.set_xlabel("" if single else sweep.axis)
    axis.set_ylabel("top-1, %")
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
