"""Writes docs/models.md from the table of variants: `python docs/make_models.py`."""

from __future__ import annotations

import re
from pathlib import Path

from normfree.models.cost import count
from normfree.models.variants import VARIANTS

# name -> where the row comes from; the first pattern that matches decides
SOURCES = {
    r"nfnet_f\d": "[B] table 1",
    r"nfnet_f\d_plus": "released code; [B] table 5 for F4+",
    r"nfnet_f\d_(baseline|width_pattern|default_width)": "[B] table 6",
    r"nf_resnet26": "[A], with timm's depths",
    r"nf_resnet\d+": "[A], released code",
    r"nf_regnet_b\d": "[A], released code",
    r"timm_\w+": "timm 1.0.31",
    r"nf_resnet_(nano|micro|mini)\w*": "ours, for small images",
}


def source(name: str) -> str:
    """Where the row called `name` comes from: a paper, the released code, or the row whose twin it is."""
    if VARIANTS[name].norm == "batch":
        original = name.replace("bn_nfnet", "nfnet") if name.startswith("bn_") else f"nf_{name}"
        assert original in VARIANTS, name
        return f"twin of `{original}`"
    return next(text for pattern, text in SOURCES.items() if re.fullmatch(pattern, name))


def table() -> str:
    """The document."""
    lines = [
        "# Networks",
        "",
        "Written by `python docs/make_models.py` from `normfree/models/variants.py`. Parameters with 1000 classes;",
        "multiply-accumulates (GMAC) for one image at test size, which the papers print as FLOPs. [A] is arXiv",
        "2101.08692, [B] arXiv 2102.06171; a twin is the same row with batch norm.",
        "",
        "| name | parameters | GMAC | train px | test px | depths | widths | source |",
        "|---|--:|--:|--:|--:|---|---|---|",
    ]
    for name, row in VARIANTS.items():
        cost = count(row)
        depths, widths = (" ".join(map(str, values)) for values in (row.depths, row.widths))
        giga = cost.macs / 1e9
        lines.append(
            f"| `{name}` | {cost.parameters:,} | {giga:.{3 if giga >= 1 else 4}f} | {row.train_size} | {row.test_size} "
            f"| {depths} | {widths} | {source(name)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("models.md").write_text(table(), encoding="utf-8")
