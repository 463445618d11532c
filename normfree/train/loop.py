"""train(config): the page that one should be able to recite.

Data and network -> what a stopped run left -> steps (`trainer.py`), with lines, scores and checkpoints between them
-> the model folder. No callbacks: whoever wants another course copies this page; whoever wants a look reads
metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from normfree.data.loader import train_batches
from normfree.data.protocol import Split
from normfree.inference import Evaluation, evaluate
from normfree.train import balance, checkpoint, run
from normfree.train.config import Config, steps_of
from normfree.train.exact import same_kernels
from normfree.train.logs import Logs, open_logs, require
from normfree.train.metrics import LiveLine, Meter, NoMetrics, Voice
from normfree.train.parallel import start_world
from normfree.train.plateau import Best
from normfree.train.profile import profiled
from normfree.train.trainer import Trainer

IN_PROCESS = 2000  # images; scoring fewer takes less time than starting workers


class Stopped(Exception):  # not an error: the run was asked to end and has saved itself
    """A signal ended the run after `step` steps; `exit_code` is 128 + its number."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.exit_code = step, 128 + number


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
                require(config.log.to)
                split = run.open_data(config, voice)
        with world.together():
            if not world.first:
                split = run.open_data(config, voice, check=False)
            config = run.resolve(config)
            if config.parallel == "exact":
                stack.enter_context(same_kernels())
            weights = "" if (out / "checkpoints").exists() else config.weights
            head = run.keeps_head(weights, tuple(split.classes))
            if not head:
                voice.say(f"a new classifier for {len(split.classes)} classes on the network of {weights}")
            trainer = Trainer(config, num_classes=len(split.classes), samples=len(split.train), weights=weights,
                              head=head, world=world,
                              class_weights=balance.class_weights(split.train, config.optim.class_balance))  # fmt: skip
        if trainer.config != config:
            config = trainer.config  # micro_batch "auto" has become a number
            voice.say(f"micro-batches of {config.input.micro_batch} images")
        log: Logs | NoMetrics = NoMetrics()
        saved, best = None, Best()
        with world.together():  # nothing is written before data and model are known to work
            if world.first:
                stack.enter_context(run.locked(out))
                voice.keep(out / "log.txt")
                saved, best = _newest(trainer, out, voice)
                run.begin(out, config, split, trainer.net, trainer.total_steps, voice)
                if (step := saved.step if saved else 0) < trainer.total_steps:
                    log = stack.enter_context(
                        contextlib.closing(open_logs(out, config, step=step, voice=voice))
                    )
            else:
                voice.keep(Path(os.devnull))
        step, best = world.tell((saved.step if saved else 0, best))[0]
        trainer.restore_(saved)
        begun, saved = saved.state.get("meter", {}) if saved else {}, None
        step, best, scores = _steps(trainer, split, out, voice, log, step=step, best=best, begun=begun)
        if config.patience and best.step != step:
            with world.together():
                if world.first:
                    saved = checkpoint.read(out / "checkpoints" / checkpoint.name_of(best.step))
            trainer.restore_(saved)
            scores = None
        last, average = scores or score(trainer, split)
        result = run.TrainResult(out, step, best.step if config.patience else step, last, average,
                                 time.monotonic() - start)  # fmt: skip
        averaged = trainer.whole(trainer.ema.module)
        with world.together():
            if world.first:
                run.finish(config, split, averaged, result, voice)
        return result


