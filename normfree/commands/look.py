"""`normfree list` and `normfree show`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from normfree.commands.words import UsageError


@dataclass
class ListArguments:
    """Networks with their size and cost, or recipes."""

    what: Positional[str] = "models"
    """models, recipes, or a pattern of model names such as 'nf_*'."""
    pattern: Positional[str] = "*"
    """A shell pattern of names."""


@dataclass
class ShowArguments:
    """Everything about a network, a recipe or a run."""

    name: Positional[str]
    """A model name, a recipe name, or a run folder."""


def list_(arguments: ListArguments) -> int:
    from rich.console import Console
    from rich.table import Table

    what, pattern = arguments.what, arguments.pattern
    if what not in ("models", "recipes"):
        what, pattern = "models", what
    table = Table(box=None, pad_edge=False, header_style="bold")
    if what == "recipes":
        from normfree.train.recipes import RECIPES

        table.add_column("recipe")
        table.add_column("what")
        for name, recipe in RECIPES.items():
            table.add_row(name, (recipe.__doc__ or "").splitlines()[0])
    else:
        from normfree.models.cost import count
        from normfree.models.zoo import list_models, variant_of

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


def show(arguments: ShowArguments) -> int:
    from normfree.train.config import load_config, to_toml
    from normfree.train.recipes import RECIPES

    name = arguments.name
    if name in RECIPES:
        from normfree.train.run import resolve

        recipe = RECIPES[name]
        config = recipe()
        if config.model != "auto":  # whose network a folder of weights will bring
            config = resolve(config)
        print(f"# recipe {name}: {recipe.__doc__}\n{to_toml(config)}", end="")
    elif (Path(name) / "config.toml").is_file():
        print(f"# run {name}\n{to_toml(load_config(Path(name) / 'config.toml'))}", end="")
        results = Path(name) / "results.json"
        if results.is_file():
            scores = json.loads(results.read_text(encoding="utf-8"))
            print(f"\n# top-1 {scores['weights']['top1']:.2f} %, averaged {scores['average']['top1']:.2f} %, "
                  f"after {scores['steps']} steps")  # fmt: skip
    else:
        _show_model(name)
    return 0


def _show_model(name: str) -> None:
    from dataclasses import fields

    import torch

    from normfree.models.cost import count
    from normfree.models.net import Net
    from normfree.models.zoo import variant_of
    from normfree.optim.groups import parameter_groups
    from normfree.train.recipes import RECIPES

    try:
        row = variant_of(name)
    except ValueError as error:
        raise UsageError(
            f"{error}; all recipes: {', '.join(RECIPES)}; a run is a folder with a config.toml"
        ) from None
    cost = count(row)
    print(
        f"# {name}: {cost.parameters:,} parameters, {cost.macs / 1e9:.4f} G multiply-accumulates at {row.test_size} px"
    )
    for field in fields(row):
        print(f"{field.name} = {getattr(row, field.name)!r}")
    with torch.device("meta"):
        net = Net(row)
    print("# parameter groups")
    for group in parameter_groups(net, weight_decay=1.0, clipping=1.0):
        sizes = sum(p.numel() for p in group["params"])
        print(f"{group['name']}: {len(group['params'])} tensors, {sizes:,} numbers, "
              f"{'decayed' if group['weight_decay'] else 'not decayed'}, "
              f"{'clipped' if group['clipping'] else 'not clipped'}")  # fmt: skip
