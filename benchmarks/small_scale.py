"""Small networks on small images: a step of the demo's network on a CPU, CIFAR-10 to 94 % on a GPU."""

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
from normfree.suggest import problem
from normfree.training.recipes import demo
from normfree.weights.load import load_weights

ABOUT = (
    "On a CPU: milliseconds of eight training steps of the demo's network on random images at its image and batch "
    "size, without loading and mixing. timm does not have this network, so its network class is built with the "
    "same depths and widths, and our network with timm's numerics gets the same weights; gradients and updates "
    "are compared. The table also has the demo's own network and its batch-norm twin, which compute something "
    "else and are compared with their own gradients in float64. On a GPU: seconds to 94 % on CIFAR-10 in device "
    "memory, several seeds."
)
CLASSES = 9  # classes of the demo
STEPS = 8  # per visit; eleven rounds are more than an epoch of the demo, 47 steps
# Relative, for gradients in float32: rounding changes the sign of some ReLU inputs, where the gradient jumps.
TOLERANCE = 1e-3


def cases(device: torch.device, *, data: Path | None = None) -> list[Case]:
    """Return the case of the demo's network on a CPU, of CIFAR-10 on a GPU."""
    if device.type == "cuda":
        return [cifar.case(data)]
    recipe = demo()
    return [case(recipe.model, int(variant_of(recipe.model).train_size), recipe.input.batch_size)]


def case(name: str, size: int, images: int, *, steps: int = STEPS) -> Case:
    """Return the case of our variant `name` with `steps` steps per visit."""
    title = f"demo's network with timm's numerics, batch {images}"
    return Case(title, (name,), partial(measure, title, name, size, images, steps))


def measure(title: str, name: str, size: int, images: int, steps: int, bench: Bench) -> list[Comparison]:
    """Compare all arms."""
    return compare(
        bench, title, list(arms(bench, name, size, images, steps)), tolerance=TOLERANCE, gradients=True
    )


def arms(bench: Bench, name: str, size: int, images: int, steps: int) -> Iterator[Arm]:
    """Yield timm's network, ours with its weights, the demo's own network and its batch-norm twin, in NHWC."""
    theirs, ours = with_timm_numerics(name)
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
    for variant in (name, name.removeprefix("nf_")):
        net = shaken(create_model(variant, num_classes=CLASSES, stochdepth_rate=0.0)).train()
        label = f"normfree, {variant}{' with batch norm' if variant != name else ''}"
        yield arm(label, net, partial(against_float64, net, x, y))


def with_timm_numerics(name: str) -> tuple[nn.Module, Net]:
    """Return timm's network of the shape of our variant `name`, and ours with timm's numerics and the same weights."""
    variant = variant_of(name)
    torch.manual_seed(0)
    theirs = shaken(NormFreeNet(timm_shape(variant), num_classes=CLASSES))
    ours = create_model(
        "timm_nf_seresnet26", num_classes=CLASSES, depths=variant.depths, widths=variant.widths,
        strides=variant.strides, stem=variant.stem, se_ratio=variant.se_ratio, activation=variant.activation,
    )  # fmt: skip
    assert isinstance(ours, Net)
    load_weights(ours, theirs.state_dict())
    return theirs.train(), ours.train()


def timm_shape(variant: Variant) -> NfCfg:
    """Return timm's config for a variant for images of 32 or 64 px.

    With the stem for 32 px, the class still has to lose the pool and the stride of its stem (`whole_job_arms`).
    """
    stems = {"conv7_pool": ("7x7_pool", 4), "conv3": ("3x3_pool", 2)}
    if variant.stem not in stems:
        raise ValueError(
            problem(f"stem is {variant.stem!r}", allowed=" or ".join(stems), fix="use another variant")
        )
    kind, fraction = stems[variant.stem]
    return NfCfg(
        depths=variant.depths, channels=variant.widths, stem_type=kind, stem_chs=variant.widths[0] // fraction,
        bottle_ratio=variant.bottleneck_ratio, attn_layer="se", attn_kwargs={"rd_ratio": variant.se_ratio},
        act_layer=variant.activation,
    )  # fmt: skip


def epoch(net: nn.Module, update: Callable[[], None], x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Take `steps` steps on the same batch; return the last loss.

    The losses of both sides drift apart, since timm clips gains and biases differently.
    """
    loss = x.new_zeros(())
    for _ in range(steps):
        loss = forward_backward(net, x, y)
        update()
    return loss


def against_float64(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the relative L2 distance of the float32 gradient from the float64 one."""
    found = []
    for kind in (torch.float32, torch.float64):
        own = copied(net, "NHWC", x.device).to(kind)
        forward_backward(own, x.to(kind), y)
        found.append(torch.cat([p.grad.double().flatten() for p in own.parameters() if p.grad is not None]))
    return float((found[0] - found[1]).norm() / found[1].norm())
