"""timm's network and ours with the same weights, and functions that both sides of a comparison use."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Bench
from benchmarks.summary import Floor
from normfree.models.cost import count
from normfree.models.layers import StochasticDepth
from normfree.models.net import Net
from normfree.models.shared_weights import standardized_once
from normfree.models.variants import variant_of
from normfree.models.zoo import create_model
from normfree.training.compiled import CompiledBlocks
from normfree.weights.load import load_weights
from normfree.weights.names import to_our_names

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
CLASSES = 1000


def shaken(net: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return `net` in evaluation mode with random gains between 0.5 and 1, so that every branch contributes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if parameter.ndim == 0 or key.endswith("gain"):
                parameter.uniform_(0.5, 1.0, generator=generator)
    return net.eval()


def pair(name: str, *, stochdepth: float = 0.0) -> tuple[nn.Module, Net]:
    """Return timm's network and ours in training mode, with the same random weights and no dropout."""
    torch.manual_seed(0)
    theirs = shaken(timm.create_model(name, drop_rate=0.0, drop_path_rate=stochdepth))
    ours = create_model(f"timm_{name}", drop_rate=0.0, stochdepth_rate=stochdepth)
    assert isinstance(ours, Net)
    load_weights(ours, theirs.state_dict())
    return theirs.train(), ours.train()


def copied(net: nn.Module, layout: str, device: torch.device) -> nn.Module:
    """Return a copy on `device` in the memory format `layout`, a key of `FORMATS`."""
    return copy.deepcopy(net).to(device).to(memory_format=FORMATS[layout])


def never_dropping(net: nn.Module) -> nn.Module:
    """Return a copy in which stochastic depth, ours or timm's, keeps every branch."""
    still = copy.deepcopy(net)
    for module in still.modules():
        if isinstance(module, timm.layers.DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, StochasticDepth):
            module.rate = 0.0
    return still


def batch(size: int, images: int, device: torch.device, layout: str = "NCHW") -> tuple[Tensor, Tensor]:
    """Return random images B 3 S S in the memory format `layout`, and labels B; the same for all arms."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, size, size, generator=generator).to(device)
    return x.to(memory_format=FORMATS[layout]), (torch.arange(images) % CLASSES).to(device)


def forward_backward(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    half: bool = False,
    forward: Callable[[Tensor], Tensor] | None = None,
    blocks: CompiledBlocks | None = None,
) -> Tensor:
    """Compute new gradients and return the loss; our networks standardize once, as in `BatchGradient`.

    Args:
        net: the network.
        images: B 3 S S.
        labels: B.
        half: use autocast to bfloat16.
        forward: `net` compiled as a whole.
        blocks: the blocks of our network, compiled as in the trainer.
    """
    net.zero_grad(set_to_none=True)
    once = standardized_once(net) if isinstance(net, Net) else contextlib.nullcontext()
    with once, blocks.active() if blocks is not None else contextlib.nullcontext():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = (forward or net)(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        loss.backward()
    return loss.detach()


def in_our_names(ours: Net, tensors: Mapping[str, Tensor], theirs: nn.Module) -> dict[str, Tensor]:
    """Return `tensors` of timm's network under our names and in our shapes."""
    renamed = to_our_names({**theirs.state_dict(), **tensors})
    return {name: renamed[name].detach() for name, _ in ours.named_parameters()}


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Return the relative L2 distance over all tensors of `wanted`."""
    off = sum(float((found[k].double() - w.double()).square().sum()) for k, w in wanted.items())
    return (off / sum(float(w.double().square().sum()) for w in wanted.values())) ** 0.5


def gradient_distance(theirs: nn.Module, ours: Net, images: Tensor, labels: Tensor) -> float:
    """Return the distance of both gradients of the same loss, in the dtype of `images`, with every branch kept."""
    theirs, ours = (never_dropping(net).to(images) for net in (theirs, ours))
    for net in (theirs, ours):
        forward_backward(net, images, labels)
    gradients = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    mine = {k: p.grad for k, p in ours.named_parameters() if p.grad is not None}
    return distance(mine, in_our_names(ours, gradients, theirs))


def best_formats(seconds: dict[str, float]) -> list[str]:
    """Return the faster memory format of each network, in the given order. An arm's name ends in its format."""
    best: dict[str, str] = {}
    for arm in seconds:
        network, _, layout = arm.rpartition(" ")
        key = network if layout in FORMATS else arm
        if key not in best or seconds[arm] < seconds[best[key]]:
            best[key] = arm
    return list(best.values())


def multiplications(bench: Bench, name: str, size: int, images: int, *, passes: int = 1) -> Floor | None:
    """Return the time of all multiplications at the rate of a large matrix product; training has 3 `passes`."""
    if not bench.matmul:
        return None
    operations = 2 * passes * images * count(variant_of(f"timm_{name}"), image_size=size).macs
    return Floor(1e3 * operations / bench.matmul, "its multiplications at the rate of a matrix product")
