"""train(config): the page that one should be able to recite.

The order of a step is the science: forward and backward in micro-batches -> clipping of the raw gradient, which
also checks that it is finite -> decay -> momentum -> average -> schedule. Whoever wants another order copies
this page; whoever wants a look reads metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from normfree.data.augment import AfterMixing, normalize, train_transform
from normfree.data.loader import Batch, train_batches
from normfree.data.mixing import FreshPairs, mix, paired_targets
from normfree.data.protocol import Split
from normfree.data.seeds import key
from normfree.inference import Evaluation, evaluate, run_device
from normfree.models.net import Net
from normfree.models.zoo import create_model
from normfree.optim.agc import ClipReport, NonFiniteGradientError, clip_grad_
from normfree.optim.ema import Ema
from normfree.optim.groups import parameter_groups
from normfree.optim.sam import STRIDE, ascend_, descend_
from normfree.optim.schedule import schedule_multiplier
from normfree.optim.sgd import SGD
from normfree.train import checkpoint, run
from normfree.train.config import Config, steps_of
from normfree.train.metrics import LiveLine, Meter, Metrics, NoMetrics, Voice
from normfree.train.parallel import World, start_world

IN_PROCESS = 2000  # images; scoring fewer takes less time than starting workers


class Stopped(Exception):  # not an error: the run was asked to end and has saved itself
    """A signal ended the run after `step` steps; `exit_code` is 128 + its number."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.exit_code = step, 128 + number


class Diverged(ValueError):
    """A gradient was not finite. Weights and the last checkpoint are sound; the message names the parameters."""


