"""`normfree list` and `normfree show`."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from tyro.conf import Positional

from normfree.commands.usage import UsageError


@dataclass
class ListArguments:
    """Networks with their size and cost, or recipes."""

    what: Positional[str] = "models"
    """models, recipes, or a pattern of model names such as 'nf_*'."""
    pattern: Positional[str] = "*"
    """A shell pattern of names."""


def list_(arguments: ListArguments) -> int:
    from rich.console import Console
    from rich.table import Table

    what, pattern = arguments.what, arguments.pattern
    if what not in ("models", "recipes"):
        what, pattern = "models", what
    table = Table(box=None, pad_edge=False, header_style="bold")
    if what == "recipes":
        from normfree.training.recipes import RECIPES

        table.add_column("recipe")
        table.add_column("what")
        for name, recipe in RECIPES.items():
            table.add_row(name, (recipe.__doc__ or "").splitlines()[0])
    else:
        from normfree.models.cost import count
        from normfree.models.variants import list_models, variant_of

        for column in ("model", "parameters", "GMAC", "train px", "test px", "norm", "depths", "widths"):
            table.add_column(
                column, justify="left" if column in ("model", "norm", "depths", "widths") else "right"
            )
        names = list_models(pattern)
        if not names:
            raise UsageError(f"no model matches {pattern!r}. All names: normfree list models")
        for name in names:
            row = variant_of(name)
            cost = count(row)
            table.add_row(
                name, f"{cost.parameters:,}", f"{cost.macs / 1e9:.3f}", str(row.train_size), str(row.test_size),
                row.norm, " ".join(map(str, row.depths)), " ".join(map(str, row.widths)),
            )  # fmt: skip
    # A file or pipe gets whole lines, a terminal its own width.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    return 0
