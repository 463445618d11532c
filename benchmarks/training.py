"""A whole training step, and the update alone, against timm's same network with the same weights.

A step is forward, backward, adaptive clipping, SGD with Nesterov momentum and decay, and the average. timm's side is
what its training script does with `--clip-mode agc --opt nesterov --model-ema`: `adaptive_clip_grad` on all but the
classifier, `torch.optim.SGD`, `ModelEmaV3`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
import torch.nn.functional as F
from harness import Arm, Comparison, compare
from inference import FORMATS, best_formats, shaken
from timm.models import model_parameters
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from normfree.models.net import Net
from normfree.models.standardized import standardized_once
from normfree.models.weights import load_weights
from normfree.models.zoo import create_model
from normfree.optim.agc import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

#: timm's name, image size
CASES = (("dm_nfnet_f0", 192), ("nf_resnet50", 224))
BATCH = 8
#: [B] section 4.3, but for a rate at which no arm's weights leave the neighbourhood of the others'
LR, DECAY, CLIPPING, AVERAGE = 1e-3, 2e-5, 0.01, 0.99999


def pair(name: str) -> tuple[nn.Module, Net]:
    """timm's network and ours in training mode, with the same random weights."""
    theirs = shaken(timm.create_model(name, drop_rate=0.0))
    ours = create_model(f"timm_{name}", drop_rate=0.0)
    assert isinstance(ours, Net)
    load_weights(ours, theirs.state_dict())
    return theirs.train(), ours.train()


def timm_update(net: nn.Module) -> Callable[[], None]:
    """timm's update of `net` from the gradients that it holds."""
    groups = param_groups_weight_decay(net, weight_decay=DECAY)
    optimizer = torch.optim.SGD(groups, LR, momentum=0.9, nesterov=True)
    average, steps = ModelEmaV3(net, decay=AVERAGE), 0

    def update() -> None:
        nonlocal steps
        adaptive_clip_grad(model_parameters(net, exclude_head=True), clip_factor=CLIPPING)
        optimizer.step()
        average.update(net, step=steps)
        steps += 1

    return update


def our_update(net: Net) -> Callable[[], None]:
    """The same of ours, as `Trainer.step` does it."""
    optimizer = SGD(parameter_groups(net, weight_decay=DECAY, clipping=CLIPPING), LR)
    average, steps = Ema(net, decay=AVERAGE, ramp=False), 0

    def update() -> None:
        nonlocal steps
        clip_grad_(optimizer.param_groups, mode="agc", clipping=CLIPPING)
        optimizer.step()
        average.update_(net, step=steps)
        steps += 1

    return update


def step(net: nn.Module, update: Callable[[], None], images: Tensor, labels: Tensor, *, half: bool) -> Tensor:
    """One step; returns the loss. Ours standardizes as `Trainer.gradients` does."""
    net.zero_grad(set_to_none=True)
    with standardized_once(net) if isinstance(net, Net) else contextlib.nullcontext():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
    update()
    return loss.detach()


def gradient_distance(theirs: nn.Module, ours: Net, images: Tensor, labels: Tensor) -> float:
    """Relative L2 distance between both gradients of the same loss."""
    for net in (theirs, ours):
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
    names = dict(theirs.named_parameters())
    moved = {k: names[k].grad.clone() if k in names else v for k, v in theirs.state_dict().items()}
    wanted = copy.deepcopy(ours)
    load_weights(wanted, moved)
    distance = sum(
        float((p.grad - w.detach()).square().sum())
        for p, w in zip(ours.parameters(), wanted.parameters(), strict=True)
    )
    return (distance / sum(float(w.detach().square().sum()) for w in wanted.parameters())) ** 0.5


def suite(names: Sequence[str] = (), *, rounds: int = 11, half: bool = False) -> list[Comparison]:
    """One comparison per network: whole steps, the better memory format of each side."""
    results = []
    for name, size in CASES:
        if names and name not in names:
            continue
        theirs, ours = pair(name)
        images, labels = torch.randn(BATCH, 3, size, size), torch.arange(BATCH)
        error = gradient_distance(copy.deepcopy(theirs), copy.deepcopy(ours), images[:2], labels[:2])
        if error > 1e-4:
            raise ArithmeticError(f"{name}: gradients differ by {error:.1e}")
        arms = []
        for label, net, update in (("timm", theirs, timm_update), ("normfree", ours, our_update)):
            for word, layout in FORMATS.items():
                placed = copy.deepcopy(net).to(memory_format=layout)
                inputs = images.to(memory_format=layout)
                run = partial(step, placed, update(placed), inputs, labels, half=half)
                arms.append(Arm(f"{label} {word}", run))
        case = f"{name}, {size} px, batch {BATCH}{', bfloat16' if half else ''}"
        tolerance = 2e-2 if half else 1e-5
        results.append(
            compare(case, arms, rounds=rounds, gradients=True, tolerance=tolerance, choose=best_formats)
        )
        print(case, *(f"{t.arm} {t.speedup:.2f}" for t in results[-1].timings), sep="  ", flush=True)
    return results


def update_suite(names: Sequence[str] = (), *, rounds: int = 11) -> list[Comparison]:
    """Clipping alone, and the whole update, on the parameters of NFNet-F0. Gradients are set anew before each run, so
    that about half of the units are clipped every time; that is not timed."""
    theirs, ours = pair("dm_nfnet_f0")
    results = []
    for part in ("clipping", "whole update"):
        arms = []
        for label, source, whole in (("timm", theirs, timm_update), ("normfree", ours, our_update)):
            net = copy.deepcopy(source)
            if part == "whole update":
                act = whole(net)
            elif label == "timm":
                act = partial(adaptive_clip_grad, model_parameters(net, exclude_head=True), CLIPPING)
            else:
                groups = parameter_groups(net, weight_decay=DECAY, clipping=CLIPPING)
                act = partial(clip_grad_, groups, mode="agc", clipping=CLIPPING)
            arms.append(Arm(label, partial(_norm_after, net, act), partial(_fill, net)))
        results.append(compare(f"{part}, nfnet_f0", arms, rounds=rounds, tolerance=2e-2))
        print(
            results[-1].case, *(f"{t.arm} {t.speedup:.2f}" for t in results[-1].timings), sep="  ", flush=True
        )
    return results


def _fill(net: nn.Module) -> None:
    """Gradients of about 0.01 of the weights' size, the same for both sides up to the order of parameters."""
    for p in net.parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
            torch.manual_seed(p.numel())
            p.grad_source = torch.randn_like(p) * (0.01 * float(p.detach().norm()) / p.numel() ** 0.5 + 1e-6)
        p.grad.copy_(p.grad_source)


def _norm_after(net: nn.Module, act: Callable[[], object]) -> Tensor:
    act()
    return next(net.parameters()).detach().norm()[None]
