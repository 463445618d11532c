"""Config values that name one of several things and set its options: "adamw", "adamw:betas=0.9/0.95,eps=1e-6".

They follow the grammar of `data` ("cifar10:root=data,download=no"), so that a feature needs one key instead of one for
each of its options. This file does not import PyTorch, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from normfree.suggest import did_you_mean

# The default of an option, which also decides its type: a number, a yes or no, a text, or numbers separated by slashes.
Default = float | int | bool | str | tuple[float, ...]
Choices = Mapping[str, Mapping[str, Default]]

# What `objective` can be, with the options of each.
OBJECTIVES: Choices = {
    "classify": {},
    # threshold: targets above it become 1, the others 0, after mixing and smoothing; 0 keeps soft targets.
    # sum: sum over the classes instead of the mean. Both as timm's --bce-target-thresh and --bce-sum.
    "bce": {"threshold": 0.0, "sum": False},
    # Embeddings instead of classes. simclr: two views of each image, without labels; dim: width of the projection.
    "simclr": {"temperature": 0.2, "dim": 128},
    # mining: all, hard or semihard.
    "triplet": {"margin": 0.2, "mining": "hard"},
    # margin: the distance to which images of two classes are pushed apart.
    "pairwise": {"margin": 1.0},
}
EMBEDDINGS = ("simclr", "triplet", "pairwise")

# What `optim.optimizer` can be: `SGD` and classes of torch.optim, with their own options and defaults. For muon,
# `betas` are those of AdamW, which moves what is no matrix.
OPTIMIZERS: Choices = {
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "nadam": {"betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 0.004},
    "radam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    "muon": {"momentum": 0.95, "nesterov": True, "ns_steps": 5, "betas": (0.9, 0.999)},
}
# What `optim.clip` can be. eps: lower bound of the weight norm. unclipped: name patterns of parameters. private: each
# example is clipped and noise is added; epsilon is a text because it may be inf.
CLIPS: Choices = {
    "agc": {"eps": 1e-3, "unclipped": "head.weight"},
    "norm": {},
    "value": {},
    "off": {},
    "private": {"epsilon": "8", "delta": 1e-5, "accountant": "rdp"},
}
# What `optim.schedule` can be. final: learning rate at the end, as a fraction of the peak.
SCHEDULES: Choices = {"warmup_cosine": {"final": 0.0}, "warmup_linear": {"final": 0.0}, "constant": {}}
# What `optim.body`, everything except the classifier, can be. lr: factor on the learning rate. layer_decay: further
# factor for each layer below the classifier. freeze: parts that do not train.
BODIES: Choices = {"train": {"lr": 1.0, "layer_decay": 1.0, "freeze": ""}, "freeze": {}}
# What `on_divergence` can be. lr: factor on the learning rate at each return; times: the most returns.
DIVERGENCES: Choices = {"stop": {}, "rollback": {"lr": 0.3, "times": 3}}


@dataclass(frozen=True)
class Choice:
    """A parsed value: the name and all options of it, those that were not given with their defaults."""

    name: str
    options: dict[str, Any]

    def __getitem__(self, option: str) -> Any:
        return self.options[option]


def parse_choice(text: str, choices: Choices) -> Choice:
    """Parse "NAME" or "NAME:option=value,...".

    Args:
        text: the value of a key.
        choices: the names, and for each one the defaults of its options.

    Raises:
        ValueError: the name or an option is unknown, or a value has the wrong type. The message holds what is allowed,
            to follow "Allowed: ".

    >>> parse_choice("b:size=3", {"a": {}, "b": {"size": 1, "sum": False}})
    Choice(name='b', options={'size': 3, 'sum': False})
    """
    name, colon, rest = text.partition(":")
    if name not in choices:
        allowed = "; ".join(_form(known, defaults) for known, defaults in choices.items())
        raise ValueError(f"{allowed}.{did_you_mean(name, choices)}")
    defaults = choices[name]
    values: dict[str, Default] = {}
    # As in `data`, a comma that is not followed by "option=" belongs to the value.
    for part in re.split(r",(?=\w+=)", rest) if colon else ():
        option, _, value = part.partition("=")
        empty = not value and not isinstance(defaults.get(option), str)
        if option in values or (empty and option in defaults):
            what = "a value" if empty else "one value"
            raise ValueError(f"{what} for {option}, as in {_form(name, defaults)}")
        if option not in defaults:
            raise ValueError(f"{_form(name, defaults)}.{did_you_mean(option, defaults)}")
        values[option] = _value(option, value, defaults[option])
    return Choice(name, {**defaults, **values})


def uses_sigmoid(objective: str) -> bool:
    """Return True if the classes of this objective are independent: probabilities are sigmoids of the logits."""
    return parse_choice(objective, OBJECTIVES).name == "bce"


def is_private(clip: str) -> bool:
    """Return True if this value of optim.clip asks for differentially private training."""
    return parse_choice(clip, CLIPS).name == "private"


def learns_embeddings(objective: str) -> bool:
    """Return True if this objective compares the embeddings of a batch with each other, and needs no classifier."""
    return parse_choice(objective, OBJECTIVES).name in EMBEDDINGS


def _form(name: str, defaults: Mapping[str, Default]) -> str:
    """Return NAME:option=default,... as a user would write it."""
    return name + ":" * bool(defaults) + ",".join(f"{k}={_written(v)}" for k, v in defaults.items())


def _written(value: Default) -> str:
    """Return a value as a user would write it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "/".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value}"


def _value(option: str, text: str, default: Default) -> Default:
    """Return the value of an option in the type of its default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text not in ("yes", "no"):
            raise ValueError(f"{option}=yes or {option}=no")
        return text == "yes"
    try:
        if isinstance(default, tuple):
            numbers = tuple(_number(part) for part in text.split("/"))
            if len(numbers) != len(default):
                raise ValueError
            return numbers
        return int(text) if isinstance(default, int) else _number(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "numbers of 0 or more"
        raise ValueError(f"{kind}, for example {option}={_written(default)}") from None


def _number(text: str) -> float:
    """Return a finite number of 0 or more."""
    number = float(text)
    if not 0.0 <= number < float("inf"):
        raise ValueError
    return number
