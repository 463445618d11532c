"""Goal 8: NaN and Inf in a loss, gradient or pixel, in one rank, in weights, average or momentum; float16 overflows."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.models.zoo import create_model
from normfree.optim.attach import attach_agc
from normfree.training.trainer import Trainer
from normfree.weights.tensor_file import read_tensors
from reliability.goals import Case, Result, spread
from reliability.runs import FLAGS, differences, finish, scratch, train, uninterrupted

STEP = 5  # the step that is spoiled, counted from 0; the last checkpoint before it is that of step 4
VALUES = (float("nan"), float("inf"), float("-inf"))
KINDS = ("loss", "gradient", "pixel", "weights", "average", "momentum")
PRECISIONS = ("float32", "bfloat16")
NAMED = ("loss", "gradient", "pixel")  # noticed in the step itself, with its images
SPOILED = "exit code 3, images named, nothing of it is stored, ranks agree, run resumes identical"
ROLLBACK = "rollback: goes back to the last checkpoint with a lower rate, counted; identical after kill -9"
SCALER = "float16 and bfloat16 in other loops: a step that overflows changes nothing"


def cases(count: int) -> Iterator[Case]:
    """Return `count` combinations of what is spoiled, value, precision and ranks, and the other checks."""
    all_ = list(itertools.product(KINDS, VALUES, PRECISIONS, (None, 0, 1)))
    for index in spread(len(all_), count):
        kind, value, precision, rank = all_[index]
        name = f"{kind} {value}, {precision}, {'one process' if rank is None else f'rank {rank} of 2'}"
        yield Case(f"NaN or Inf in {kind}: {SPOILED}", name, partial(spoiled, kind, value, precision, rank))
    for seed in spread(20, -(-count // 5)):
        yield Case(ROLLBACK, f"rollback, seed {seed}", partial(rolled_back, seed))
    for dtype in ("float16", "bfloat16"):
        yield Case(SCALER, dtype, partial(overflow, dtype))


@dataclass(frozen=True)
class Spoil:
    """Called in a process before the command: it will find `value` in something of step STEP.

    Attributes:
        rank: the only process that does; None: all.
        above: only while the learning rate is above this one.
    """

    kind: str
    value: float
    rank: int | None = None
    above: float = 0.0

    def __call__(self) -> None:
        original = Trainer.step

        def stepping(trainer: Trainer, batch: Any, index: int) -> Any:
            mine = self.rank is None or os.environ.get("RANK", "0") == str(self.rank)
            if index != STEP or not mine or trainer.rate_at(index) <= self.above:
                return original(trainer, batch, index)
            before = {k: v.clone() for part in trainer.state.tensors().values() for k, v in part.items()}
            undo = self.put(trainer)
            try:
                result = original(trainer, batch, index)
            except ValueError:
                after = {k: v for part in trainer.state.tensors().values() for k, v in part.items()}
                print("unchanged" if all(v.equal(before[k]) for k, v in after.items()) else "CHANGED")
                raise
            finally:
                undo()
            if self.kind in ("weights", "average", "momentum"):
                self.tensor(trainer).view(-1)[0] = self.value
            return result

        Trainer.step = stepping  # type: ignore[method-assign]

    def put(self, trainer: Trainer) -> Callable[[], object]:
        """Put the value into loss, gradient or pixel of the next step; return a function that takes it out."""
        if self.kind == "gradient":
            handle = trainer.net.head.weight.register_hook(lambda grad: grad * self.value)
            return handle.remove
        if self.kind == "loss":
            loss = trainer.gradients.loss
            trainer.gradients.loss = lambda logits, targets: loss(logits, targets) * self.value
            return lambda: setattr(trainer.gradients, "loss", loss)
        if self.kind == "pixel":
            prepare = trainer.prepare

            def spoiled_pixel(batch: Any, step: int) -> tuple[Tensor, Tensor]:
                images, targets = prepare(batch, step)
                images[1, 0, 3, 3] = self.value
                return images, targets

            trainer.prepare = spoiled_pixel  # type: ignore[assignment]
            return lambda: setattr(trainer, "prepare", prepare)
        return lambda: None

    def tensor(self, trainer: Trainer) -> Tensor:
        """Return the tensor that a broken memory has changed."""
        if self.kind == "momentum":
            return trainer.optimizer.named_state()["head.weight"]
        net = trainer.net if self.kind == "weights" else trainer.ema.module
        return net.head.weight.detach()  # type: ignore[union-attr, operator]


def spoiled(kind: str, value: float, precision: str, rank: int | None) -> Result:
    """Spoil one step of a run in one or two processes, then resume it without the fault."""
    ranks = 1 if rank is None else 2
    flags = (*FLAGS, "--precision", precision)
    whole, _ = uninterrupted(flags, ranks=ranks)
    with scratch() as folder:
        out = Path(folder) / "run"
        job = train(out, flags=flags, ranks=ranks, prepare=Spoil(kind, value, rank))
        codes, printed = job.wait(), job.printed()
        errors = [line for line in printed.splitlines() if line.startswith("normfree: ")]
        wrong = [] if codes == [3] * ranks else [f"exit codes {codes}: {printed[-300:]}"]
        wrong += [] if len(errors) == 1 else [f"{len(errors)} lines of error"]
        if kind in NAMED:
            text = "; the outputs for '" if kind == "pixel" else "; the images of the step are '"
            wrong += [] if text in "".join(errors) else ["the images are not named"]
            wrong += [] if "CHANGED" not in printed else ["tensors have changed"]
        wrong += not_finite_files(out)
        finish(out, ranks=ranks)
        wrong += differences(whole, out)
    return Result(1, int(not wrong), "; ".join(wrong))


def not_finite_files(out: Path) -> list[str]:
    """Return the files of a run that hold values that are not finite."""
    files = out.rglob("*.safetensors")
    return [
        f"{f.name}: not finite"
        for f in files
        if not all(v.isfinite().all() for v in read_tensors(f).values())
    ]


def rolled_back(seed: int) -> Result:
    """Let a run go back once, kill it at a random instant, let it end, and compare it with one that was not killed."""
    rng = random.Random(seed)
    flags, above = (*FLAGS, "--on-divergence", "rollback", "--optim.lr", "0.1"), 0.02
    kind, value = KINDS[seed % len(KINDS)], VALUES[seed % len(VALUES)]
    options: dict[str, Any] = {"flags": flags, "prepare": Spoil(kind, value, None, above)}
    with scratch() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "run"
        start = time.monotonic()
        finish(whole, **options)
        seconds = time.monotonic() - start
        job = train(out, **options)
        time.sleep(rng.uniform(0.0, seconds))
        job.kill()
        job.wait()
        finish(out, **options)
        wrong = differences(whole, out) + not_finite_files(out)
        if '"rollbacks": 1' not in (out / "results.json").read_text(encoding="utf-8"):
            wrong.append("not counted once")
    return Result(1, int(not wrong), "; ".join(wrong))


def overflow(dtype: str) -> Result:
    """Train a network in another loop, with a GradScaler, a loss that overflows in one step, and `attach_agc`."""
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    # A scaler skips the step itself; without one, the hook refuses it.
    attach_agc(optimizer, model=net, error_if_nonfinite=dtype == "bfloat16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=dtype == "float16")
    wrong, refused = 0, 0
    for step in range(6):
        images = torch.randn(4, 3, 32, 32)
        with torch.autocast("cpu", getattr(torch, dtype)):
            loss = net(images).float().square().mean()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        optimizer.zero_grad()
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        try:
            scaler.step(optimizer)
        except ValueError:
            refused += 1
        scaler.update()
        changed = any(not v.equal(before[k]) for k, v in net.state_dict().items())
        wrong += changed == (step == 3) or not all(v.isfinite().all() for v in net.state_dict().values())
    return Result(6, 6 - wrong, f"{refused} steps refused")
