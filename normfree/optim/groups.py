"""Ordered name rules turn a network into parameter groups: who decays, who is clipped, who learns faster.

The published recipe has three kinds of parameters ([B] sections 4.1 and 4.3, reference code): gains, biases
and skip gains are clipped and do not decay, the classifier's weight decays and is not clipped, all else does
both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normfree.suggest import some_names


@dataclass(frozen=True)
class Rule:
    """How the parameters whose name matches `pattern` are updated.

    name: what the resulting group is called.
    pattern: regular expression, looked for anywhere in the parameter's name (`re.search`).
    weight_decay: factor on the weight decay of the run (False or 0: none; True or 1: all of it).
    clipping: whether adaptive gradient clipping acts on these parameters.
    lr_multiplier: factor on the learning rate of the run.
    """

    name: str
    pattern: str
    weight_decay: float = 1.0
    clipping: bool = True
    lr_multiplier: float = 1.0


# The reference code's grouping in our names. It exempts the classifier's weight alone: the classifier's
# bias is an ordinary bias, clipped and not decayed. The normalization rule serves the batch-norm twins,
# whose scales are what gains are to a normalizer-free network.
DEFAULT_RULES: tuple[Rule, ...] = (
    Rule("gains and biases", r"(^|\.)(gain|bias|skip_gain)$", weight_decay=0.0),
    Rule("normalization", r"(^|\.)[^.]*norm[^.]*\.weight$", weight_decay=0.0),
    Rule("classifier", r"^head\.weight$", clipping=False),
    Rule("weights", r"(^|\.)weight$"),
)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    clipping: float,
    unclipped: Sequence[str] | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of `model` into groups, as any torch optimizer takes them.

    Each parameter goes to the first rule that matches its name, hence into exactly one group. Parameters with
    `requires_grad=False` are left out. A group is a dictionary with `params`, `param_names`, `name`,
    `weight_decay`, `clipping` (0.0: not clipped) and `lr_multiplier`; rules that match nothing make no group.

    weight_decay, clipping: the run's values, for the groups to which they apply ([B] section 4.3: 2e-5,
    0.01).
    unclipped: whose gradients AGC leaves alone, as shell patterns of whole names ("head.weight", "stem.*",
        "*.gain"; * stands for dots too), in place of what `rules` say of clipping; () clips everything. [B] section
        4.1: the classifier is never clipped, the stem need not be, the stages must be at large batches.
    lr_multipliers: pattern -> further factor on the learning rate, first match wins, so that fine-tuning can
        slow the trunk down and keep `rules`.
    Raises ValueError for a parameter that no rule matches, for a pattern of `lr_multipliers` that decides for no
    trainable parameter, and for one of `unclipped` that matches no parameter.
    Source: the grouping of the reference code (151, 1 and 81 tensors on NFNet-F0).
    """
    multipliers = dict(lr_multipliers or {})
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {name: _first([rule.pattern for rule in rules], name) for name in trainable}
    slowed = {name: _first(list(multipliers), name) for name in trainable}
    _check_rules(chosen, slowed, rules=rules, patterns=list(multipliers))
    _check_unclipped(unclipped or (), [name for name, _ in model.named_parameters()], rules)
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        index = chosen[name]
        rule, which = rules[index], slowed[name]
        multiplier = rule.lr_multiplier * (1.0 if which < 0 else list(multipliers.values())[which])
        clipped = rule.clipping
        if unclipped is not None:
            clipped = not any(fnmatchcase(name, pattern) for pattern in unclipped)
        group = groups.setdefault(
            (index, multiplier, clipped),
            {
                "params": [],
                "param_names": [],
                "name": rule.name,
                "weight_decay": weight_decay * rule.weight_decay,
                "clipping": clipping if clipped else 0.0,
                "lr_multiplier": multiplier,
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def parse_unclipped(text: str) -> tuple[str, ...]:
    """The patterns of one line with commas between, as `parameter_groups` takes them; "" is none, so all is clipped.

    Raises ValueError for a line with an empty pattern.
    """
    patterns = tuple(word.strip() for word in text.split(",")) if text.strip() else ()
    if "" in patterns:
        fix = ",".join(pattern for pattern in patterns if pattern)
        raise ValueError(
            f"unclipped={text!r} has an empty pattern. Allowed: names with commas between, with * for any part. "
            f"Fix: {fix!r}"
        )
    return patterns


def _first(patterns: list[str], name: str) -> int:
    """Index of the first pattern found in `name`, -1 for none."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), -1)


def _check_rules(
    chosen: dict[str, int], slowed: dict[str, int], *, rules: Sequence[Rule], patterns: list[str]
) -> None:
    unmatched = [name for name, index in chosen.items() if index < 0]
    if unmatched:
        listed = ", ".join(f"{rule.name} {rule.pattern!r}" for rule in rules) or "none"
        raise ValueError(
            f"No rule matches {some_names(unmatched)}. Every trainable parameter needs one; the rules in "
            f"order are: {listed}. Add a Rule for it, or end the rules with Rule('rest', '')."
        )
    unused = [pattern for i, pattern in enumerate(patterns) if i not in slowed.values()]
    if unused:
        raise ValueError(
            f"lr_multipliers has {some_names(unused)}, which decides for no trainable parameter. Patterns are "
            f"searched in names such as {some_names(slowed)}, and the first match wins. "
            "Correct the pattern, or move it up."
        )


def _check_unclipped(patterns: Sequence[str], names: Sequence[str], rules: Sequence[Rule]) -> None:
    if isinstance(patterns, str):  # its letters would be taken for patterns
        raise ValueError(
            f"unclipped={patterns!r} is one text. Allowed: a sequence of patterns. Fix: unclipped=({patterns!r},)"
        )
    wrong = next((p for p in patterns if not any(fnmatchcase(name, p) for name in names)), None)
    if wrong is None:
        return
    near = {name: name for name in names}
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
        near |= dict(zip(heads, heads, strict=True))
        for rule in rules:  # "classifier" is called head.weight
            if re.search(rule.pattern, name):
                near.setdefault(rule.name, name)
    close = get_close_matches(wrong, near, n=1, cutoff=0.0)
    raise ValueError(
        f"unclipped has {wrong!r}, which matches no parameter. Allowed: names of parameters, with * for any part. "
        + (f"Did you mean {near[close[0]]!r}?" if close else "This model has none.")
    )
