"""Tests of agreement with traces of the reference code; tests/reference/README.md describes how they were made."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normfree.optim.agc import adaptive_clip_grad_, unitwise_norm
from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema, ema_decay
from normfree.optim.groups import parameter_groups
from normfree.optim.schedule import warmup_cosine
from normfree.optim.sgd import SGD

TRACE = np.load(Path(__file__).parents[1] / "reference" / "agc_trace.npz")
CASES = sorted({key.split("|")[1] for key in TRACE.files if key.startswith("unit|")})
GROUPED = [key.removeprefix("group|") for key in TRACE.files if key.startswith("group|")]
TRACED = [key.removeprefix("step0|param|") for key in TRACE.files if key.startswith("step0|param|")]
GROUP_NUMBER = {"gains and biases": 0, "classifier": 1, "weights": 2}


def ours(array: np.ndarray) -> Tensor:
    """Convert HWIO to OIHW and IO to OI. In the one rank-3 case each pair of trailing indices is a unit."""
    tensor = torch.from_numpy(np.array(array))
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor.reshape(tensor.shape[0], -1).T.contiguous() if tensor.ndim in (2, 3) else tensor


def our_name(key: str) -> str:
    module, leaf = key.removeprefix("NFNet/~/").split("|")
    module = re.sub(r"^stem_conv(\d)$", r"stem.conv\1", module)
    module = re.sub(r"^nf_block(?:_(\d+))?", lambda match: f"stages.0.{match[1] or 0}", module)
    module = re.sub(r"^linear$", "head", module)
    module = module.replace("/~/squeeze_excite/~/linear_1", ".attention.fc1")
    module = module.replace("/~/squeeze_excite/~/linear", ".attention.fc0").replace("/~/", ".")
    return f"{module}.{ {'w': 'weight', 'b': 'bias'}.get(leaf, leaf) }"


def tree(tensors: dict[str, Tensor]) -> nn.Module:
    """Return a module whose parameters have these dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor))
    return root


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", CASES)
def test_units_of_every_shape(case: str) -> None:
    value = {k: ours(TRACE[f"unit|{case}|{k}"]) for k in ("param", "grad", "clipped", "optax_clipped")}
    parameter = nn.Parameter(value["param"])
    parameter.grad = value["grad"].clone()
    for tensor, key in ((parameter, "pnorm"), (parameter.grad, "gnorm")):
        expected = torch.from_numpy(np.array(TRACE[f"unit|{case}|{key}"])).flatten()
        norm = unitwise_norm(tensor)
        assert norm.numel() == expected.numel()
        assert error(norm.flatten(), expected) < 1e-6
    report = adaptive_clip_grad_(parameter, clipping=0.01, eps=1e-3)
    assert error(parameter.grad, value["clipped"]) < 1e-6
    assert error(parameter.grad, value["optax_clipped"]) < 1e-6
    changed = unitwise_norm(value["clipped"]) < 0.999 * unitwise_norm(value["grad"])
    assert float(report) == pytest.approx(float(changed.float().mean()))


def test_group_of_every_parameter() -> None:
    shapes = {key: (2, 2) if key.endswith("|w") else (2,) for key in GROUPED}
    model = tree({our_name(key): torch.zeros(shapes[key]) for key in GROUPED})
    groups = parameter_groups(model, weight_decay=2e-5, clipping=0.01, classifier="head")
    number = {name: GROUP_NUMBER[group["name"]] for group in groups for name in group["param_names"]}
    assert number == {our_name(key): int(TRACE[f"group|{key}"]) for key in GROUPED}
    # The three groups in the order 0, 1, 2.
    assert [len(g["params"]) for g in groups] == [85, 1, 45]
    assert [g["weight_decay"] for g in groups] == [0.0, 2e-5, 2e-5]
    assert [g["clipping"] for g in groups] == [0.01, 0.0, 0.01]


@pytest.mark.parametrize("fused", [None, False])
def test_four_steps_of_clipping_momentum_decay_and_average(fused: bool | None) -> None:
    model = tree({our_name(key): ours(TRACE[f"step0|param|{key}"]) for key in TRACED})
    groups = parameter_groups(model, weight_decay=2e-5, clipping=0.01, classifier="head")
    optimizer = SGD(groups, 0.1, momentum=0.9, nesterov=True, fused=fused)
    average = Ema(model, decay=0.99999)
    for step in range(4):
        for key in TRACED:
            model.get_parameter(our_name(key)).grad = ours(TRACE[f"step{step}|grad|{key}"])
        clip_grad_(optimizer.param_groups, mode="agc", clipping=0.01)
        if step == 0:
            for key in TRACED:
                grad = model.get_parameter(our_name(key)).grad
                assert error(grad, ours(TRACE[f"step0|clipped|{key}"])) < 1e-6, key
        optimizer.step()
        average.update(model)
    found = {"step3|momentum": optimizer.named_state(), "step3|ema": average.module.state_dict()}
    found["step4|param"] = dict(model.named_parameters())
    for what, tensors in found.items():
        for key in TRACED:
            expected = ours(TRACE[f"{what}|{key}"])
            # One skip gain's momentum nearly cancels (1.3e-4 left of terms of 1e-2): the absolute part is
            # one rounding of those terms.
            slack = 1e-9 if what == "step3|momentum" else 0.0
            distance = float((tensors[our_name(key)].detach() - expected).norm())
            assert distance <= 1e-6 * float(expected.norm()) + slack, (what, key)


def test_learning_rate_of_the_imagenet_recipe() -> None:
    total, warmup_steps, peak = 112602, 1563.924560546875, 1.6
    expected = TRACE["sched|imagenet_f0|lr"]
    rates = [
        peak * warmup_cosine(s / total, warmup=warmup_steps / total) for s in TRACE["sched|imagenet_f0|steps"]
    ]
    # Relative to the peak: the reference computes 1 + cos in float32, which cancels near the end.
    assert np.abs(np.array(rates) - expected).max() / peak < 1e-6


def test_decay_of_the_average() -> None:
    decays = [ema_decay(int(step), decay=0.99999) for step in TRACE["ema_decay|steps"]]
    np.testing.assert_allclose(decays, TRACE["ema_decay|decay"], rtol=1e-6)
