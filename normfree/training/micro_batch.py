"""input.micro_batch "auto": find the largest micro-batch that fits, before the first step, the same in all processes.

The memory is estimated while the network is still on the CPU (`memory.py`). On a GPU the estimate is then tried, with
everything in memory that a run holds, and the next smaller size as long as the memory overflows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from normfree.data.transforms.normalize import height_and_width
from normfree.models.net import Net
from normfree.optim.sgd import SGD
from normfree.optim.torch_optimizers import TorchOptimizer
from normfree.training import memory
from normfree.training.choices import learns_embeddings
from normfree.training.config import Config, channels_of, size_of
from normfree.training.distributed.modes import sizes
from normfree.training.distributed.world import World
from normfree.training.gradient import BatchGradient
from normfree.training.memory_checks import state_bytes

# Takes a test of a size; returns the largest size that is estimated to fit and passes the test.
Estimate = Callable[[Callable[[int], bool]], int]


def estimate(net: Net, config: Config, *, world: World, sharded: bool = False) -> Estimate:
    """Estimate what a pass of `net` needs and measure what is free now."""
    fixed, each = memory.line(
        net,
        image_size=size_of(config.input.image_size),
        channels=channels_of(config.input.image_size),
        half=config.precision == "bfloat16",
    )
    limit = memory.free_bytes(world.device)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    state = state_bytes(weights, config) // (world.size if sharded else 1)
    part = config.input.batch_size // world.size
    exact = config.parallel == "exact"

    def needs(size: int) -> int:
        partial = (part // size).bit_length() if exact else 0  # sums that `TreeSum` holds
        return state + partial * weights + fixed + size * each

    def find(fits: Callable[[int], bool]) -> int:
        return memory.largest(sizes(config, world_size=world.size), needs=needs, limit=limit, works=fits)

    return find


def choose(
    find: Estimate,
    gradients: BatchGradient,
    optimizer: SGD | TorchOptimizer,
    config: Config,
    *,
    num_classes: int,
) -> int:
    """Return the smallest of the sizes that the processes find.

    Raises:
        ValueError: not even the smallest size fits in one of the processes; raised in all.
    """
    world = gradients.world

    def fits(size: int) -> bool:
        return fits_on_device(size, gradients, optimizer, config, num_classes=num_classes)

    # Not where one process alone could fail during communication, or where full memory is no error.
    exchanges = gradients.sharded or (world.size > 1 and learns_embeddings(config.objective))
    tries = world.device.type == "cuda" and not exchanges
    try:
        mine: int | str = find(fits if tries else (lambda size: True))
    except ValueError as error:
        mine = str(error)
    found = world.all_gather(mine)
    for message in found:
        if isinstance(message, str):
            raise ValueError(message)
    return min(int(size) for size in found)


def fits_on_device(
    size: int, gradients: BatchGradient, optimizer: SGD | TorchOptimizer, config: Config, *, num_classes: int
) -> bool:
    """Return True if two micro-batches of `size` random images fit in memory next to everything that a run holds.

    Afterwards the run is as before, except that momentum exists and is 0.
    """
    net, device = gradients.net, gradients.world.device
    count = min(2 * size, config.input.batch_size // gradients.world.size)
    shape = (channels_of(config.input.image_size), *height_and_width(size_of(config.input.image_size)))
    buffers = [b.clone() for b in net.buffers()]
    optimizer.named_state()
    try:
        images = torch.rand(count, *shape, device=device).contiguous(memory_format=torch.channels_last)
        gradients(images, gradients.example_targets(count, num_classes), 0, micro_batch=size)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(net.buffers(), buffers, strict=True):  # batch-norm twins have some
            buffer.copy_(value)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def with_size(config: Config, size: int) -> Config:
    """Return the config with this micro-batch."""
    return config.model_copy(update={"input": config.input.model_copy(update={"micro_batch": size})})
