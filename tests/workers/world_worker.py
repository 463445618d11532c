"""Tasks of tests/training/distributed/test_world.py, run in every process of a world."""

from __future__ import annotations

import copy
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel

from normfree.data.loader import train_batches
from normfree.data.source import ArraySource
from normfree.data.sources.open import open_source
from normfree.data.transforms.train import train_transform
from normfree.inference import evaluate
from normfree.models.shared_weights import standardized_once
from normfree.models.zoo import create_model
from normfree.preprocessing import Preprocessing
from normfree.training import loop
from normfree.training.cached_gradient import cached_backward
from normfree.training.config import Config
from normfree.training.config_io import load_config, with_overrides
from normfree.training.distributed.world import World
from normfree.training.divergence import DivergedError
from normfree.training.gradient import BatchGradient
from normfree.training.objectives import nt_xent
from normfree.training.recipes import RECIPES
from normfree.training.resolve import resolve
from normfree.training.stop import StoppedBySignal
from normfree.training.trainer import Trainer

DATA = "synthetic:classes=3,size=16,train=48,val=13"
Found = dict[Any, Any]


def everything(world: World, folder: str, flags: list[str], layouts: dict[str, list[int]]) -> None:
    """Do all tasks below and save what this process has found to found-SIZE-RANK.pt."""
    path, console = Path(folder), Console(file=io.StringIO())
    found: Found = {"rank": (world.rank, world.size, world.backend)}
    gradients(world, found, flags, layouts.get(str(world.size), []))
    cached_gradients(world, found, layouts.get(str(world.size), []))
    if world.size == 2:
        standardized_once_under_ddp(world, found)
    scores(world, found)
    if world.size in (1, 3):
        loop.train(config(flags, "--input.batch_size", "12"), path / f"twelve{world.size}", console=console)
    if world.size != 3:
        collectives(world, found)
        runs(world, found, flags, path, console)
        found["console"] = console.file.getvalue()
    torch.save(found, path / f"found-{world.size}-{world.rank}.pt")


def config(flags: list[str], *more: str) -> Config:
    return with_overrides(RECIPES["scratch"](), [*flags, *more])


def gradients(world: World, found: Found, flags: list[str], layouts: list[int]) -> None:
    """Compute the gradient of one batch of 32 of the whole world, with so many micro-batches in each process."""
    for model in ("nf_resnet_nano", "resnet_nano"):
        for dtype in (torch.float64, torch.float32):
            for cuts in layouts:
                if model == "nf_resnet_nano" or cuts in (1, 4):
                    found["gradient", model, dtype, cuts] = gradient(world, flags, model, dtype, cuts)


