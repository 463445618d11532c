"""The text output of `normfree diagnose`: tables for people, JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from normfree.diagnose.dependence import DependenceReport
    from normfree.diagnose.gradients import GradientReport
    from normfree.diagnose.propagation import SignalReport


def _table(columns: Sequence[str]) -> Table:
    """Return an empty table whose first column is aligned left and the others right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def print_signal(console: Console, report: SignalReport) -> None:
    """Print the statistics of every block."""
    predicted = any(b.predicted for b in report.blocks)
    console.print(
        "\nSignal propagation" + (", predicted for random weights in brackets" if predicted else "")
    )
    table = _table(("block", "stage", "variance", "branch variance", "squared mean", "cosine"))
    if report.stem is not None:
        stem = report.stem
        table.add_row(
            "stem", "", _number(stem.variance), "", _number(stem.squared_mean), f"{stem.cosine:.3f}"
        )
    for b in report.blocks:
        cells = [
            "" if (value := getattr(b, field)) is None
            else _number(value, None if b.predicted is None else getattr(b.predicted, field))
            for field in ("variance", "branch_variance", "squared_mean")
        ]  # fmt: skip
        table.add_row(b.module, str(b.stage), *cells, f"{b.cosine:.3f}")
    console.print(table)
    if report.pooled_shortcuts and not report.batch_statistics:
        console.print(
            "the predictions assume that average pooling on the shortcuts keeps the variance, as on smooth images; on "
            "noise each pooling reduces the variance to about a quarter"
        )
    if report.batch_statistics:
        console.print("batch norms are untrained, so they used the statistics of these images")


def _number(value: float, predicted: float | None = None) -> str:
    """Return a value, and in brackets its prediction if there is one."""
    text = f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
    return text if predicted is None else f"{text} ({predicted:.3f})"


def print_gradients(console: Console, report: GradientReport, *, recommended: float, basis: str) -> None:
    """Print the ratio of gradient norm to weight norm for each part of the network.

    Args:
        console: where to print.
        report: the gradients.
        recommended: a clipping threshold λ; NaN if there is nothing to recommend.
        basis: what the recommendation is based on, or why there is none.
    """
    from normfree.diagnose.gradients import CLIPPINGS, SHARE, joined_quantile

    console.print("\nGradient norm / weight norm, by unit")
    table = _table(("part", "units", "median", "90 %", "largest", "dead", "exploding"))
    for name, layers in report.stages.items():
        median, high, largest = (joined_quantile([x.ratios for x in layers], q) for q in (0.5, 0.9, 1.0))
        table.add_row(name, str(sum(x.units for x in layers)), f"{median:.2g}", f"{high:.2g}", f"{largest:.2g}",
                      str(sum(x.dead for x in layers)), str(sum(x.exploding for x in layers)))  # fmt: skip
    console.print(table)
    shares = ", ".join(f"{100 * report.clipped(c):.1f} % at λ {c:g}" for c in CLIPPINGS)
    console.print(f"share of units that clipping would change: {shares}")
    if not math.isnan(recommended):
        console.print(
            f"λ {recommended:.2g} would clip {100 * SHARE:.0f} % of the units that have a gradient, {basis}"
        )
    elif basis:
        console.print(basis)
    if report.missing:
        console.print(
            f"{len(report.missing)} parameters have no gradient, the first is {report.missing[0]!r}"
        )


def print_dependence(console: Console, report: DependenceReport) -> None:
    """Print whether the output for an image depends on the other images of the batch."""
    from rich.text import Text

    console.print("\nDoes the output for an image depend on the other images in the batch?")
    for mode, d in (("training", report.train), ("evaluation", report.eval)):
        if not d.depends:
            exact = max(d.output, d.gradient, d.leak) == 0
            console.print(f"{mode}: no, {'bit for bit the same' if exact else 'the same up to rounding'}")
            continue
        names = ", ".join(name or "the network itself" for name in d.guilty[:5])
        more = f" and {len(d.guilty) - 5} more" if len(d.guilty) > 5 else ""
        console.print(Text(f"{mode}: yes, outputs change by {100 * d.output:.3g} %, gradients by "
                           f"{100 * d.gradient:.3g} %, caused by {names}{more}"))  # fmt: skip


def as_json(signal: SignalReport | None, gradients: GradientReport, dependence: DependenceReport) -> Any:
    """Return the three reports as a tree that JSON can hold, in which null stands for NaN and infinity."""
    tree = {
        "signal": signal and asdict(signal),
        "gradients": _gradients(gradients),
        "dependence": asdict(dependence),
    }
    return _finite(tree)


def _gradients(report: GradientReport) -> dict[str, Any]:
    """Return the numbers of a gradient report."""
    from normfree.diagnose.gradients import CLIPPINGS

    layers = [
        {
            "name": x.name, "stage": x.stage, "exempt": x.exempt, "units": x.units, "dead": x.dead, "tiny": x.tiny,
            "exploding": x.exploding, "quantiles": {str(q): x.quantile(q) for q in (0.1, 0.5, 0.9, 1.0)},
        }
        for x in report.layers
    ]  # fmt: skip
    clipped = {f"{c:g}": report.clipped(c) for c in CLIPPINGS}
    return {
        "layers": layers,
        "missing": report.missing,
        "clipped": clipped,
        "recommended": report.recommended,
    }


def _finite(value: Any) -> Any:
    """Return the tree with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