def _steps(
    trainer: Trainer,
    split: Split,
    out: Path,
    voice: Voice,
    log: Logs | NoMetrics,
    *,
    step: int,
    best: Best,
    begun: dict[str, Any],
) -> tuple[int, Best, tuple[Evaluation, Evaluation] | None]:
    """The steps that are left, with what is written, scored and saved between them, until the last one or a plateau.
    Returns the steps done, the best score, and the scores after the last step, None when no step was left."""
    scores: tuple[Evaluation, Evaluation] | None = None
    if best.plateau(trainer.config.patience):
        return step, best, scores
    config, total, samples, world = trainer.config, trainer.total_steps, len(split.train), trainer.world
    batch_size, meter = config.input.batch_size, Meter(begun)
    batches = train_batches(
        split.train, trainer.transform, batch_size=batch_size, seed=config.seed, start_step=step, num_steps=total,
        workers=config.input.workers, pin_memory=trainer.device.type == "cuda", pairs=trainer.pairs,
        rank=world.rank, world_size=world.size, repeats=config.augment.repeats,
    )  # fmt: skip
    batches = profiled(batches, steps=config.log.profile if world.first else 0, net=trainer.net, folder=out / "profile",
                       compiled=config.compile, say=voice.say)  # fmt: skip

    def due(length: str) -> bool:
        return step == total or step % max(1, steps_of(length, samples=samples, batch_size=batch_size)) == 0

    with (
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
                more = {"ratios": trainer.ratios} if trainer.ratios else {}
                log.write(**place, **values, lr=lr, grad_norm=float(report.grad_norm), **more)
                line.update(step, **values)
            improved = False
            if due(config.log.evaluate_every):
                weights, average = scores = score(trainer, split)
                log.write(**place, top1=weights.top1, top5=weights.top5, val_loss=weights.loss,
                          ema_top1=average.top1, ema_top5=average.top5, ema_val_loss=average.loss)  # fmt: skip
                voice.say(f"epoch {place['epoch']:5.1f}  top-1 {weights.top1:.2f} %  averaged {average.top1:.2f} %  "
                          f"loss {weights.loss:.3f}")  # fmt: skip
                best = best.after(balance.score(average, trainer.class_weights), average.loss, step)
                improved = best.step == step
            ended = step == total or best.plateau(config.patience)
            if improved or signalled or ended or due(config.log.checkpoint_every):
                state = {
                    "best": best.state(),
                    "seed": config.seed,
                    "total_steps": total,
                    "meter": meter.state(),
                }
                _save(trainer, out / "checkpoints", step, state, is_best=improved)
            if ended:
                break
            if signalled:
                raise Stopped(step, signalled)
    if step < total:
        voice.say(f"no better score in {config.patience} evaluations: the best one, {best.score:.2f} %, was after step "
                  f"{best.step}")  # fmt: skip
    return step, best, scores


def _save(trainer: Trainer, folder: Path, step: int, state: dict[str, Any], *, is_best: bool) -> None:
    trainer.align_()
    tensors = trainer.tensors()
    with trainer.world.together():  # nobody leaves, or trains on, before it is on disk
        if trainer.world.first:
            saved = checkpoint.save(folder, step, tensors=tensors, state=state, keep=trainer.config.log.keep)
            if is_best:
                checkpoint.point(folder, "best", saved.name)


def score(trainer: Trainer, split: Split) -> tuple[Evaluation, Evaluation]:
    """Evaluations of the weights and of their average on the validation source."""
    config, world = trainer.config, trainer.world
    trainer.align_()
    workers = 0 if len(split.val) < IN_PROCESS else config.input.workers
    first, second = (
        evaluate(
            trainer.whole(net),
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


def _newest(trainer: Trainer, out: Path, voice: Voice) -> tuple[checkpoint.Checkpoint | None, Best]:
    """The newest sound checkpoint to continue from, if any, and the best averaged score so far."""
    saved, passed_over = checkpoint.newest(out / "checkpoints")
    for reason in passed_over:
        voice.say(f"passed over: {reason}")
    if saved is None:
        if passed_over:
            raise ValueError(
                f"{out} has checkpoints but none is sound. Nothing was changed; start another run."
            )
        return None, Best()
    if saved.step > trainer.total_steps or saved.state["total_steps"] != trainer.total_steps:
        raise ValueError(f"{out} was to take {saved.state['total_steps']} steps; the data or config now give "
                         f"{trainer.total_steps}. A run continues only as it began: start another run.")  # fmt: skip
    voice.say(f"continuing {out} after step {saved.step}")
    best = Best.of_state(saved.state)
    if best.step == saved.step:  # killed between saving it and pointing at it
        checkpoint.point(out / "checkpoints", "best", checkpoint.name_of(best.step))
    return saved, best


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
