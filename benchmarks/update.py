"""The update on the parameters of an NFNet: clipping, the whole update, weight standardization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame
from timm.models import model_parameters
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import distance, in_our_names, pair
from benchmarks.summary import Comparison, Floor
from benchmarks.update_arms import CLIPPING, DECAY, give, gradients, our_update, timm_update, update_distance
from normfree import clip_grad_, parameter_groups
from normfree.models.net import Net
from normfree.ops.standardize import standardize_all

ABOUT = (
    "Milliseconds on the parameters and random gradients of a network, with about half of the units above the "
    "clipping limit; gradients are reset before each call, which is not timed. `whole update`: clipping, SGD with "
    "Nesterov momentum and decay, average; timm's side does what `--clip-mode agc --opt nesterov --model-ema` "
    "does, on a CPU with PyTorch's fused SGD and without. `weight standardization`: all weights, forward and backward; "
    "timm's side is `F.batch_norm` layer by layer, as in its convolutions. The gate compares clipped gradients, "
    "the changes of weights and averages by two updates, and gradients. Floors are bytes at the measured rate of "
    "a copy: 28 per parameter for the update (weight, gradient, momentum and average are read, three of them are "
    "written), 20 for standardization."
)
# Bytes per parameter that must be read or written, float32.
UPDATE_BYTES, STANDARDIZATION_BYTES = 28, 20
# For float32; the measured errors are at most 1e-6.
TOLERANCE = 1e-5


def cases(device: torch.device) -> list[Case]:
    """Return the case of NFNet-F0; on a GPU also of larger ones."""
    levels = (0, 1, 5, 6) if device.type == "cuda" else (0,)
    return [case(f"dm_nfnet_f{level}", f"nfnet_f{level}") for level in levels]


def case(name: str, title: str) -> Case:
    """Return the case of timm's network `name`, called `title` in the tables."""
    return Case(title, (title,), partial(measure, name, title))


def measure(name: str, title: str, bench: Bench) -> Iterator[Comparison]:
    """Yield the comparisons of clipping, the whole update and weight standardization."""
    theirs, ours = (net.to(bench.device) for net in pair(name))
    now = bench.clock()
    parts: list[Callable[[], tuple[list[Arm], Floor | None]]] = [
        lambda: (clipping_arms(theirs, ours), None),
        lambda: (update_arms(theirs, ours, gpu=bench.device.type == "cuda"), floor(bench, UPDATE_BYTES, ours)),
        lambda: (standardization_arms(theirs), floor(bench, STANDARDIZATION_BYTES, *_convolutions(theirs))),
    ]  # fmt: skip
    names = ("clipping", "whole update", "weight standardization")
    for number, (part_name, part) in enumerate(zip(names, parts, strict=True), 1):
        arms, lowest = part()
        share = now + (bench.share - now) * number / len(parts)
        timed = replace(bench, share=share)
        yield from compare(
            timed, f"{part_name}, {title}", arms, tolerance=TOLERANCE, gradients=True, floor=lowest
        )


def floor(bench: Bench, each: int, *nets: nn.Module) -> Floor | None:
    """Return the time of `each` bytes per parameter of `nets`, at the measured rate of a copy."""
    if not bench.bandwidth:
        return None
    numbers = sum(p.numel() for net in nets for p in net.parameters())
    return Floor(1e3 * each * numbers / bench.bandwidth, f"{each} bytes per parameter at the rate of a copy")


def clipping_arms(theirs: nn.Module, ours: Net) -> list[Arm]:
    """Return the arms of clipping alone."""
    theirs, ours = copy.deepcopy(theirs), copy.deepcopy(ours)
    drawn, mine = gradients(theirs, ours)
    timm_clip = partial(adaptive_clip_grad, list(model_parameters(theirs, exclude_head=True)), CLIPPING)
    groups = parameter_groups(ours, weight_decay=DECAY, clipping=CLIPPING)
    our_clip = partial(clip_grad_, groups, mode="agc", clipping=CLIPPING)

    def apart() -> float:
        for net, given, clip in ((theirs, drawn, timm_clip), (ours, mine, our_clip)):
            give(net, given)
            clip()
        wanted = in_our_names(ours, {k: p.grad for k, p in theirs.named_parameters()}, theirs)
        weights = {k: p.grad for k, p in ours.named_parameters() if p.ndim > 1}  # see `update_distance`
        return distance(weights, {k: wanted[k] for k in weights})

    return [
        _arm("timm", theirs, drawn, timm_clip, lambda: 0.0),
        _arm("normfree", ours, mine, our_clip, apart),
    ]


