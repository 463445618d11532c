"""The key `optim.body`: which parts of a network train, and how fast those below the classifier do."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import nn

from normfree.models.net import Net
from normfree.suggest import did_you_mean, problem, some_names
from normfree.training.choices import BODIES, parse_choice


def layers(net: Net) -> list[str]:
    """Return the names of the layers from the input on: stem, blocks, final convolution or norm, classifier."""
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(net.stages) for j, _ in stage.named_children()]
    last = [
        name
        for name, module in net.named_children()
        if name not in ("stem", "stages", "head") and list(module.parameters())
    ]
    return ["stem", *blocks, *last, "head"]


def freeze_(net: Net, body: str) -> None:
    """Exclude the parameters of the frozen parts from training.

    Args:
        net: the network, changed in place.
        body: a value of `optim.body`. "freeze" keeps only the classifier trainable; `freeze` of "train" has names of
            modules or shell patterns of names of parameters, separated by commas.

    Raises:
        ValueError: a pattern matches no parameter, or nothing is left to train.
    """
    choice = parse_choice(body, BODIES)
    parameters = dict(net.named_parameters())
    if choice.name == "freeze":
        patterns = [name for name in layers(net) if name != "head"]
    else:
        patterns = [part.strip() for part in choice["freeze"].split(",") if part.strip()]
    for pattern in patterns:
        members = [
            name for name in parameters if name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)
        ]
        if not members:
            known = [name for name, module in net.named_modules() if name and list(module.parameters())]
            given = f"optim.body={body!r} freezes {pattern!r}, which is no part of the network"
            raise ValueError(problem(given, allowed=some_names(layers(net))) + did_you_mean(pattern, known))
        for name in members:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise ValueError(problem(f"optim.body={body!r} freezes every parameter", fix="leave a part to train"))


def frozen_modules(net: nn.Module) -> list[nn.Module]:
    """Return the largest modules of which no parameter trains.

    They compute as in evaluation, so that a frozen part is a fixed function: batch norm keeps its statistics, and
    stochastic depth drops nothing.
    """
    parameters = list(net.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [net]
    return [module for child in net.children() for module in frozen_modules(child)]


def lr_multipliers(net: Net, body: str) -> dict[str, float]:
    """Return the factors on the learning rate for `parameter_groups`, by regular expression; empty if all are 1.

    The classifier has factor 1, the layer below it lr * layer_decay, the next one lr * layer_decay ** 2, and so on.
    """
    choice = parse_choice(body, BODIES)
    if choice.name == "freeze" or choice["lr"] == choice["layer_decay"] == 1.0:
        return {}
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    below = list(reversed(layers(net)[:-1]))
    return {
        rf"^{re.escape(layer)}\.": choice["lr"] * choice["layer_decay"] ** depth
        for depth, layer in enumerate(below, start=1)
        if any(name.startswith(f"{layer}.") for name in trained)
    }
