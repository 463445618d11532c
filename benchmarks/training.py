"""A whole training step, and its forward and backward pass alone, against timm's network with the same weights.

A step is forward, backward, adaptive clipping, SGD with Nesterov momentum and decay, and the average.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, GateError, compare
from benchmarks.networks import (
    CLASSES,
    FORMATS,
    batch,
    best_formats,
    copied,
    forward_backward,
    gradient_distance,
    multiplications,
    pair,
    shaken,
)
from benchmarks.summary import Comparison
from benchmarks.update_arms import AVERAGE, CLIPPING, DECAY, LR, our_update, timm_update, update_distance
from normfree import SGD, Ema, attach_agc, create_model, parameter_groups, standardized_once
from normfree.models.net import Net
from normfree.training.compiled import CompiledBlocks

ABOUT = (
    "Milliseconds of one training step of timm's network and our network with the same weights: forward and "
    "backward, then adaptive clipping, SGD with Nesterov momentum and decay (on a CPU fused on both sides), and the "
    "average. There is no dropout. timm uses its faster memory format, chosen in a round that is not counted; ours "
    "uses channels_last, as `normfree train` does. Before any timing, gradients of the whole network and the changes "
    "of weights and averages by two updates are compared, with every branch kept; without stochastic depth also the "
    "losses of two steps. On a CPU both sides keep freed memory in the process, as `normfree train` does. Ratios are "
    "of the time per image. `own loop` is a loop of public names (docs/train.md), compared with the trainer's step."
)
PARTS = ("whole step", "forward and backward")
# Largest relative distance of the losses of two steps in float32 and in bfloat16. The second losses differ, since timm
# clips gains and biases differently (`update_distance`).
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
# Largest relative distance of gradients in float64 (at half the image size), in float32, and in float32 with kinked
# activations: where rounding changes the sign of a ReLU input, a part of the gradient appears or vanishes.
EXACT, GRADIENTS, KINKED = 1e-9, 1e-5, 1e-3


@dataclass(frozen=True)
class Network:
    """One network to train.

    Args:
        name: timm's name.
        size: image size in px.
        batch: batch size.
        stochdepth: rate of stochastic depth in the papers.
        anchors: (timm's name, image size, batch size) of other networks to time for reference.
        kinked: whether its activation is ReLU.
        compile_timm: whether timm's side is compiled too; compiling the largest networks exceeds a suite's budget.
    """

    name: str
    size: int
    batch: int
    stochdepth: float
    anchors: tuple[tuple[str, int, int], ...] = ()
    kinked: bool = False
    compile_timm: bool = True

    @property
    def allowed(self) -> float:
        """The largest relative distance of gradients in float32."""
        return KINKED if self.kinked else GRADIENTS


# The smaller network comes first, so that the larger one can use the time it leaves.
ON_CPU = (Network("nf_resnet50", 224, 8, 0.1, kinked=True), Network("dm_nfnet_f0", 192, 8, 0.25))
ON_GPU = (
    Network("dm_nfnet_f0", 192, 256, 0.25, anchors=(("tf_efficientnetv2_s", 300, 256),)),
    Network("dm_nfnet_f1", 224, 256, 0.25, anchors=(("efficientnet_b7", 600, 64),)),
    Network("dm_nfnet_f0", 192, 64, 0.25),
    Network("nf_resnet50", 224, 256, 0.1, anchors=(("resnet50", 224, 256),), kinked=True),
    Network("eca_nfnet_l0", 224, 256, 0.1),
    Network("dm_nfnet_f3", 320, 64, 0.25),
    Network("dm_nfnet_f5", 416, 32, 0.25, compile_timm=False),
    Network("dm_nfnet_f6", 448, 32, 0.25, compile_timm=False),
)


# Further networks of a CPU, and those whose step is taken in a user's loop as well: our names, image size, batch size.
OTHERS = (Network("eca_nfnet_l0", 224, 8, 0.1), Network("nf_regnet_b1", 240, 8, 0.1))
OWN_LOOPS = (("timm_nf_resnet50", 224, 8),)
OTHER_LOOPS = (("nf_resnet_micro_64", 72, 32), ("timm_nf_regnet_b1", 240, 8), ("timm_dm_nfnet_f0", 192, 8))


def cases(device: torch.device, *, half: bool = False, others: bool = False) -> list[Case]:
    """Return a case per network; each runs without stochastic depth, then with the papers' rate.

    On a CPU, further cases compare the trainer's step with a user's loop.
    """
    if device.type == "cuda":
        return [case(network, half=True) for network in ON_GPU]
    made = [case(network, half=half) for network in (OTHERS if others else ON_CPU)]
    return made if half else [*made, *(loop_case(*loop) for loop in (OTHER_LOOPS if others else OWN_LOOPS))]


def case(network: Network, *, half: bool = False) -> Case:
    """Return the case of one network; `half` uses autocast to bfloat16."""
    name = f"{network.name}, {network.size} px, batch {network.batch}" + (", bfloat16" if half else "")
    return Case(name, (network.name,), partial(measure, name, network, half))


def measure(name: str, network: Network, half: bool, bench: Bench) -> Iterator[Comparison]:
    """Yield the comparisons of one network; stochastic depth uses the memory formats that were faster without it."""
    now, base = bench.clock(), cache(partial(_base, network, bench.device))
    short = replace(bench, share=now + (bench.share - now) / 2)
    found = _compared(short, name, network, 0.0, half, base, only=None)
    names = set()
    for comparison in found:
        names |= {t.arm for t in comparison.timings}
        yield comparison
    deep = f"{name}, stochastic depth {network.stochdepth}"
    yield from _compared(bench, deep, network, network.stochdepth, half, base, only=names)


def _compared(
    bench: Bench,
    name: str,
    network: Network,
    rate: float,
    half: bool,
    base: Callable[[], float],
    *,
    only: set[str] | None,
) -> Iterator[Comparison]:
    """Yield the comparisons of whole step and first part.

    On a CPU both parts are measured in the same steps. On a GPU, which would be idle between them, they are measured
    separately, and with stochastic depth only the whole step is. `only` has the names of the arms to use.
    """
    floor = (
        None if half or rate else multiplications(bench, network.name, network.size, network.batch, passes=3)
    )
    cut = bench.device.type != "cuda"
    for part in PARTS[:1] if cut or rate else PARTS:
        arms = [arm for arm in _arms(bench, network, rate, half, base) if only is None or arm.name in only]
        if not cut:
            arms = [_joined(arm) if part == PARTS[0] else replace(arm, then=None) for arm in arms]
        yield from compare(
            bench, name if cut else f"{name}, {part}", arms, tolerance=HALF_TOLERANCE if half else TOLERANCE,
            gradients=True, choose=best_formats, parts=PARTS, floor=floor,
        )  # fmt: skip


def _arms(
    bench: Bench, network: Network, rate: float, half: bool, base: Callable[[], float]
) -> Iterator[Arm]:
    """Yield timm's network in both formats and ours as in `normfree train`; on a GPU also compiled ones and anchors."""
    theirs, ours = (net.to(bench.device) for net in pair(network.name, stochdepth=rate))
    assert isinstance(ours, Net)
    gate = cache(partial(_distance, theirs, ours, network.size, base))
    gpu = bench.device.type == "cuda"
    # cuDNN's float32 algorithms have larger rounding errors than plain sums.
    allowed = max(network.allowed, KINKED) if gpu else network.allowed
    make = partial(
        _arm, bench.device, network.size, network.batch, half=half, alike=not rate, allowed=allowed
    )
    for layout in FORMATS:
        yield make(f"timm {layout}", theirs, layout, distance=lambda: 0.0)
    if gpu and network.compile_timm:
        yield make("timm, compiled NHWC", theirs, "NHWC", compiled=True, distance=lambda: 0.0)
    yield make("normfree NHWC", ours, "NHWC", distance=partial(gate, "NHWC"))
    if gpu:
        yield make("normfree, compiled NHWC", ours, "NHWC", compiled=True, distance=partial(gate, "NHWC"))
    for anchor, size, images in network.anchors if gpu and not rate else ():
        net = shaken(timm.create_model(anchor)).train()
        for extra in (False, True):
            label = f"{anchor} {size} px{', compiled' if extra else ''} NHWC"
            yield _arm(bench.device, size, images, label, net, "NHWC", half=half, alike=False, compiled=extra,
                       allowed=0.0, distance=lambda: 0.0)  # fmt: skip


def _arm(
    device: torch.device,
    size: int,
    images: int,
    name: str,
    net: nn.Module,
    layout: str,
    *,
    half: bool,
    alike: bool,
    allowed: float,
    distance: Callable[[], float],
    compiled: bool = False,
) -> Arm:
    """Return the arm of one network with its update."""
    placed = copied(net, layout, device)
    x, y = batch(size, images, device, layout)
    update = our_update(placed) if isinstance(placed, Net) else timm_update(placed)
    blocks = CompiledBlocks(placed) if compiled and isinstance(placed, Net) else None
    forward = torch.compile(placed) if compiled and blocks is None else None
    run = partial(forward_backward, placed, x, y, half=half, forward=forward, blocks=blocks)
    return Arm(name, run, then=update.step, distance=distance, allowed=allowed, alike=alike, images=images,
               compiled=compiled)  # fmt: skip


def _joined(arm: Arm) -> Arm:
    """Return the arm with both parts in one run, without a wait between them."""

    def run() -> Tensor:
        loss = arm.run()
        assert arm.then is not None
        arm.then()
        return loss

    return replace(arm, run=run, then=None)


# --- the step in a user's loop ------------------------------------------------------------------------------------


def loop_case(name: str, size: int, images: int) -> Case:
    """Return the case that compares the trainer's step of our variant `name` with a loop of public names."""
    title = f"{name.removeprefix('timm_')}, {size} px, batch {images}, own loop"
    return Case(title, (name.removeprefix("timm_"),), partial(_loops, title, name, size, images))


def _loops(title: str, name: str, size: int, images: int, bench: Bench) -> list[Comparison]:
    """Compare both loops; the gate compares their losses before and after an update."""
    torch.manual_seed(0)
    net = shaken(create_model(name, num_classes=CLASSES, drop_rate=0.0, stochdepth_rate=0.0)).train()
    assert isinstance(net, Net)
    trainer = _arm(bench.device, size, images, "trainer", net, "NHWC", half=False, alike=True, allowed=0.0,
                   distance=lambda: 0.0)  # fmt: skip
    arms = [
        _joined(trainer),
        Arm("own loop", own_loop(net, *batch(size, images, bench.device)), images=images),
    ]
    return compare(bench, title, arms, tolerance=TOLERANCE, gradients=True)


def own_loop(net: Net, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """Return a step of a copy of `net` as docs/train.md shows it."""
    model = copy.deepcopy(net).to(memory_format=torch.channels_last)
    optimizer = SGD(parameter_groups(model, weight_decay=DECAY, clipping=CLIPPING), lr=LR)
    attach_agc(optimizer, model=model, ema=Ema(model, decay=AVERAGE, ramp=False))

    def step() -> Tensor:
        with standardized_once(model):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# --- gates --------------------------------------------------------------------------------------------------------


def _distance(
    theirs: nn.Module,
    ours: Net,
    size: int,
    base: Callable[[], float],
    layout: str,
) -> float:
    """Return the distance of gradients (two images, float32, format `layout`) and `base`, combined in quadrature."""
    device = next(ours.parameters()).device
    x, y = batch(size, 2, device, layout)
    gradients = gradient_distance(copied(theirs, layout, device), copied(ours, layout, device), x, y)
    return math.hypot(gradients, base())


def _base(network: Network, device: torch.device) -> float:
    """Return the distance of updates, after a check of float64 gradients.

    Raises:
        GateError: gradients differ in float64, so not by rounding.
    """
    theirs, ours = (net.to(device) for net in pair(network.name))
    assert isinstance(ours, Net)
    x, y = batch(network.size // 2, 2, device)
    exact = gradient_distance(theirs, ours, x.double(), y)
    if not exact <= EXACT:
        raise GateError(f"{network.name}: gradients in float64 differ by {exact:.1e}, allowed is {EXACT:g}")
    return update_distance(theirs, ours)
