"""`normfree show`: everything about a network, a recipe, a run or a saved model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from normfree.commands.usage import UsageError
from normfree.suggest import printable


@dataclass
class ShowArguments:
    """Show everything about a network, a recipe, a run or a saved model."""

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """A model name, a recipe name, a run folder, a model folder, an exported file, or hf-hub:OWNER/NAME."""


def show(arguments: ShowArguments) -> int:
    """Print the fields of a variant, the config of a recipe or run, or what a saved model holds; return 0."""
    from normfree.models.variants import VARIANTS
    from normfree.training.recipes import RECIPES
    from normfree.weights.hub import PREFIX

    name = arguments.name
    if name in RECIPES:
        _show_recipe(name)
    elif (Path(name) / "config.toml").is_file():
        _show_run(Path(name))
    elif name not in VARIANTS and (name.startswith(PREFIX) or Path(name).exists()):
        _show_saved(name)
    else:
        _show_model(name)
    return 0


def _show_recipe(name: str) -> None:
    """Print the config of a recipe, with "auto" values resolved where the recipe itself names a model."""
    from normfree.training.config_io import to_toml
    from normfree.training.recipes import RECIPES
    from normfree.training.resolve import resolve

    recipe = RECIPES[name]
    config = recipe()
    if config.model not in ("auto", "fit"):
        config = resolve(config, starts=False).config
    print(f"# recipe {name}: {recipe.__doc__}\n{to_toml(config)}", end="")


def _show_run(folder: Path) -> None:
    """Print the config of a run and, if it is finished, its scores."""
    from normfree.scores import read_results, shown_top1
    from normfree.training.config_io import load_config, to_toml

    print(f"# run {folder}\n{to_toml(load_config(folder / 'config.toml'))}", end="")
    results = folder / "results.json"
    if results.is_file():
        scores = read_results(results)
        name = (
            "nearest neighbors" if "knn_top1" in scores else "two views" if "view_top1" in scores else "top-1"
        )
        last, average = (shown_top1(scores[kind]) for kind in ("weights", "average"))
        print(f"\n# {name} {last} %, averaged {average} %, after {scores['steps']} steps")


def _show_saved(name: str) -> None:
    """Print the network, the classes, the preprocessing and the files of a saved model, after loading it."""
    from dataclasses import fields

    from normfree.models.net import Net
    from normfree.pretrained import from_pretrained, model_args

    model = from_pretrained(name)
    net = model.net
    shape = " x ".join(map(str, model.preprocessing.shape))
    if isinstance(net, Net):
        size = sum(parameter.numel() for parameter in net.parameters())
        print(f"# {printable(name)}: {net.name}, {size:,} parameters, images of {shape}")
        for key, value in model_args(net).items():
            print(f"{key} = {value!r}")
    else:
        print(f"# {printable(name)}: exported from {net.name}, images of {shape}")
    print(f"# {len(model.classes)} classes, {'independent of each other' if model.sigmoid else 'one for each image'}"
          if model.classes else "# no classes, only embeddings")  # fmt: skip
    for number, label in enumerate(model.classes):
        print(f"{number} = {printable(label)!r}")
    print("# preprocessing")
    for field in fields(model.preprocessing):
        print(f"{field.name} = {getattr(model.preprocessing, field.name)!r}")
    folder = Path(name)
    if folder.is_dir():
        print("# files")
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            print(f"{printable(file.name)}: {file.stat().st_size:,} bytes")


def _show_model(name: str) -> None:
    """Print the size, the fields and the parameter groups of a variant."""
    from dataclasses import fields

    import torch

    from normfree.models.cost import count
    from normfree.models.net import Net
    from normfree.models.variants import variant_of
    from normfree.optim.groups import parameter_groups
    from normfree.training.recipes import RECIPES

    try:
        variant = variant_of(name)
    except ValueError as error:
        others = f"a recipe ({', '.join(list(RECIPES)[:7])}, ...), a run folder, or a model folder"
        raise UsageError(f"{str(error).rstrip('.')}. Also allowed: {others}.") from None
    cost = count(variant)
    print(f"# {name}: {cost.parameters:,} parameters, {cost.macs / 1e9:.4f} G multiply-accumulates at "
          f"{variant.test_size} px")  # fmt: skip
    for field in fields(variant):
        print(f"{field.name} = {getattr(variant, field.name)!r}")
    with torch.device("meta"):
        net = Net(variant)
    print("# parameter groups")
    for group in parameter_groups(net, weight_decay=1.0, clipping=1.0):
        sizes = sum(p.numel() for p in group["params"])
        print(f"{group['name']}: {len(group['params'])} tensors, {sizes:,} numbers, "
              f"{'decayed' if group['weight_decay'] else 'not decayed'}, "
              f"{'clipped' if group['clipping'] else 'not clipped'}")  # fmt: skip
