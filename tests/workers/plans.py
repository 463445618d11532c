"""What runs in the worlds of processes: one plan for the three test files that need several processes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

Task = list[Any]

WORLD_FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=48,val=13 --input.test_fraction 0 --model nf_resnet_nano "
    "--precision float32 --input.image_size 16 "
    "--input.batch_size 8 --input.micro_batch 2 --input.workers 0 --length 6st --optim.warmup 2st --optim.lr 0.05 "
    "--log.every 2 --log.evaluate_every 3st --log.checkpoint_every 2st --optim.ema_decay 0.9 --augment.mixup 0.2 "
    "--augment.cutmix 1.0 --augment.mix_with fresh --net.drop_rate 0.3 --net.stochdepth_rate 0.5 --device cpu"
)
# Processes -> into how many micro-batches each cuts its part of 32 images.
LAYOUTS = {"1": [1, 2, 3, 4, 5, 6, 7, 8], "2": [1, 2, 3, 4, 6, 8], "4": [1, 2, 3, 4, 8]}
# With two validation images, two of four processes have none to score: they must not be waited for.
MODES_FLAGS = shlex.split(
    "--data synthetic:classes=3,size=16,train=48,val=2 --precision float32 --model nf_resnet_nano "
    "--input.image_size 16 --input.batch_size 8 --input.micro_batch 1 --input.workers 0 --length 6st "
    "--optim.warmup 2st --optim.lr 0.02 --log.every 2 --log.evaluate_every 3st --log.checkpoint_every 2st "
    "--optim.ema_decay 0.9 --augment.mixup 0.2 --augment.cutmix 1.0 --augment.randaugment 2x3 --net.drop_rate 0.3 "
    "--net.stochdepth_rate 0.5 "
    "--net.skip_gain 0.5 --device cpu"
)
TWO = ["--input.micro_batch", "2"]
MUON = ["--optim.optimizer", "muon"]
# With evaluation after the last step only.
SIMCLR = shlex.split(
    "--objective simclr:dim=8 --augment.repeats 2 --augment.mixup 0 --augment.cutmix 0 --augment.randaugment "
    "simclr:0.5 --input.micro_batch 2 --length 3st"
)
FROZEN = ["--optim.body", "train:lr=0.5,layer_decay=0.9,freeze=stem,stages.0.0"]


class Modes:
    """Tasks of modes_worker.py in one folder."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder, self.flags = str(folder), [*MODES_FLAGS, *flags]

    def train(self, mode: str, name: str, *more: str, stop: int = 0, copy: str = "") -> Task:
        """Train the run `name`; mode "as before" continues it in the mode of its config."""
        flags = [] if mode == "as before" else ["--parallel", mode]
        return ["modes_worker", "train", [self.folder, self.flags, name, [*flags, *more], stop, copy]]

    def restore(self, mode: str, name: str) -> Task:
        return ["modes_worker", "restore", [self.folder, self.flags, name, ["--parallel", mode]]]

    def changing(self, steps: int) -> tuple[Task, Task, Task]:
        """A run in exact mode that changes its size: on 1, 4 and 2 processes, a third of its steps each."""
        return (
            self.train("exact", "changing", stop=steps // 3),
            self.train("as before", "changing", stop=2 * steps // 3),
            self.train("as before", "changing"),
        )


def everything(folder: Path) -> list[tuple[int, list[Task]]]:
    """Worlds of 1, 4, 3, 2 and again 1 process, which read what the worlds before them have left."""
    for name in ("world", "modes", "dtensor"):
        (folder / name).mkdir()
    world: Task = ["world_worker", "everything", [str(folder / "world"), WORLD_FLAGS, LAYOUTS]]
    dtensor: Task = ["dtensor_worker", "everything", [str(folder / "dtensor")]]
    modes = Modes(folder / "modes")
    first, second, third = modes.changing(6)
    one = [
        modes.train("exact", "simclr_exact1", *SIMCLR),
        modes.train("exact", "muon1", *MUON),
        first,
        modes.train("exact", "exact1"),
        modes.train("replicated", "replicated1"),
    ]
    four = [second, modes.train("exact", "exact4")]
    four += [modes.train(mode, f"{mode}4", *TWO) for mode in ("sharded", "replicated")]
    four += [
        modes.train("sharded", "broken4", *TWO, stop=3),
        modes.train("as before", "resumed4", copy="broken4"),
    ]
    two = [third, *(modes.train(mode, f"{mode}2") for mode in ("exact", "sharded", "replicated"))]
    two += [modes.train("exact", "muon2", *MUON)]
    two += [modes.train(mode, f"simclr_{mode}2", *SIMCLR) for mode in ("exact", "sharded", "replicated")]
    two += [modes.train(mode, f"frozen_{mode}", *FROZEN) for mode in ("exact", "sharded", "replicated")]
    two += [
        modes.train("sharded", "from4", copy="broken4"),
        modes.train("replicated", "plain2", copy="broken4"),
    ]
    two += [
        modes.restore(to, f"{of}4") for of in ("sharded", "replicated") for to in ("sharded", "replicated")
    ]
    last = [modes.train("sharded", "alone", copy="broken4"), modes.restore("replicated", "sharded4")]
    return [
        (1, one),
        (4, [dtensor, world, *four]),
        (3, [world]),
        (2, [dtensor, world, *two]),
        (1, [dtensor, world, *last]),
    ]


def fifty_steps(folder: Path) -> list[tuple[int, list[Task]]]:
    """Exact runs of 51 steps on 1, 2, 4 and 8 processes, and one that changes its size."""
    modes = Modes(
        folder, "--length", "51st", "--log.evaluate_every", "51st", "--log.checkpoint_every", "51st"
    )
    first, second, third = modes.changing(51)
    exact = {size: modes.train("exact", f"exact{size}") for size in (1, 2, 4, 8)}
    return [(1, [first, exact[1]]), (4, [second, exact[4]]), (2, [third, exact[2]]), (8, [exact[8]])]
