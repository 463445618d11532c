"""A small network on small images: the demo's step on a CPU, CIFAR-10 to 94 % on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from timm.models.nfnet import NfCfg, NormFreeNet
from torch import Tensor, nn

from benchmarks import cifar
from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import batch, copied, forward_backward, gradient_distance, shaken
from benchmarks.summary import Comparison
from benchmarks.update_arms import our_update, timm_update, update_distance
from normfree.models.net import Net
from normfree.models.variant import Variant
from normfree.models.variants import variant_of
from normfree.models.zoo import create_model
from normfree.training.recipes import demo
from normfree.weights.load import load_weights

ABOUT = (
    "On a CPU: milliseconds of eight training steps on random images of its size and at its batch size, without "
    "loading and mixing. timm has no row for the demo's network, so its network class is built to the same depths "
    "and widths, and ours with timm's numerics gets the same weights; gradients and updates are compared. Beside "
    "them stand the demo's own network and its batch-norm twin, which compute something else and are compared "
    "with their own gradients in float64. On a GPU: seconds to 94 % on CIFAR-10 that lies on the device, several "
    "seeds."
)
CLASSES = 9  # of the demo
STEPS = 8  # in a visit; eleven rounds have more than an epoch of the demo, 47
#: Relative, of gradients in float32: rounding carries some inputs of its ReLUs across 0, where their gradient jumps.
TOLERANCE = 1e-3


def cases(device: torch.device, *, data: Path | None = None) -> list[Case]:
    """The demo's network on a CPU, CIFAR-10 on a GPU."""
    if device.type == "cuda":
        return [cifar.case(data)]
    recipe = demo()
    return [case(recipe.model, int(variant_of(recipe.model).train_size), recipe.input.batch_size)]


def case(name: str, size: int, images: int, *, steps: int = STEPS) -> Case:
    """Our row `name`; a visit takes `steps` steps."""
    words = f"demo's network in timm's flavour, batch {images}"
    return Case(words, (name,), partial(measure, words, name, size, images, steps))


def measure(words: str, name: str, size: int, images: int, steps: int, bench: Bench) -> list[Comparison]:
    """One comparison."""
    return compare(
        bench, words, list(arms(bench, name, size, images, steps)), tolerance=TOLERANCE, gradients=True
    )


def arms(bench: Bench, name: str, size: int, images: int, steps: int) -> Iterator[Arm]:
    """timm's network, ours with its weights, the demo's own row, its batch-norm twin. NHWC, as `normfree train`."""
    theirs, ours = flavoured(name)
    x, y = batch(size, images, bench.device, "NHWC")
    y = y % CLASSES

    @cache
    def apart() -> float:
        return math.hypot(gradient_distance(theirs, ours, x[:2], y[:2]), update_distance(theirs, ours))

    def arm(label: str, net: nn.Module, distance: Callable[[], float]) -> Arm:
        placed = copied(net, "NHWC", bench.device)
        update = our_update(placed) if isinstance(placed, Net) else timm_update(placed)
        return Arm(label, partial(epoch, placed, update.step, x, y, steps), distance=distance, alike=False,
                   images=images * steps)  # fmt: skip

    yield arm("timm", theirs, lambda: 0.0)
    yield arm("normfree", ours, apart)
    for row in (name, name.removeprefix("nf_")):
        net = shaken(create_model(row, num_classes=CLASSES, stochdepth_rate=0.0)).train()
        label = f"normfree, {row}{' with batch norm' if row != name else ''}"
        yield arm(label, net, partial(against_float64, net, x, y))


def flavoured(name: str) -> tuple[nn.Module, Net]:
    """timm's network of the shape of our row `name`, and our network with timm's numerics and the same weights."""
    row = variant_of(name)
    torch.manual_seed(0)
    theirs = shaken(NormFreeNet(timm_shape(row), num_classes=CLASSES))
    ours = create_model(
        "timm_nf_seresnet26", num_classes=CLASSES, depths=row.depths, widths=row.widths, strides=row.strides,
        stem=row.stem, se_ratio=row.se_ratio, activation=row.activation,
    )  # fmt: skip
    assert isinstance(ours, Net)
    load_weights(ours, theirs.state_dict())
    return theirs.train(), ours.train()


def timm_shape(row: Variant) -> NfCfg:
    """timm's words for a row of small images at 64 px."""
    if row.stem != "conv7_pool":
        raise ValueError(f"timm has no stem {row.stem!r}; take a row with 'conv7_pool'.")
    return NfCfg(
        depths=row.depths, channels=row.widths, stem_type="7x7_pool", stem_chs=row.widths[0] // 4,
        bottle_ratio=row.bottleneck_ratio, attn_layer="se", attn_kwargs={"rd_ratio": row.se_ratio},
        act_layer=row.activation,
    )  # fmt: skip


def epoch(net: nn.Module, update: Callable[[], None], x: Tensor, y: Tensor, steps: int) -> Tensor:
    """`steps` steps on the same batch; the loss of the last. It drifts, as timm clips gains and biases otherwise."""
    loss = x.new_zeros(())
    for _ in range(steps):
        loss = forward_backward(net, x, y)
        update()
    return loss


def against_float64(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Relative L2 distance of the float32 gradient from the float64 one."""
    found = []
    for kind in (torch.float32, torch.float64):
        own = copied(net, "NHWC", x.device).to(kind)
        forward_backward(own, x.to(kind), y)
        found.append(torch.cat([p.grad.double().flatten() for p in own.parameters() if p.grad is not None]))
    return float((found[0] - found[1]).norm() / found[1].norm())
