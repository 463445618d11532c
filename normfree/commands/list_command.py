"""`normfree list`: networks with their size and cost, or recipes."""

from __future__ import annotations

import fnmatch
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError
from normfree.suggest import did_you_mean, problem

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ListArguments:
    """List the networks with their size and cost, or the training recipes."""

    what: Annotated[Positional[str], tyro.conf.arg(metavar="[WHAT]")] = "models"
    """models, recipes, or a pattern of model names such as 'nf_*'."""
    pattern: Annotated[Positional[str], tyro.conf.arg(metavar="[PATTERN]")] = "*"
    """A shell pattern of names."""


def list_(arguments: ListArguments) -> int:
    """Print a table of models or recipes; return 0."""
    from rich.console import Console

    what, pattern = arguments.what, arguments.pattern
    if what not in ("models", "recipes"):
        what, pattern = "models", what
    table = _recipes(pattern) if what == "recipes" else _models(pattern)
    # On a terminal, rich uses its width; in a file or pipe, 140 columns keep every line whole.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)
    return 0


def _recipes(pattern: str) -> Table:
    """Return the table of the recipes whose names match a shell pattern."""
    from rich.table import Table

    from normfree.training.recipes import RECIPES

    table = Table("recipe", "description", box=None, pad_edge=False, header_style="bold")
    names = fnmatch.filter(RECIPES, pattern)
    if not names:
        raise UsageError(problem(f"no recipe matches {pattern!r}", allowed="a shell pattern such as 'imagenet*'",
                                 fix="see all names with `normfree list recipes`"))  # fmt: skip
    for name in names:
        table.add_row(name, (RECIPES[name].__doc__ or "").splitlines()[0])
    return table


def _models(pattern: str) -> Table:
    """Return the table of the models whose names match a shell pattern."""
    from rich.table import Table

    from normfree.models.cost import count
    from normfree.models.variants import list_models, variant_of

    names = list_models(pattern)
    if not names:
        raise UsageError(
            problem(f"no model matches {pattern!r}.{did_you_mean(pattern, ('models', 'recipes'))}",
                    allowed="models, recipes, or a shell pattern such as 'nf_*'",
                    fix="see all names with `normfree list models`")
        )  # fmt: skip
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "parameters", "GMAC", "train px", "test px", "norm", "depths", "widths"):
        left = column in ("model", "norm", "depths", "widths")
        table.add_column(column, justify="left" if left else "right")
    for name in names:
        variant = variant_of(name)
        cost = count(variant)
        table.add_row(
            name, f"{cost.parameters:,}", f"{cost.macs / 1e9:.3f}", str(variant.train_size), str(variant.test_size),
            variant.norm, " ".join(map(str, variant.depths)), " ".join(map(str, variant.widths)),
        )  # fmt: skip
    return table
