"""Writes docs/models.md from the table of variants: `python docs/make_models.py`."""

from __future__ import annotations

from pathlib import Path

from normfree.models.cost import count
from normfree.models.variants import VARIANTS


def table() -> str:
    """The document."""
    lines = [
        "# Networks",
        "",
        "Written by `python docs/make_models.py` from `normfree/models/variants.py`. Parameters with 1000 classes;",
        "multiply-accumulates (GMAC) for one image at test size, which the papers print as FLOPs.",
        "",
        "| name | parameters | GMAC | train px | test px | depths | widths | norm |",
        "|---|--:|--:|--:|--:|---|---|---|",
    ]
    for name, row in VARIANTS.items():
        cost = count(row)
        depths, widths = (" ".join(map(str, values)) for values in (row.depths, row.widths))
        lines.append(
            f"| `{name}` | {cost.parameters:,} | {cost.macs / 1e9:.4g} | {row.train_size} | {row.test_size} | {depths} "
            f"| {widths} | {row.norm} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(table(), encoding="utf-8")