def update_arms(theirs: nn.Module, ours: Net, *, gpu: bool) -> list[Arm]:
    """Return the arms of the whole update; on a CPU ours are the compiled kernels, which runs use, and three calls."""
    drawn, arms = gradients(theirs, ours), []
    for label in ("timm",) if gpu else ("timm, SGD(fused=True)", "timm"):
        net = copy.deepcopy(theirs)
        arms.append(_arm(label, net, drawn[0], timm_update(net, fastest=label != "timm").step, lambda: 0.0))
    others = {False: "normfree"} if gpu else {True: "normfree", False: "normfree, three calls"}
    for kernels, label in others.items():
        net = copy.deepcopy(ours)
        update = our_update(net, kernels=kernels).step
        arms.append(
            _arm(label, net, drawn[1], update, partial(update_distance, theirs, ours, kernels=kernels))
        )
    return arms


def standardization_arms(theirs: nn.Module) -> list[Arm]:
    """Return the arms that standardize all weights of `theirs`, forward and backward.

    γ is applied where timm applies it: outside of the weight in dm_ networks.
    """
    convs = _convolutions(theirs)
    generator = torch.Generator().manual_seed(3)
    ups = [torch.randn(c.weight.shape, generator=generator).to(c.weight.device) for c in convs]
    inputs = [tuple(t.detach().clone().requires_grad_() for t in (c.weight, c.gain)) for c in convs]
    weights, gains = zip(*inputs, strict=True)
    flat = [gain.detach().flatten().requires_grad_() for gain in gains]
    copies = [weight.detach().clone().requires_grad_() for weight in weights]
    scales = [conv.scale * conv.weight[0].numel() ** 0.5 for conv in convs]

    def layers() -> list[Tensor]:
        return [_timm_weight(c, w, g) for c, w, g in zip(convs, weights, gains, strict=True)]

    def at_once() -> list[Tensor]:
        return standardize_all(copies, flat, scales, eps="add")

    def back(make: Callable[[], list[Tensor]], own: list[Tensor]) -> Tensor:
        for tensor in own:
            tensor.grad = None
        made = make()
        torch.autograd.backward(made, ups)
        return made[0].detach().flatten()[:100]

    def apart() -> float:
        sides = ([*weights, *gains], [*copies, *flat])
        for own, make in zip(sides, (layers, at_once), strict=True):
            back(make, own)
        found, wanted = ({str(i): t.grad.flatten() for i, t in enumerate(own)} for own in reversed(sides))
        return distance(found, wanted)

    return [
        Arm("timm", partial(back, layers, [*weights, *gains]), distance=lambda: 0.0),
        Arm("normfree", partial(back, at_once, [*copies, *flat]), distance=apart),
    ]


def _convolutions(net: nn.Module) -> list[nn.Module]:
    """Return timm's standardized convolutions in `net`."""
    return [m for m in net.modules() if isinstance(m, ScaledStdConv2d | ScaledStdConv2dSame)]


def _timm_weight(conv: nn.Module, weight: Tensor, gain: Tensor) -> Tensor:
    """Return the standardized weight as computed in the forward pass of `timm.layers.ScaledStdConv2d`."""
    return F.batch_norm(
        weight.reshape(1, conv.out_channels, -1), None, None, weight=(gain * conv.scale).view(-1), training=True,
        momentum=0.0, eps=conv.eps,
    ).reshape_as(weight)  # fmt: skip


def _arm(
    name: str, net: nn.Module, drawn: dict[str, Tensor], act: Callable[[], object], apart: Callable[[], float]
) -> Arm:
    """Return the arm that calls `act` on fresh gradients."""
    first = next(net.parameters()).detach()

    def run() -> Tensor:
        act()
        return first.flatten()[:1]

    return Arm(name, run, before=partial(give, net, drawn), distance=apart, alike=False)
