"""input.micro_batch "auto": the largest micro-batch that fits, found before the first step, the same in all processes.

It is predicted while the network still lies on the CPU (`memory.py`). On a GPU it is then tried, with all beside it
that a run holds, and the next smaller one as long as the memory overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from normfree.models.net import Net
from normfree.training import memory
from normfree.training.config import Config
from normfree.training.distributed.modes import sizes

if TYPE_CHECKING:
    from normfree.training.trainer import Trainer

Find = Callable[[Callable[[int], bool]], int]


def predicted(trainer: Trainer, net: Net) -> Find:
    """Counts what `net` needs and what is free now. The result finds the largest size that passes a test as well."""
    config, world = trainer.config, trainer.world
    fixed, each = memory.line(
        net, image_size=int(config.input.image_size), half=config.precision == "bfloat16"
    )
    limit = memory.free_bytes(trainer.device)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    # weights, gradients, momentum, average, and where SAM comes back to
    state = weights * (5 if config.optim.sam_rho else 4) // (world.size if trainer.sharded else 1)
    part = config.input.batch_size // world.size

    def needs(size: int) -> int:
        partial = (part // size).bit_length() if trainer.exact else 0  # sums that `TreeSum` holds
        return state + partial * weights + fixed + size * each

    def find(works: Callable[[int], bool]) -> int:
        return memory.largest(sizes(config, world_size=world.size), needs=needs, limit=limit, works=works)

    return find


def settled(trainer: Trainer, find: Find) -> Config:
    """The trainer's config with the smallest size that one of the processes found.

    Raises:
        ValueError: not even the smallest one fits in one of them; raised in all.
    """
    # Nothing is tried where one process alone could fail amid FSDP2's exchanges, or where a full memory is no error.
    tries = trainer.device.type == "cuda" and not trainer.sharded
    try:
        mine: int | str = find((lambda size: works(trainer, size)) if tries else (lambda size: True))
    except ValueError as error:
        mine = str(error)
    said = trainer.world.tell(mine)
    for words in said:
        if isinstance(words, str):
            raise ValueError(words)
    return _sized(trainer.config, min(int(size) for size in said))


def works(trainer: Trainer, size: int) -> bool:
    """Whether two micro-batches of `size` random images can be computed beside all that a run holds. Leaves the trainer
    as it was, but for momentum, which is 0 from now on instead of missing."""
    config = trainer.config
    images = min(2 * size, config.input.batch_size // trainer.world.size)
    side = int(config.input.image_size)
    buffers = [b.clone() for b in trainer.net.buffers()]
    trainer.config = _sized(config, size)
    trainer.optimizer.named_state()
    try:
        x = torch.rand(images, 3, side, side, device=trainer.device)
        y = torch.full((images, trainer.num_classes), 1 / trainer.num_classes, device=trainer.device)
        trainer.gradients(x.contiguous(memory_format=torch.channels_last), y, 0)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.config = config
        trainer.optimizer.zero_grad(set_to_none=True)
        for buffer, value in zip(trainer.net.buffers(), buffers, strict=True):  # batch-norm twins have some
            buffer.copy_(value)
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()


def _sized(config: Config, size: int) -> Config:
    inputs = config.input.model_copy(update={"micro_batch": size})
    return config.model_copy(update={"input": inputs})
