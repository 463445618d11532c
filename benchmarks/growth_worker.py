"""A process that shares the steps of the suite `growth`: `python -m benchmarks.growth_worker NAME PX N STEPS`.

Rank 0 prints the median of the steps in ms, the loss of the first step, and the peak of its resident set in MiB.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from benchmarks.memory import status
from benchmarks.networks import CLASSES
from normfree.data.loader import Batch
from normfree.training.allocator import keep_freed_memory
from normfree.training.config import AugmentConfig, Config, InputConfig, NetConfig
from normfree.training.distributed.world import start_world
from normfree.training.resolve import resolve
from normfree.training.trainer import Trainer

WARM = 2


def main() -> None:
    """Take the steps of this process."""
    name, size, images, steps = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    keep_freed_memory()
    with start_world("cpu") as world:
        config = Config(
            data="synthetic", model=name, device="cpu", precision="float32",
            net=NetConfig(drop_rate=0.0, stochdepth_rate=0.0, skip_gain=1.0),
            input=InputConfig(batch_size=images, image_size=size), augment=AugmentConfig(),
        )  # fmt: skip
        trainer = Trainer(resolve(config), num_classes=CLASSES, samples=images, world=world)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (images, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.arange(images) % CLASSES
        part = slice(world.rank * images // world.size, (world.rank + 1) * images // world.size)
        count = part.stop - part.start
        batch = Batch(pixels[part], labels[part], torch.arange(count), ("",) * count, step=0, epoch=0)
        spent, losses = [], []
        for step in range(WARM + steps):
            start = time.perf_counter()
            loss, _, _ = trainer.step(batch, step)
            losses.append(float(loss))
            spent.append(time.perf_counter() - start)
        world.barrier()
        if world.is_main:
            ms = 1e3 * statistics.median(spent[WARM:])
            print(json.dumps({"ms": ms, "loss": losses[0], "peak_mib": status("VmHWM") / 2**20}))


if __name__ == "__main__":
    main()
