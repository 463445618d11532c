"""Tests of parameter groups, and of copying tensors by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from normfree.optim.agc import adaptive_clip_grad_
from normfree.optim.groups import parameter_groups, parse_unclipped
from normfree.optim.named_state import copy_named_
from normfree.optim.sgd import SGD
from normfree.suggest import some_names


class Twin(nn.Module):
    """A module with the parameter names of a batch-norm twin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv0": nn.Conv2d(3, 4, 3), "norm0": nn.BatchNorm2d(4)})
        self.stages = nn.Sequential(nn.Sequential(nn.ModuleDict({"se": nn.Linear(4, 4)})))
        self.final_norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem["norm0"](self.stem["conv0"](x))
        return self.head(self.final_norm(x).mean((2, 3)))


def test_groups_of_a_batch_norm_twin() -> None:
    groups = parameter_groups(Twin(), weight_decay=0.5, clipping=0.1)
    assert {g["name"]: (g["param_names"], g["weight_decay"], g["clipping"]) for g in groups} == {
        "gains and biases": (
            ["stem.conv0.bias", "stem.norm0.bias", "stages.0.0.se.bias", "final_norm.bias", "head.bias"],
            0.0,
            0.1,
        ),
        "normalization": (["stem.norm0.weight", "final_norm.weight"], 0.0, 0.1),
        "classifier": (["head.weight"], 0.5, 0.0),
        "weights": (["stem.conv0.weight", "stages.0.0.se.weight"], 0.5, 0.1),
    }


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Twin()
    model.stem.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, clipping=0.1)
    found = [id(p) for g in groups for p in g["params"]]
    expected = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(found) == sorted(expected)
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert model.get_parameter(name) is p


def test_lr_multipliers_split_groups_and_keep_the_rules() -> None:
    model = Twin()
    groups = parameter_groups(
        model, weight_decay=0.1, clipping=0.1, lr_multipliers={r"^head\.": 10.0, "": 0.5}
    )
    rate = {name: g["lr_multiplier"] for g in groups for name in g["param_names"]}
    assert rate == {n: 10.0 if n.startswith("head.") else 0.5 for n, _ in model.named_parameters()}
    optimizer = SGD(groups, 0.2)
    optimizer.set_lr(0.3)
    assert {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]} == pytest.approx(
        {n: 3.0 if n.startswith("head.") else 0.15 for n in rate}
    )


def unclipped_names(model: nn.Module, **options: object) -> list[str]:
    groups = parameter_groups(model, weight_decay=0.5, clipping=0.1, **options)  # type: ignore[arg-type]
    assert {g["clipping"] for g in groups} <= {0.0, 0.1}
    return sorted(name for g in groups if g["clipping"] == 0.0 for name in g["param_names"])


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (None, ["head.weight"]),
        (("head.weight",), ["head.weight"]),
        ((), []),
        (("head.*",), ["head.bias", "head.weight"]),
        (("head.weight", "stem.conv*"), ["head.weight", "stem.conv0.bias", "stem.conv0.weight"]),
        (("stages.0.*",), ["stages.0.0.se.bias", "stages.0.0.se.weight"]),
    ],
)
def test_patterns_exempt_from_clipping_and_change_nothing_else(patterns: object, names: list[str]) -> None:
    model = Twin()
    assert unclipped_names(model, unclipped=patterns) == names

    def decay(**options: object) -> dict[str, float]:
        groups = parameter_groups(model, weight_decay=0.5, clipping=0.1, **options)  # type: ignore[arg-type]
        return {name: g["weight_decay"] for g in groups for name in g["param_names"]}

    assert decay(unclipped=patterns) == decay()


def test_the_published_exemption_gives_the_default_groups() -> None:
    model = Twin()
    plain, named = (
        parameter_groups(model, weight_decay=0.5, clipping=0.1, unclipped=choice)
        for choice in (None, ("head.weight",))
    )
    assert [{**g, "params": [id(p) for p in g["params"]]} for g in plain] == [
        {**g, "params": [id(p) for p in g["params"]]} for g in named
    ]


def test_only_other_parameters_are_clipped() -> None:
    model = Twin()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    adaptive_clip_grad_(parameter_groups(model, weight_decay=0.0, clipping=0.1, unclipped=("s*.*0.*weight",)))
    kept = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.eq(100.0).all()]
    assert kept == ["stem.conv0.weight", "stem.norm0.weight", "stages.0.0.se.weight"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("haed.weight", "head.weight"),
        ("stage.0.*", "stages.0.*"),
        ("classifier", "head.weight"),
        ("stem", "stem.*"),
        ("head.weigh", "head.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, near: str) -> None:
    message = (
        f"unclipped has {pattern!r}, which matches no parameter. Did you mean {near!r}? Allowed: names of "
        "parameters, with * for any part."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unclipped_names(Twin(), unclipped=("head.weight", pattern))


def test_a_frozen_parameter_may_be_named_and_a_string_is_an_error() -> None:
    model = Twin()
    model.stem.requires_grad_(False)
    assert unclipped_names(model, unclipped=("stem.*", "head.weight")) == ["head.weight"]
    message = "unclipped='stem' is a string. Allowed: a sequence of patterns. Fix: pass unclipped=('stem',)."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        unclipped_names(model, unclipped="stem")


def test_comma_separated_patterns() -> None:
    assert parse_unclipped("head.weight") == ("head.weight",)
    assert parse_unclipped("head.weight, stem.*") == ("head.weight", "stem.*")
    assert parse_unclipped("") == ()
    message = (
        "unclipped='stem.*,,head.weight' has an empty pattern. Allowed: names separated by commas, with * for "
        "any part. Fix: pass 'stem.*,head.weight'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_unclipped("stem.*,,head.weight")


def test_groups_work_with_any_torch_optimizer() -> None:
    model = Twin()
    groups = parameter_groups(model, weight_decay=0.125, clipping=0.1)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0, 0.125}


def test_a_multiplier_that_applies_to_nothing_is_an_error() -> None:
    message = (
        "lr_multipliers has '^haed', which applies to no trainable parameter. Allowed: patterns found in names "
        "such as 'weight', 'bias', of which the first match counts. Fix: correct the pattern, or move it up."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.0, clipping=0.0, lr_multipliers={"^haed": 2.0})


def test_some_names() -> None:
    assert some_names("ab") == "'a', 'b'"
    assert some_names("abcdefgh") == "'a', 'b', 'c', 'd', 'e' and 3 more"


def test_tensors_that_do_not_fit_are_all_listed_and_nothing_is_copied() -> None:
    targets = {"stem.weight": torch.zeros(2), "head.weight": torch.zeros(3), "head.bias": torch.zeros(3)}
    source = {"stem.wieght": torch.ones(2), "head.weight": torch.ones(4), "head.bias": torch.ones(3)}
    message = (
        "the saved tensors do not fit the box (unknown: 'stem.wieght', missing: 'stem.weight', shapes: "
        "'head.weight' is (4,) instead of (3,)). Allowed: exactly its 3 names and shapes. "
        "Fix: rename 'stem.wieght' to 'stem.weight'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        copy_named_(targets, source, owner="the box")
    assert all(float(t.sum()) == 0.0 for t in targets.values())
