"""The update with timm and with this library: clipping, SGD with Nesterov momentum and decay, average."""

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
from normfree import SGD, Ema, clip_grad_, parameter_groups
from normfree.models.net import Net
from normfree.optim.fused import FusedUpdate

# [B] section 4.3, except the rate, which is small enough to keep the weights of all arms close to each other.
LR, DECAY, CLIPPING, AVERAGE = 1e-3, 2e-5, 0.01, 0.99999
# For the gate: with these, weights and average change by far more than rounding errors.
LARGE_LR, SHORT_AVERAGE = 0.1, 0.5


@dataclass(frozen=True)
class Update:
    """An update of a network from its gradients; `average` has the averaged weights."""

    step: Callable[[], None]
    average: nn.Module
    optimizer: torch.optim.Optimizer


def timm_update(net: nn.Module, *, lr: float = LR, decay: float = AVERAGE, fastest: bool = True) -> Update:
    """Return timm's update of `net`: `--clip-mode agc --opt nesterov --model-ema`.

    `fastest` uses the fused `torch.optim.SGD` on a CPU, where it is the fastest; otherwise the one that timm makes.
    """
    groups = param_groups_weight_decay(net, weight_decay=DECAY)
    fused = True if fastest and next(net.parameters()).device.type == "cpu" else None
    optimizer = torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True, fused=fused)
    average, steps = ModelEmaV3(net, decay=decay), 2  # up to step 1, timm's average is a copy of the weights

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
    kernels: bool = True,
) -> Update:
    """Return this library's update of `net`.

    Args:
        net: the network.
        lr: learning rate.
        decay: decay of the average.
        clipping: λ of AGC.
        weight_decay: weight decay.
        kernels: use the compiled kernels instead of three calls, if they exist. Training runs use them on a CPU.
    """
    optimizer = SGD(parameter_groups(net, weight_decay=weight_decay, clipping=clipping), lr)
    average = Ema(net, decay=decay, ramp=False)
    fused = FusedUpdate.create(optimizer, model=net, ema=average) if kernels else None

    def update() -> None:
        if fused is not None:
            fused.step(error_if_nonfinite=False)
        else:
            clip_grad_(optimizer.param_groups, mode="agc", clipping=clipping)
            optimizer.step()
            average.update(net)

    return Update(update, average.module, optimizer)


def gradients(theirs: nn.Module, ours: Net) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the same random gradients under timm's names and ours.

    They are `CLIPPING` times as large as the weights, so that about half of the units are clipped.
    """
    generator = torch.Generator().manual_seed(2)
    drawn = {}
    for name, p in theirs.named_parameters():
        size = CLIPPING * float(p.detach().norm()) / p.numel() ** 0.5 + 1e-6
        drawn[name] = (size * torch.randn(p.shape, generator=generator)).to(p.device)
    return drawn, in_our_names(ours, drawn, theirs)


def give(net: nn.Module, drawn: dict[str, Tensor]) -> None:
    """Set the gradients of `net` to copies of `drawn`."""
    for name, p in net.named_parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(drawn[name])


def update_distance(theirs: nn.Module, ours: Net, *, kernels: bool = True) -> float:
    """Return the distance of the changes of weights and averages by two updates, at a large rate, same gradients.

    Gains and biases are left out: their unit is one number in timm and the whole vector in the released code, so the
    two sides clip them differently. timm also applies weight decay to some of them.
    """
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    names = [name for name, p in ours.named_parameters() if p.ndim > 1]
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    moved = []
    both = zip((theirs, ours), gradients(theirs, ours), strict=True)
    for (net, drawn), make in zip(both, (timm_update, our_update), strict=True):
        more = {"kernels": kernels} if make is our_update else {}
        update = make(net, lr=LARGE_LR, decay=SHORT_AVERAGE, **more)
        for _ in range(2):  # momentum acts from the second step on
            give(net, drawn)
            update.step()
        ends = [{k: p.detach() for k, p in end.named_parameters()} for end in (net, update.average)]
        if net is theirs:
            ends = [in_our_names(ours, end, theirs) for end in ends]
        moved.append({f"{i} {k}": end[k] - start[k] for i, end in enumerate(ends) for k in names})
    return distance(moved[1], moved[0])