class Trainer:
    """Network, optimizer and average of one run, and what one step does to them. `weights`: a folder to start from,
    `head`: with its classifier too.

    `world`: the processes that share the run, each with a trainer of its own; None: this one alone.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        samples: int,
        weights: str = "",
        head: bool = True,
        world: World | None = None,
    ) -> None:
        self.config, self.num_classes = config, num_classes
        self.world = world or World(device=run_device(config.device))
        self.world.part(config.input.batch_size)
        self.device = self.world.device
        self.total_steps = max(
            1, steps_of(config.length, samples=samples, batch_size=config.input.batch_size)
        )
        self.warmup = min(
            1.0,
            steps_of(config.optim.warmup, samples=samples, batch_size=config.input.batch_size)
            / self.total_steps,
        )
        torch.manual_seed(key(config.seed, "init"))
        fields = {k: v for k, v in config.net.model_dump().items() if v != "auto"}
        net = create_model(
            config.model, num_classes=num_classes, weights=weights or None, head=head, **fields
        )
        assert isinstance(net, Net)
        self.net = net.to(self.device).to(memory_format=torch.channels_last)
        groups = parameter_groups(net, weight_decay=config.optim.weight_decay, clipping=config.optim.clipping)
        self.optimizer = SGD(groups, config.optim.lr, momentum=config.optim.momentum)
        self.ema = Ema(net, decay=config.optim.ema_decay)
        self.pairs = _pairs(config)
        self.transform = train_transform(
            image_size=int(config.input.image_size), crop_min=config.augment.crop_min, flip=config.augment.flip,
            randaugment="off" if self.pairs else config.augment.randaugment,
        )  # fmt: skip
        self.forward: nn.Module = torch.compile(net) if config.compile else net  # type: ignore[assignment]

    def step(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, ClipReport]:
        """One optimizer step on a batch. Returns mean loss, correct answers (both on the device), and the clipping."""
        config = self.config
        progress = step / self.total_steps
        factor = schedule_multiplier(
            config.optim.schedule, progress, warmup=self.warmup, final=config.optim.final_lr
        )
        self.optimizer.set_lr(config.optim.lr * factor)
        images, targets = self.prepare(batch, step)
        before = self.climb_(images, targets, step) if config.optim.sam_rho else None
        loss, correct = self.gradients(images, targets, step)
        if before is not None:
            descend_(self.net.parameters(), before)
        self.world.sum_([*(p.grad for p in self.net.parameters() if p.grad is not None), loss, correct])
        try:
            report = clip_grad_(
                self.optimizer.param_groups, mode=config.optim.clip, clipping=config.optim.clipping,
                eps=config.optim.clipping_eps,
            )  # fmt: skip
        except NonFiniteGradientError as error:
            raise Diverged(f"step {step}: {error} Images of the step begin with {batch.names[0]!r}. "
                           f"Try --optim.lr {config.optim.lr / 3:.2g}.") from None  # fmt: skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update_(self.net, step=step)
        return loss, correct, report

    def prepare(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Normalized, mixed images B 3 S S and soft targets B K, on the device.

        With mix_with "batch" the partners come from this process's part of the batch, so that pairs and shares
        depend on the number of processes; with "fresh", and without mixing, nothing does.
        """
        augment = self.config.augment
        images = normalize(batch.images.to(self.device, non_blocking=True))
        labels = batch.labels.to(self.device, non_blocking=True)
        if batch.partners is not None and batch.share is not None:  # mixed already, image by image
            partners, share = batch.partners.to(self.device), batch.share.to(self.device)
            return images.contiguous(memory_format=torch.channels_last), paired_targets(
                labels, partners, share, num_classes=self.num_classes, label_smoothing=augment.label_smoothing
            )
        rank = (
            (self.world.rank,) if self.world.rank else ()
        )  # the first process draws what a single one draws
        generator = torch.Generator().manual_seed(key(self.config.seed, "mix", step, *rank))
        return mix(
            images.contiguous(memory_format=torch.channels_last), labels, num_classes=self.num_classes,
            mixup=augment.mixup, cutmix=augment.cutmix, label_smoothing=augment.label_smoothing, generator=generator,
        )  # fmt: skip

    def climb_(self, images: Tensor, targets: Tensor, step: int) -> list[Tensor]:
        """SAM: moves the weights uphill for this process's part of the batch. Returns where they were."""
        self.gradients(images[::STRIDE], targets[::STRIDE], step)
        return ascend_(self.net.parameters(), rho=self.config.optim.sam_rho)

    def gradients(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Adds this process's share of the gradient of the batch's mean loss, micro-batch by micro-batch; the sum
        over micro-batches and processes is exact without batch statistics. Returns its shares of loss and answers.

        All randomness of the network comes from (seed, step, micro-batch), so nothing hidden has to be saved.
        Micro-batches are numbered over all processes: of equal size, they are the same for any number of those.
        """
        self.net.train()
        size = self.config.input.micro_batch or len(images)
        whole, first = len(images) * self.world.size, self.world.rank * -(-len(images) // size)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros(
            (), device=self.device
        )  # float32, to travel with the gradients; exact to 2 ** 24
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        for part, (x, y) in enumerate(zip(images.split(size), targets.split(size), strict=True), first):
            torch.manual_seed(key(self.config.seed, "model", step, part))
            with half:
                logits = self.forward(x)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            share = F.cross_entropy(logits, y, reduction="sum") / whole
            share.backward()
            loss += share.detach()
            correct += (logits.detach().argmax(dim=1) == y.argmax(dim=1)).sum()
        return loss, correct

    def align_(self) -> None:
        """Makes the processes' networks one again. Only batch-norm twins have what differs: running statistics, each
        process's own while training, which do not act on the training; scores and checkpoints take their mean."""
        for net in (self.net, self.ema.module):
            self.world.mean_([b for b in net.buffers() if b.is_floating_point()])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds."""
        return {
            "model": dict(self.net.state_dict()),
            "ema": self.ema.state_dict(),
            "optim": self.optimizer.named_state(),
        }

    def restore_(self, saved: checkpoint.Checkpoint) -> None:
        """Continues from `tensors`."""
        self.net.load_state_dict(saved.tensors["model"])
        self.ema.load_state_dict_(saved.tensors["ema"])
        self.optimizer.load_named_state_(saved.tensors["optim"])


def _pairs(config: Config) -> FreshPairs | None:
    augment = config.augment
    if augment.mix_with == "batch" or augment.mixup == augment.cutmix == 0:
        return None
    after = None if augment.randaugment == "off" else AfterMixing(augment.randaugment)
    return FreshPairs(augment.mixup, augment.cutmix, after)


def train(config: Config, out: str | Path, *, console: Console | None = None) -> run.TrainResult:
    """Runs `config` in the run folder `out`, or continues what is there, to the end.

    Raises:
        ValueError: data, model or folder cannot be used; raised before the first step.
        Diverged: a gradient was not finite.
        Stopped: SIGTERM or SIGINT arrived; a checkpoint was written first.
    """
    start = time.monotonic()
    with start_world(config.device) as world, contextlib.ExitStack() as stack:
        voice, out = Voice(console or Console() if world.first else Console(quiet=True)), Path(out)
        with world.together():
            if world.first:  # downloads and looks at every picture before the others come
                run.check_folder(out)
                split = run.open_data(config, voice)
        with world.together():
            if not world.first:
                split = run.open_data(config, voice, check=False)
            config = run.resolve(config)
            weights = "" if (out / "checkpoints").exists() else config.weights
            head = run.keeps_head(weights, tuple(split.classes))
            if not head:
                voice.say(f"a new classifier for {len(split.classes)} classes on the network of {weights}")
            trainer = Trainer(config, num_classes=len(split.classes), samples=len(split.train), weights=weights,
                              head=head, world=world)  # fmt: skip
        step, best = 0, -1.0
        with world.together():  # nothing is written before data and model are known to work
            if world.first:
                stack.enter_context(run.locked(out))
                voice.keep(out / "log.txt")
                step, best = _resume(trainer, out, voice)
                run.begin(out, config, split, trainer.net, trainer.total_steps, voice)
            else:
                voice.keep(Path(os.devnull))
        step, best = world.tell((step, best))[0]
        world.copy_first_([t for part in trainer.tensors().values() for t in part.values()])
        last, average = _steps(trainer, split, out, voice, step=step, best=best) or score(trainer, split)
        result = run.TrainResult(out, trainer.total_steps, last, average, time.monotonic() - start)
        with world.together():
            if world.first:
                run.finish(config, split, trainer.ema.module, result, voice)
        return result


def _steps(
    trainer: Trainer, split: Split, out: Path, voice: Voice, *, step: int, best: float
) -> tuple[Evaluation, Evaluation] | None:
    """The steps that are left, with what is written, scored and saved between them. Returns the scores after the
    last step, or None when no step was left."""
    scores: tuple[Evaluation, Evaluation] | None = None
    config, total, samples, world = trainer.config, trainer.total_steps, len(split.train), trainer.world
    batch_size, meter = config.input.batch_size, Meter()
    batches = train_batches(
        split.train, trainer.transform, batch_size=batch_size, seed=config.seed, start_step=step, num_steps=total,
        workers=config.input.workers, pin_memory=trainer.device.type == "cuda", pairs=trainer.pairs,
        rank=world.rank, world_size=world.size,
    )  # fmt: skip

    def due(length: str) -> bool:
        return step == total or step % max(1, steps_of(length, samples=samples, batch_size=batch_size)) == 0

    with (
        contextlib.closing(Metrics(out / "metrics.jsonl", step=step) if world.first else NoMetrics()) as log,
        contextlib.closing(batches),
        LiveLine(voice, step=step, total_steps=total) as line,
        stop_flag() as stop,
    ):
        for batch in batches:
            loss, correct, report = trainer.step(batch, step)
            step += 1
            meter.add(loss, correct, batch_size)
            signalled = world.largest(
                stop[0] if stop else 0
            )  # whoever got the signal, all stop after the same step
            place = {"step": step, "epoch": round(step * batch_size / samples, 4)}
            if due(f"{config.log.every}st"):
                values = {**meter.read(), "clipped": float(report)}
                lr = trainer.optimizer.param_groups[0]["lr"]
                log.write(**place, **values, lr=lr, grad_norm=float(report.grad_norm))
                line.update(step, **values)
            improved = False
            if due(config.log.evaluate_every):
                weights, average = scores = score(trainer, split)
                log.write(**place, top1=weights.top1, top5=weights.top5, val_loss=weights.loss,
                          ema_top1=average.top1, ema_top5=average.top5, ema_val_loss=average.loss)  # fmt: skip
                voice.say(f"epoch {place['epoch']:5.1f}  top-1 {weights.top1:.2f} %  averaged {average.top1:.2f} %  "
                          f"loss {weights.loss:.3f}")  # fmt: skip
                improved, best = average.top1 > best, max(best, average.top1)
            if improved or signalled or due(config.log.checkpoint_every):
                state = {"best_ema_top1": best, "seed": config.seed, "total_steps": total}
                _save(trainer, out / "checkpoints", step, state, is_best=improved)
            if signalled and step < total:
                raise Stopped(step, signalled)
    return scores


def _save(trainer: Trainer, folder: Path, step: int, state: dict[str, Any], *, is_best: bool) -> None:
    trainer.align_()
    with trainer.world.together():  # nobody leaves, or trains on, before it is on disk
        if trainer.world.first:
            saved = checkpoint.save(
                folder, step, tensors=trainer.tensors(), state=state, keep=trainer.config.log.keep
            )
            if is_best:
                checkpoint.point(folder, "best", saved.name)


def score(trainer: Trainer, split: Split) -> tuple[Evaluation, Evaluation]:
    """Evaluations of the weights and of their average on the validation source."""
    config, world = trainer.config, trainer.world
    trainer.align_()
    workers = 0 if len(split.val) < IN_PROCESS else config.input.workers
    first, second = (
        evaluate(
            net,
            split.val,
            preprocessing=run.preprocessing(config),
            workers=workers,
            device=trainer.device,
            rank=world.rank,
            world_size=world.size,
            gather=world.gather,
        )
        for net in (trainer.net, trainer.ema.module)
    )
    return first, second


def _resume(trainer: Trainer, out: Path, voice: Voice) -> tuple[int, float]:
    """Restores the newest sound checkpoint, if any. Returns (steps done, best averaged top-1 so far)."""
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    for reason in passed_over:
        voice.say(f"passed over: {reason}")
    if saved is None:
        if passed_over:
            raise ValueError(
                f"{out} has checkpoints but none is sound. Nothing was changed; start another run."
            )
        return 0, -1.0
    if saved.step > trainer.total_steps or saved.state["total_steps"] != trainer.total_steps:
        raise ValueError(f"{out} was to take {saved.state['total_steps']} steps; the data or config now give "
                         f"{trainer.total_steps}. A run continues only as it began: start another run.")  # fmt: skip
    trainer.restore_(saved)
    voice.say(f"continuing {out} after step {saved.step}")
    return saved.step, float(saved.state["best_ema_top1"])


@contextlib.contextmanager
def stop_flag() -> Iterator[list[int]]:
    """A list that receives the number of the first SIGTERM or SIGINT; a second signal acts as usual."""
    stop: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, _frame: object) -> None:
        stop.append(number)
        signal.signal(number, previous[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: whoever owns that handles signals
        pass
    try:
        yield stop
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)
