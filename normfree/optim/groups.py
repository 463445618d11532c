"""Parameter groups by ordered name rules: which parameters decay, which are clipped, which learn faster.

The published recipe has three kinds of parameters ([B] sections 4.1 and 4.3, reference code). Gains, biases and skip
gains are clipped and do not decay; the weight of the classifier decays and is not clipped; all others do both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normfree.suggest import closest, problem, some_names


@dataclass(frozen=True)
class Rule:
    """How to update the parameters whose name matches a pattern.

    Args:
        name: name of the resulting group.
        pattern: regular expression, searched anywhere in the name of the parameter (`re.search`).
        weight_decay: factor on the weight decay of the run.
        clipping: whether adaptive gradient clipping applies to these parameters.
        lr_multiplier: factor on the learning rate of the run.
    """

    name: str
    pattern: str
    weight_decay: float = 1.0
    clipping: bool = True
    lr_multiplier: float = 1.0


# The groups of the reference code, in our names. Only the weight of the classifier is exempt from clipping; its bias is
# clipped and not decayed like every bias. The normalization rule is for batch-norm twins, whose scales correspond to
# the gains of a normalizer-free network.
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
    """Return the trainable parameters of a model in groups, for any PyTorch optimizer and for `adaptive_clip_grad_`.

    Each parameter belongs to the first rule that matches its name, and so to exactly one group. Parameters with
    `requires_grad=False` are left out, and rules that match nothing make no group.

    Args:
        model: any module.
        weight_decay: weight decay of the groups that decay, 2e-5 in [B] section 4.3.
        clipping: clipping factor λ of the groups that are clipped, 0.01 in [B] section 4.3.
        unclipped: shell patterns of the full names of parameters that are not clipped, such as "head.weight",
            "stem.*" or "*.gain" (* also matches dots). They replace what `rules` define about clipping; () clips
            everything. According to [B] section 4.1 the classifier is never clipped, the stem need not be, and the
            stages must be for large batches.
        lr_multipliers: further factors on the learning rate by regular expression; the first match counts. Fine-tuning
            can lower the rate of the trunk with them and keep `rules`.
        rules: the rules in order.

    Returns:
        Dictionaries with `params`, `param_names`, `name`, `weight_decay`, `clipping` (0.0 means not clipped) and
        `lr_multiplier`.

    Raises:
        ValueError: no rule matches a parameter, a pattern of `lr_multipliers` matches no trainable parameter that an
            earlier one does not match, or a pattern of `unclipped` matches no parameter.

    Examples:
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=3)
        >>> groups = normfree.parameter_groups(net, weight_decay=2e-5, clipping=0.01)
        >>> for group in groups:
        ...     print(group["name"], group["weight_decay"], group["clipping"])
        gains and biases 0.0 0.01
        classifier 2e-05 0.0
        weights 2e-05 0.01

    Source: the groups of the reference code (151, 1 and 81 tensors for NFNet-F0).
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
    """Split a line of comma-separated patterns for `unclipped` of `parameter_groups`; "" gives none.

    Raises:
        ValueError: a pattern is empty.
    """
    patterns = tuple(pattern.strip() for pattern in text.split(",")) if text.strip() else ()
    if "" in patterns:
        fix = ",".join(pattern for pattern in patterns if pattern)
        raise ValueError(
            problem(
                f"unclipped={text!r} has an empty pattern",
                allowed="names separated by commas, with * for any part",
                fix=f"pass {fix!r}",
            )
        )
    return patterns


def _first(patterns: list[str], name: str) -> int:
    """Return the index of the first pattern found in `name`, or -1."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, name)), -1)


def _check_rules(
    chosen: dict[str, int], slowed: dict[str, int], *, rules: Sequence[Rule], patterns: list[str]
) -> None:
    """Raise ValueError for a parameter without a rule, and for a pattern of `lr_multipliers` without a parameter."""
    unmatched = [name for name, index in chosen.items() if index < 0]
    if unmatched:
        listed = ", ".join(f"{rule.name} {rule.pattern!r}" for rule in rules) or "none"
        raise ValueError(
            problem(
                f"no rule matches {some_names(unmatched)}",
                allowed=f"names that one of the rules matches, which are in order: {listed}",
                fix="add a Rule for it, or end the rules with Rule('rest', '')",
            )
        )
    unused = [pattern for i, pattern in enumerate(patterns) if i not in slowed.values()]
    if unused:
        raise ValueError(
            problem(
                f"lr_multipliers has {some_names(unused)}, which applies to no trainable parameter",
                allowed=f"patterns found in names such as {some_names(slowed)}, of which the first match counts",
                fix="correct the pattern, or move it up",
            )
        )


def _check_unclipped(patterns: Sequence[str], names: Sequence[str], rules: Sequence[Rule]) -> None:
    """Raise ValueError for a pattern of `unclipped` that matches no parameter."""
    if isinstance(patterns, str):  # each of its characters would be a pattern
        fix = f"pass unclipped=({patterns!r},)"
        raise ValueError(
            problem(f"unclipped={patterns!r} is a string", allowed="a sequence of patterns", fix=fix)
        )
    wrong = next((p for p in patterns if not any(fnmatchcase(name, p) for name in names)), None)
    if wrong is None:
        return
    near = {name: name for name in names}
    for name in names:
        parts = name.split(".")
        heads = [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
        near |= dict(zip(heads, heads, strict=True))
        for rule in rules:  # suggest head.weight for "classifier"
            if re.search(rule.pattern, name):
                near.setdefault(rule.name, name)
    close = closest(wrong, near)
    hint = f". Did you mean {near[close]!r}?" if close else ""
    raise ValueError(
        problem(
            f"unclipped has {wrong!r}, which matches no parameter{hint}",
            allowed="names of parameters, with * for any part",
        )
    )
