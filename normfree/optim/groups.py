"""Parameter groups for any network: which parameters decay, which are clipped, which learn faster.

The published recipe has three kinds of parameters ([B] sections 4.1 and 4.3, reference code). Gains, biases and skip
gains are clipped and do not decay; the weight of the classifier decays and is not clipped; all others do both. For
NFNet-F0 they are 151, 1 and 81 tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from normfree.optim.classifier import find_classifier
from normfree.optim.parameter_kinds import CLASSIFIER, KINDS, WEIGHTS, parameter_kinds
from normfree.suggest import closest, problem, some_names


class ParameterGroups(list[dict[str, Any]]):
    """The groups that `parameter_groups` returns: a list of dictionaries that prints as a table."""

    def __repr__(self) -> str:
        header = ("group", "tensors", "numbers", "weight decay", "clipping", "lr", "parameters")
        lines = [header]
        for group in self:
            names = group["param_names"]
            lines.append(
                (
                    group["name"],
                    str(len(names)),
                    f"{sum(p.numel() for p in group['params']):,}",
                    f"{group['weight_decay']:g}" if group["weight_decay"] else "none",
                    f"{group['clipping']:g}" if group["clipping"] else "none",
                    f"× {group['lr_multiplier']:g}",
                    some_names(names, limit=1),
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = (0, len(header) - 1)
        cells = [
            [
                c.ljust(w) if i in left else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            for line in lines
        ]
        return "\n".join("  ".join(line).rstrip() for line in cells)


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float = 2e-5,
    clipping: float = 0.01,
    classifier: str | Sequence[str] | None = None,
    unclipped: Sequence[str] | None = None,
    lr_multipliers: Mapping[str, float] | None = None,
) -> ParameterGroups:
    """Return the trainable parameters of any model in groups, for any PyTorch optimizer and `adaptive_clip_grad_`.

    The type of the module that owns a parameter decides. Printed, the groups show what was decided.

    - "gains and biases" (biases, and scalars and vectors outside linear layers) and "normalization" do not decay.
    - "embeddings" do not decay: `nn.Embedding`, tokens, tables of position biases, and what `no_weight_decay()` names.
    - "classifier", the weight of the layer that computes the logits, decays and is not clipped. It is what timm's
      `get_classifier()` returns, else the linear layer that torch.fx finds to feed the output, else `classifier`.
    - "weights", all others, decay.

    Args:
        model: any module. Parameters with `requires_grad=False` are left out.
        weight_decay: weight decay of the groups that decay, 2e-5 in [B] section 4.3.
        clipping: clipping factor λ of the groups that are clipped, 0.01 in [B] section 4.3.
        classifier: the name of the classifier's module, such as "head.fc", several names, or () if there is none.
        unclipped: shell patterns of the full names of parameters that are not clipped, such as "head.weight",
            "stem.*" or "*.gain" (* also matches dots), in place of the classifier; () clips all. By [B] section 4.1
            the classifier is never clipped, the stem need not be, and large batches need the stages.
        lr_multipliers: factors on the learning rate by regular expression; the first match counts. `normfree.SGD`
            applies them; PyTorch's optimizers ignore them.

    Returns:
        Groups with `params`, `param_names`, `name`, `weight_decay`, `clipping` (0.0: not clipped), `lr_multiplier`.

    Raises:
        ValueError: a name of `classifier` is no module, or a pattern matches no parameter.

    Warns:
        UserWarning: the classifier was not found, so that its weight is clipped like all others.

    Examples:
        >>> import torchvision
        >>> normfree.parameter_groups(torchvision.models.resnet18())
        group             tensors     numbers  weight decay  clipping   lr  parameters
        gains and biases       21       5,800          none      0.01  × 1  'bn1.bias' and 20 more
        normalization          20       4,800          none      0.01  × 1  'bn1.weight' and 19 more
        classifier              1     512,000         2e-05      none  × 1  'fc.weight'
        weights                20  11,166,912         2e-05      0.01  × 1  'conv1.weight' and 19 more
    """
    multipliers = dict(lr_multipliers or {})
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    chosen = {name: _first(list(multipliers), name) for name in trainable}
    _check_multipliers(chosen, list(multipliers))
    if classifier is None:
        classifier = _find(model, warns=clipping > 0.0 and unclipped is None)
    kinds = parameter_kinds(model, classifier)
    _check_unclipped(unclipped or (), kinds)
    keys = {}
    for name in trainable:
        exempt = kinds[name] == CLASSIFIER
        if unclipped is not None:
            exempt = any(fnmatchcase(name, pattern) for pattern in unclipped)
        multiplier = 1.0 if chosen[name] < 0 else list(multipliers.values())[chosen[name]]
        keys[name] = KINDS.index(kinds[name]), multiplier, not exempt
    return ParameterGroups(
        {
            "params": [trainable[name] for name in trainable if keys[name] == key],
            "param_names": [name for name in trainable if keys[name] == key],
            "name": KINDS[key[0]],
            "weight_decay": weight_decay if KINDS[key[0]] in (CLASSIFIER, WEIGHTS) else 0.0,
            "clipping": clipping if key[2] else 0.0,
            "lr_multiplier": key[1],
        }
        for key in sorted(set(keys.values()))
    )


def _find(model: nn.Module, *, warns: bool) -> Sequence[str]:
    """Return the names of the classifier's layers, or () with a warning if they are not found."""
    try:
        return find_classifier(model)
    except ValueError as error:
        if warns:
            warnings.warn(f"{error} Its weight is clipped like all others.", stacklevel=3)
        return ()


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


def _check_multipliers(chosen: Mapping[str, int], patterns: Sequence[str]) -> None:
    """Raise ValueError for a pattern of `lr_multipliers` without a parameter."""
    unused = [pattern for i, pattern in enumerate(patterns) if i not in chosen.values()]
    if unused:
        raise ValueError(
            problem(
                f"lr_multipliers has {some_names(unused)}, which applies to no trainable parameter",
                allowed=f"patterns found in names such as {some_names(chosen)}, of which the first match counts",
                fix="correct the pattern, or move it up",
            )
        )


def _check_unclipped(patterns: Sequence[str], kinds: Mapping[str, str]) -> None:
    """Raise ValueError for a pattern of `unclipped` that matches no parameter."""
    if isinstance(patterns, str):  # each of its characters would be a pattern
        fix = f"pass unclipped=({patterns!r},)"
        raise ValueError(
            problem(f"unclipped={patterns!r} is a string", allowed="a sequence of patterns", fix=fix)
        )
    wrong = next((p for p in patterns if not any(fnmatchcase(name, p) for name in kinds)), None)
    if wrong is None:
        return
    near = {name: name for name in kinds}
    for name, kind in kinds.items():
        parts = name.split(".")
        heads = [".".join(parts[:i]) + ".*" for i in range(1, len(parts))]
        near |= dict(zip(heads, heads, strict=True))
        near.setdefault(kind, name)  # suggest head.weight for "classifier"
    close = closest(wrong, near)
    hint = f". Did you mean {near[close]!r}?" if close else ""
    raise ValueError(
        problem(
            f"unclipped has {wrong!r}, which matches no parameter{hint}",
            allowed="names of parameters, with * for any part",
        )
    )
