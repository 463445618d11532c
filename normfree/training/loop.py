"""train(config): the page that one should be able to recite.

Data and network -> what a stopped run left -> steps (`trainer.py`), with lines, scores and checkpoints between them
-> the model folder. No callbacks: whoever wants another course copies this page; whoever wants a look reads
metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from normfree.data.loader import train_batches
from normfree.data.source import Split
from normfree.inference import Evaluation, evaluate
from normfree.training import checkpoint, class_weights, run_folder
from normfree.training.config import Config, steps_of
from normfree.training.console import ProgressLine, RunLog
from normfree.training.distributed.exact import same_kernels
from normfree.training.distributed.world import start_world
from normfree.training.early_stopping import Best
from normfree.training.loggers import Logs, open_logs, require
from normfree.training.metrics import Meter, NullMetricsWriter
from normfree.training.profile import profiled
from normfree.training.resolve import open_data, preprocessing, resolve
from normfree.training.resume import restore_newest, save_checkpoint
from normfree.training.stop import StoppedBySignal, stop_flag
from normfree.training.trainer import Trainer

IN_PROCESS = 2000  # images; scoring fewer takes less time than starting workers


def train(config: Config, out: str | Path, *, console: Console | None = None) -> run_folder.TrainResult:
    """Runs `config` in the run folder `out`, or continues what is there, to the end.

    Raises:
        ValueError: data, model or folder cannot be used; raised before the first step.
        DivergedError: a gradient was not finite.
        StoppedBySignal: SIGTERM or SIGINT arrived; a checkpoint was written first.
    """
    start = time.monotonic()
    with start_world(config.device) as world, contextlib.ExitStack() as stack:
        run_log, out = RunLog(console or Console() if world.is_main else Console(quiet=True)), Path(out)
        starts = not (out / "checkpoints").exists()
        with world.all_or_none():
            resolved = resolve(config, starts=starts)
            config = resolved.config
            if world.is_main:  # downloads and decodes every image before the others come
                run_folder.check_folder(out)
                require(config.log.to)
                split = open_data(config, run_log)
        with world.all_or_none():
            if not world.is_main:
                split = open_data(config, run_log, check=False)
            if config.parallel == "exact":
                stack.enter_context(same_kernels())
            weights = config.weights if starts else ""
            head = resolved.keeps_head(tuple(split.classes))
            if not head:
                run_log.info(f"a new classifier for {len(split.classes)} classes on the network of {weights}")
            trainer = Trainer(resolved, num_classes=len(split.classes), samples=len(split.train), weights=weights,
                              head=head, world=world,
                              class_weights=class_weights.class_weights(split.train, config.optim.class_balance),
                              )  # fmt: skip
        if trainer.config != config:
            config = trainer.config  # micro_batch "auto" has become a number
            run_log.info(f"micro-batches of {config.input.micro_batch} images")
        log: Logs | NullMetricsWriter = NullMetricsWriter()
        saved, best = None, Best()
        with world.all_or_none():  # nothing is written before data and model are known to work
            if world.is_main:
                stack.enter_context(run_folder.locked(out))
                run_log.attach_file(out / "log.txt")
                saved, best = restore_newest(trainer, out, run_log)
                run_folder.begin(out, config, split, trainer.net, trainer.total_steps, run_log)
                if (step := saved.step if saved else 0) < trainer.total_steps:
                    log = stack.enter_context(
                        contextlib.closing(open_logs(out, config, step=step, run_log=run_log))
                    )
            else:
                run_log.attach_file(Path(os.devnull))
        step, best = world.all_gather((saved.step if saved else 0, best))[0]
        trainer.state.restore_(saved)
        begun, saved = saved.state.get("meter", {}) if saved else {}, None
        step, best, scores = _steps(trainer, split, out, run_log, log, step=step, best=best, begun=begun)
        if config.patience and best.step != step:
            with world.all_or_none():
                if world.is_main:
                    saved = checkpoint.read(out / "checkpoints" / checkpoint.name_of(best.step))
            trainer.state.restore_(saved)
            scores = None
        last, average = scores or score(trainer, split)
        result = run_folder.TrainResult(out, step, best.step if config.patience else step, last, average,
                                 time.monotonic() - start)  # fmt: skip
        averaged = trainer.state.whole(trainer.ema.module)
        with world.all_or_none():
            if world.is_main:
                run_folder.finish(config, split, averaged, result, run_log)
        return result


def _steps(
    trainer: Trainer,
    split: Split,
    out: Path,
    run_log: RunLog,
    log: Logs | NullMetricsWriter,
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
    batches = profiled(
        batches, steps=config.log.profile if world.is_main else 0, net=trainer.net,
        folder=out / "profile", compiled=config.compile, log=run_log.info,
    )  # fmt: skip

    def due(length: str) -> bool:
        return step == total or step % max(1, steps_of(length, samples=samples, batch_size=batch_size)) == 0

    with (
        contextlib.closing(batches),
        ProgressLine(run_log, step=step, total_steps=total) as line,
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
                run_log.info(f"epoch {place['epoch']:5.1f}  top-1 {weights.top1:.2f} %  averaged {average.top1:.2f} %  "
                          f"loss {weights.loss:.3f}")  # fmt: skip
                best = best.after(
                    class_weights.score(average, trainer.prepare.class_weights), average.loss, step
                )
                improved = best.step == step
            ended = step == total or best.plateau(config.patience)
            if improved or signalled or ended or due(config.log.checkpoint_every):
                state = {
                    "best": best.state(),
                    "seed": config.seed,
                    "total_steps": total,
                    "meter": meter.state(),
                }
                save_checkpoint(trainer, out / "checkpoints", step, state, is_best=improved)
            if ended:
                break
            if signalled:
                raise StoppedBySignal(step, signalled)
    if step < total:
        run_log.info(
            f"no better score in {config.patience} evaluations: the best one, {best.score:.2f} %, was after step "
            f"{best.step}"
        )
    return step, best, scores


def score(trainer: Trainer, split: Split) -> tuple[Evaluation, Evaluation]:
    """Evaluations of the weights and of their average on the validation source."""
    config, world = trainer.config, trainer.world
    trainer.state.align_()
    workers = 0 if len(split.val) < IN_PROCESS else config.input.workers
    first, second = (
        evaluate(
            trainer.state.whole(net),
            split.val,
            preprocessing=preprocessing(config),
            workers=workers,
            device=trainer.device,
            rank=world.rank,
            world_size=world.size,
            gather=world.gather,
        )
        for net in (trainer.net, trainer.ema.module)
    )
    return first, second