def gradient(world: World, flags: list[str], model: str, dtype: torch.dtype, cuts: int) -> list[torch.Tensor]:
    size = -(-(32 // world.size) // cuts)
    off = (
        *("--model", model, "--input.batch_size", "32", "--input.micro_batch", str(size)),
        *(
            "--net.drop_rate",
            "0",
            "--net.stochdepth_rate",
            "0",
            "--augment.mixup",
            "0",
            "--augment.cutmix",
            "0",
        ),
    )
    trainer = Trainer(resolve(config(flags, *off)), num_classes=3, samples=48, world=world)
    trainer.net.to(dtype)
    batches = train_batches(
        open_source(DATA).train, train_transform(image_size=16), batch_size=32, seed=0, num_steps=1,
        rank=world.rank, world_size=world.size,
    )  # fmt: skip
    images, targets = trainer.prepare(next(batches), 0)
    assert len(images.split(trainer.gradients.micro_batch)) == cuts
    trainer.gradients(images.to(dtype), targets.to(dtype), 0)
    grads = [p.grad for p in trainer.net.parameters() if p.grad is not None]
    world.sum_(grads)
    return grads


def cached_gradients(world: World, found: Found, layouts: list[int]) -> None:
    """Compute the gradient of NT-Xent of 32 views of the whole world, with so many micro-batches in each process."""
    views = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = views.split(32 // world.size)[world.rank] if layouts else views

    def loss(embeddings: torch.Tensor) -> torch.Tensor:
        return nt_xent(embeddings[0::2], embeddings[1::2], temperature=0.2)

    for name in ("nf_resnet_nano", "resnet_nano") if layouts else ():
        torch.manual_seed(0)
        net = create_model(name, num_classes=0, skip_gain=0.5, stochdepth_rate=0.0).double()
        for cuts in layouts:
            size = -(-len(mine) // cuts)
            try:
                value = cached_backward(
                    net, mine, loss, micro_batch=size, rank=world.rank, gather=world.concatenate
                )
            except ValueError as error:
                found["cached", name, cuts] = str(error)
                continue
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            world.sum_(grads)
            found["cached", name, cuts] = [value, *grads]
            net.zero_grad(set_to_none=True)


def standardized_once_under_ddp(world: World, found: Found) -> None:
    """Compute the gradient of a batch shared by the processes, of two steps, with small and with large buckets."""
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(8) % 3
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3, skip_gain=0.5, stochdepth_rate=0.0).double()
    whole = copy.deepcopy(net)
    F.cross_entropy(whole(images), labels).backward()
    found["whole batch"] = [p.grad for p in whole.parameters()]
    mine, own = (t.split(8 // world.size)[world.rank] for t in (images, labels))
    for mebibytes in (25, 0.001):
        spread = DistributedDataParallel(copy.deepcopy(net), bucket_cap_mb=mebibytes)
        for _ in range(2):
            spread.zero_grad()
            with standardized_once(spread):
                F.cross_entropy(spread(mine), own).backward()
        found["standardized once", mebibytes] = [p.grad for p in spread.parameters()]


def scores(world: World, found: Found) -> None:
    """Score 1 to 17 images, and logits that are not finite."""
    generator = torch.Generator().manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 7))
    for p in net.parameters():
        p.data.normal_(generator=generator)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (17, 8, 8, 3), dtype=np.uint8)
    labels = [int(x) for x in random.integers(0, 7, 17)]
    pre = Preprocessing(image_size=8, crop="squash")
    ranks: dict[str, Any] = {"rank": world.rank, "world_size": world.size, "gather": world.gather}
    for n in range(1, 18):
        names = [str(i) for i in range(n)]
        source = ArraySource(pixels[:n], labels[:n], classes=tuple("abcdefg"), names=names)
        found["score", n] = evaluate(net, source, preprocessing=pre, batch_size=3, device="cpu", **ranks)
    net[1].bias.data[2] = float("nan")
    try:
        evaluate(net, source, preprocessing=pre, device="cpu", **ranks)
    except ValueError as error:
        found["no score"] = str(error)


def collectives(world: World, found: Found) -> None:
    mine = torch.full((3, 2), float(world.rank)).t()
    both = [mine, torch.tensor(world.rank)]
    world.sum_(both)
    found["sum"] = both
    ones = [torch.tensor([2.0 * world.rank, 4.0])]
    world.mean_(ones)
    found["mean"] = ones[0]
    first = [torch.tensor([world.rank + 5.0]), torch.tensor(world.rank + 7)]
    world.copy_first_(first)
    found["first"] = first
    found["largest"] = (
        world.largest(10 * world.rank),
        world.any(world.rank == world.size - 1),
        world.any(False),
    )
    world.barrier()
    for failing in ("last", "all", "none"):
        try:
            with world.all_or_none():
                if failing == "all" or (failing == "last" and world.rank == world.size - 1):
                    raise KeyError(f"process {world.rank}")
            found[failing] = "passed"
        except Exception as error:
            found[failing] = type(error).__name__, str(error)


def runs(world: World, found: Found, flags: list[str], path: Path, console: Console) -> None:
    """Train, train again, stop one run and continue it, and let a run diverge."""
    loop.train(config(flags), path / f"run{world.size}", console=console)
    if world.size == 2:
        loop.train(config(flags), path / "again2", console=console)
    twin_statistics(world, found, flags)
    if world.size == 4:
        with patched(Trainer, "step", _stopped_by_one_rank(world)):
            try:
                loop.train(config(flags), path / "stopped", console=console)
            except StoppedBySignal as stopped:
                found["stopped"] = stopped.step, stopped.exit_code
        if world.is_main:
            shutil.rmtree(path / "stopped" / "checkpoints" / "step-00000002")  # the third is what continues
    else:
        if world.is_main:
            shutil.copytree(path / "stopped", path / f"continued{world.size}")
        world.barrier()
        stopped_config = load_config(path / "stopped" / "config.toml")
        loop.train(stopped_config, path / f"continued{world.size}", console=console)
    with patched(BatchGradient, "__call__", _nan_in_the_last_rank(world)):
        try:
            loop.train(config(flags), path / f"diverged{world.size}", console=console)
        except DivergedError as error:
            found["diverged"] = str(error)


def twin_statistics(world: World, found: Found, flags: list[str]) -> None:
    """Save the running statistics of a batch-norm twin and of its average before and after they are scored."""
    split = open_source(DATA)
    twin = Trainer(resolve(config(flags, "--model", "resnet_nano")), num_classes=3, samples=48, world=world)
    batches = train_batches(
        split.train, twin.transform, batch_size=8, seed=0, num_steps=1, rank=world.rank, world_size=world.size,
        pairs=twin.pairs,
    )  # fmt: skip
    for batch in batches:
        twin.step(batch, 0)

    def statistics() -> list[torch.Tensor]:
        return [
            torch.cat([b.flatten().clone() for b in net.buffers() if b.is_floating_point()])
            for net in (twin.net, twin.ema.module)
        ]

    found["statistics"] = statistics()
    loop.score(twin, split)
    found["aligned"] = statistics()


def _stopped_by_one_rank(world: World) -> Callable[..., Any]:
    original = Trainer.step

    def step(self: Trainer, batch: Any, at: int) -> Any:
        if at == 2 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, at)

    return step


def _nan_in_the_last_rank(world: World) -> Callable[..., Any]:
    original = BatchGradient.__call__

    def poisoned(self: BatchGradient, images: torch.Tensor, targets: torch.Tensor, step: int) -> Any:
        result = original(self, images, targets, step)
        if step == 1 and world.rank == world.size - 1:
            self.net.head.bias.grad[0] = float("nan")
        return result

    return poisoned


@contextmanager
def patched(owner: type, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
