"""What follows the gradients: clipping, SGD with Nesterov momentum and decay, average. timm's way and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models import model_parameters
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from benchmarks.networks import distance, in_our_names
from normfree.models.net import Net
from normfree.optim.clipping import clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.fused_native import NativeUpdate
from normfree.optim.groups import parameter_groups
from normfree.optim.sgd import SGD

#: [B] section 4.3, but for a rate at which no arm's weights leave the neighbourhood of the others'
LR, DECAY, CLIPPING, AVERAGE = 1e-3, 2e-5, 0.01, 0.99999
#: For the gate: at these, weights and average move far beyond rounding.
LARGE_LR, SHORT_AVERAGE = 0.1, 0.5


@dataclass(frozen=True)
class Update:
    """`step` updates a network from the gradients that it holds; `average` has its averaged weights."""

    step: Callable[[], None]
    average: nn.Module
    optimizer: torch.optim.Optimizer


def timm_update(net: nn.Module, *, lr: float = LR, decay: float = AVERAGE, fastest: bool = True) -> Update:
    """timm's update of `net`: `--clip-mode agc --opt nesterov --model-ema`. `fastest`: with `torch.optim.SGD` fused on
    a CPU, where that is its fastest; else as timm makes it."""
    groups = param_groups_weight_decay(net, weight_decay=DECAY)
    fused = True if fastest and next(net.parameters()).device.type == "cpu" else None
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, fused=fused)
    average, steps = ModelEmaV3(net, decay=decay), 2  # before, timm's average is a copy of the weights

    def update() -> None:
        nonlocal steps
        adaptive_clip_grad(model_parameters(net, exclude_head=True), clip_factor=CLIPPING)
        optimizer.step()
        average.update(net, step=steps)
        steps += 1

    return Update(update, average.module, optimizer)


def our_update(
    net: Net,
    *,
    lr: float = LR,
    decay: float = AVERAGE,
    clipping: float = CLIPPING,
    weight_decay: float = DECAY,
    kernels: bool | None = None,
) -> Update:
    """The same of ours. `kernels`: in the two launches of `NativeUpdate` where that can do it, or by three calls; None:
    as runs do, which is by kernels on a CPU."""
    if kernels is None:
        kernels = next(net.parameters()).device.type == "cpu"
    optimizer = SGD(parameter_groups(net, weight_decay=weight_decay, clipping=clipping), lr)
    average = Ema(net, decay=decay, ramp=False)
    fused = NativeUpdate.create(optimizer, model=net, ema=average) if kernels else None

    def update() -> None:
        if fused is not None:
            fused.step(error_if_nonfinite=False)
        else:
            clip_grad_(optimizer.param_groups, mode="agc", clipping=clipping)
            optimizer.step()
            average.update(net)

    return Update(update, average.module, optimizer)


def gradients(theirs: nn.Module, ours: Net) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same random gradients under timm's names and ours, of which about half of the units are clipped: they have
    `CLIPPING` times the size of the weights."""
    generator = torch.Generator().manual_seed(2)
    drawn = {}
    for name, p in theirs.named_parameters():
        size = CLIPPING * float(p.detach().norm()) / p.numel() ** 0.5 + 1e-6
        drawn[name] = (size * torch.randn(p.shape, generator=generator)).to(p.device)
    return drawn, in_our_names(ours, drawn, theirs)


def give(net: nn.Module, drawn: dict[str, Tensor]) -> None:
    """Sets the gradients of `net` to copies."""
    for name, p in net.named_parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(drawn[name])


def update_distance(theirs: nn.Module, ours: Net, *, kernels: bool | None = None) -> float:
    """Between what two updates add to the kernels and to their averages, at a large rate and from the same gradients.

    Gains and biases are left out: a unit of theirs is one number in timm and the whole vector in the released code,
    so that the two clip them otherwise; and with them what timm lets decay.
    """
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    names = [name for name, p in ours.named_parameters() if p.ndim > 1]
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    moved = []
    both = zip((theirs, ours), gradients(theirs, ours), strict=True)
    for (net, drawn), make in zip(both, (timm_update, our_update), strict=True):
        more = {"kernels": kernels} if make is our_update else {}
        update = make(net, lr=LARGE_LR, decay=SHORT_AVERAGE, **more)
        for _ in range(2):  # momentum is there from the second on
            give(net, drawn)
            update.step()
        ends = [{k: p.detach() for k, p in end.named_parameters()} for end in (net, update.average)]
        if net is theirs:
            ends = [in_our_names(ours, end, theirs) for end in ends]
        moved.append({f"{i} {k}": end[k] - start[k] for i, end in enumerate(ends) for k in names})
    return distance(moved[1], moved[0])
