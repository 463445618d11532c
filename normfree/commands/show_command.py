"""normfree.commands.show_command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from normfree.commands.usage import UsageError


@dataclass
class ShowArguments:
    """Everything about a network, a recipe or a run."""

    name: Positional[str]
    """A model name, a recipe name, or a run folder."""


def show(arguments: ShowArguments) -> int:
    from normfree.training.config_io import load_config, to_toml
    from normfree.training.recipes import RECIPES

    name = arguments.name
    if name in RECIPES:
        from normfree.training.resolve import resolve

        recipe = RECIPES[name]
        config = recipe()
        if config.model != "auto":  # whose network a folder of weights will bring
            config = resolve(config, starts=False).config
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
    from normfree.models.variants import variant_of
    from normfree.optim.groups import parameter_groups
    from normfree.training.recipes import RECIPES

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
