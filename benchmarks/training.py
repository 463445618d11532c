"""A whole training step, and its forward and backward pass alone, against timm's same network with the same weights.

A step is forward, backward, adaptive clipping, SGD with Nesterov momentum and decay, and the average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import timm
import torch
from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, GateError, compare
from benchmarks.networks import (
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
from benchmarks.update_arms import our_update, timm_update, update_distance
from normfree.models.net import Net
from normfree.training.compiled import CompiledBlocks

ABOUT = (
    "Milliseconds of one training step of timm's network and of ours with the same weights: forward and backward, "
    "then adaptive clipping, SGD with Nesterov momentum and decay (on a CPU fused on both sides), and the "
    "average. No dropout. timm in its faster memory format, found in a round that does not count, ours in "
    "channels_last, which `normfree train` uses. Before any "
    "timing, gradients of the whole network and what two updates add to kernels and averages are compared, with "
    "every branch kept; without stochastic depth the losses of two steps too. On a CPU both sides run with freed "
    "memory kept in the process, as `normfree train` does. Ratios are of the time for one image."
)
PARTS = ("whole step", "forward and backward")
#: Largest relative distance of the losses of two steps that the gate lets pass, in float32 and in bfloat16. The second
#: ones part, as timm clips gains and biases otherwise (`update_distance`).
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
#: And of gradients, in float64 (half the image size) and in float32; and there with kinked activations: where rounding
#: takes the input of a ReLU across 0, a part of the gradient appears or vanishes.
EXACT, GRADIENTS, KINKED = 1e-9, 1e-5, 1e-3


@dataclass(frozen=True)
class Row:
    """One network to train: timm's name, image size, batch, the papers' stochastic depth, and what else to do.

    anchors: (timm's name, image size, batch) of other networks to time beside it.
    kinked: whether its activation is ReLU.
    compile_timm: whether timm's side is compiled too; the largest networks take longer for that than a suite has.
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
        """What gradients may differ by in float32."""
        return KINKED if self.kinked else GRADIENTS


#: The smaller first, so that what it leaves of its time goes to the larger.
ON_CPU = (Row("nf_resnet50", 224, 8, 0.1, kinked=True), Row("dm_nfnet_f0", 192, 8, 0.25))
ON_GPU = (
    Row("dm_nfnet_f0", 192, 256, 0.25, anchors=(("tf_efficientnetv2_s", 300, 256),)),
    Row("dm_nfnet_f1", 224, 256, 0.25, anchors=(("efficientnet_b7", 600, 64),)),
    Row("dm_nfnet_f0", 192, 64, 0.25),
    Row("nf_resnet50", 224, 256, 0.1, anchors=(("resnet50", 224, 256),), kinked=True),
    Row("eca_nfnet_l0", 224, 256, 0.1),
    Row("dm_nfnet_f3", 320, 64, 0.25),
    Row("dm_nfnet_f5", 416, 32, 0.25, compile_timm=False),
    Row("dm_nfnet_f6", 448, 32, 0.25, compile_timm=False),
)


def cases(device: torch.device, *, half: bool = False) -> list[Case]:
    """One per network; each without stochastic depth, then with the papers'."""
    rows = ON_GPU if device.type == "cuda" else ON_CPU
    return [case(row, half=half or device.type == "cuda") for row in rows]


def case(row: Row, *, half: bool = False) -> Case:
    """`row`; `half`: under autocast to bfloat16."""
    name = f"{row.name}, {row.size} px, batch {row.batch}" + (", bfloat16" if half else "")
    return Case(name, (row.name,), partial(measure, name, row, half))


def measure(name: str, row: Row, half: bool, bench: Bench) -> Iterator[Comparison]:
    """The comparisons of one row. With stochastic depth each side keeps the memory format that was faster without."""
    now, base = bench.clock(), cache(partial(_base, row, bench.device))
    short = replace(bench, share=now + (bench.share - now) / 2)
    found = _compared(short, name, row, 0.0, half, base, only=None)
    names = set()
    for comparison in found:
        names |= {t.arm for t in comparison.timings}
        yield comparison
    deep = f"{name}, stochastic depth {row.stochdepth}"
    yield from _compared(bench, deep, row, row.stochdepth, half, base, only=names)


def _compared(
    bench: Bench,
    name: str,
    row: Row,
    rate: float,
    half: bool,
    base: Callable[..., float],
    *,
    only: set[str] | None,
) -> Iterator[Comparison]:
    """Both parts cut from the same steps on a CPU; apart on a GPU, which would stand still in between, and there the
    whole step alone with stochastic depth. `only`: names of the arms to take."""
    floor = None if half or rate else multiplications(bench, row.name, row.size, row.batch, passes=3)
    cut = bench.device.type != "cuda"
    for part in PARTS[:1] if cut or rate else PARTS:
        arms = [arm for arm in _arms(bench, row, rate, half, base) if only is None or arm.name in only]
        if not cut:
            arms = [_joined(arm) if part == PARTS[0] else replace(arm, then=None) for arm in arms]
        yield from compare(
            bench, name if cut else f"{name}, {part}", arms, tolerance=HALF_TOLERANCE if half else TOLERANCE,
            gradients=True, choose=best_formats, parts=PARTS, floor=floor,
        )  # fmt: skip


def _arms(bench: Bench, row: Row, rate: float, half: bool, base: Callable[..., float]) -> Iterator[Arm]:
    """timm's in both formats, ours as `normfree train` has it; on a GPU also compiled ones and the anchors."""
    theirs, ours = (net.to(bench.device) for net in pair(row.name, stochdepth=rate))
    assert isinstance(ours, Net)
    gate = cache(partial(_distance, theirs, ours, row.size, base))
    gpu = bench.device.type == "cuda"
    # cuDNN's float32 algorithms round more coarsely than sums do
    allowed = max(row.allowed, KINKED) if gpu else row.allowed
    make = partial(_arm, bench.device, row.size, row.batch, half=half, alike=not rate, allowed=allowed)
    for word in FORMATS:
        yield make(f"timm {word}", theirs, word, distance=lambda: 0.0)
    if gpu and row.compile_timm:
        yield make("timm, compiled NHWC", theirs, "NHWC", compiled=True, distance=lambda: 0.0)
    yield make("normfree NHWC", ours, "NHWC", distance=partial(gate, "NHWC"))
    if gpu:
        yield make("normfree, compiled NHWC", ours, "NHWC", compiled=True, distance=partial(gate, "NHWC"))
        yield our_fastest(make, ours, partial(gate, "NHWC", kernels=True))
    for anchor, size, images in row.anchors if gpu and not rate else ():
        net = shaken(timm.create_model(anchor)).train()
        for extra in (False, True):
            label = f"{anchor} {size} px{', compiled' if extra else ''} NHWC"
            yield _arm(bench.device, size, images, label, net, "NHWC", half=half, alike=False, compiled=extra,
                       allowed=0.0, distance=lambda: 0.0)  # fmt: skip


def our_fastest(make: Callable[..., Arm], ours: Net, distance: Callable[[], float]) -> Arm:
    """The fastest way that the library has for a whole step on a GPU: blocks compiled one by one, standardized in one
    launch each way, the update in two. `make`: `_arm` with the row's settings."""
    return make("normfree, compiled with fused update NHWC", ours, "NHWC", compiled=True, kernels=True,
                distance=distance)  # fmt: skip


def _arm(
    device: torch.device,
    size: int,
    images: int,
    name: str,
    net: nn.Module,
    word: str,
    *,
    half: bool,
    alike: bool,
    allowed: float,
    distance: Callable[[], float],
    compiled: bool = False,
    kernels: bool | None = None,
) -> Arm:
    placed = copied(net, word, device)
    x, y = batch(size, images, device, word)
    update = our_update(placed, kernels=kernels) if isinstance(placed, Net) else timm_update(placed)
    blocks = CompiledBlocks(placed) if compiled and isinstance(placed, Net) else None
    forward = torch.compile(placed) if compiled and blocks is None else None
    run = partial(forward_backward, placed, x, y, half=half, forward=forward, blocks=blocks)
    return Arm(name, run, then=update.step, distance=distance, allowed=allowed, alike=alike, images=images,
               compiled=compiled)  # fmt: skip


def _joined(arm: Arm) -> Arm:
    """Both parts in one run, without a wait in between."""

    def run() -> Tensor:
        loss = arm.run()
        assert arm.then is not None
        arm.then()
        return loss

    return replace(arm, run=run, then=None)


def _distance(
    theirs: nn.Module,
    ours: Net,
    size: int,
    base: Callable[..., float],
    word: str,
    *,
    kernels: bool | None = None,
) -> float:
    """Of gradients (two images, float32, memory format `word`) and of `base`: the root of the sum of squares."""
    device = next(ours.parameters()).device
    x, y = batch(size, 2, device, word)
    gradients = gradient_distance(copied(theirs, word, device), copied(ours, word, device), x, y)
    return math.hypot(gradients, base(kernels=kernels))


def _base(row: Row, device: torch.device, *, kernels: bool | None = None) -> float:
    """Of updates.

    Raises:
        GateError: gradients differ in float64, that is, not by rounding.
    """
    theirs, ours = (net.to(device) for net in pair(row.name))
    assert isinstance(ours, Net)
    x, y = batch(row.size // 2, 2, device)
    exact = gradient_distance(theirs, ours, x.double(), y)
    if not exact <= EXACT:
        raise GateError(f"{row.name}: gradients in float64 are {exact:.1e} apart, allowed are {EXACT:g}")
    return update_distance(theirs, ours, kernels=kernels)
