"""The training loop, kept short enough to hold in your head.

    data -> trainer -> checkpoint, if any -> steps, with metrics, scores and checkpoints in between -> model folder

There are no callbacks: to change the procedure, copy this file; to monitor a run, read metrics.jsonl. One step is in
`trainer.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path

from rich.console import Console
from torch import nn

from normfree.data.loader import Batch, train_batches
from normfree.data.source import Split
from normfree.inference import Evaluation, evaluate
from normfree.training import checkpoint, run_folder
from normfree.training.choices import learns_embeddings, uses_sigmoid
from normfree.training.class_weights import class_weights, weighted_top1
from normfree.training.config import Config, steps_of
from normfree.training.console import ProgressLine, RunLog
from normfree.training.distributed.exact import same_kernels
from normfree.training.distributed.world import World, start_world
from normfree.training.early_stopping import Best
from normfree.training.embedding_scores import recalls, score_embeddings, score_name, write_body
from normfree.training.loggers import Logs, open_logs, require
from normfree.training.metrics import Meter, NullMetricsWriter
from normfree.training.profile import profiled
from normfree.training.resolve import Resolved, open_data, preprocessing, resolve
from normfree.training.resume import restore_newest, save_checkpoint
from normfree.training.stop import StoppedBySignal, stop_flag
from normfree.training.trainer import Trainer

# Validation sets below this number of images are evaluated faster without starting worker processes.
IN_PROCESS = 2000
Scores = tuple[Evaluation, Evaluation]  # of the weights, and of their average


def train(config: Config, out: str | Path, *, console: Console | None = None) -> run_folder.TrainResult:
    """Train the run that `config` describes in the run folder `out`, or continue the run in that folder.

    Under torchrun, every process makes the call and gets a result.

    Args:
        config: the run. Values of "auto" are replaced by those of the model, and written to `out/config.toml`.
        out: run folder. A new or empty folder starts a run; the folder of a run continues it.
        console: where to print; None is the standard output.

    Returns:
        Scores after the last step, or with `patience` after the best evaluation.

    Raises:
        ValueError: data, model or folder cannot be used; raised before the first step.
        DivergedError: a gradient was not finite.
        StoppedBySignal: SIGTERM or SIGINT arrived; a checkpoint was written first.

    Examples:
        >>> import tempfile
        >>> from normfree import Config, train
        >>> from rich.console import Console
        >>> config = Config(
        ...     data="synthetic:classes=2,size=16,train=8,val=4", model="nf_resnet_nano", length="2st", device="cpu",
        ...     input={"image_size": 16, "batch_size": 4, "workers": 0},
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train(config, folder, console=Console(quiet=True))
        >>> result.steps, result.average.count
        (2, 4)
    """
    start, out = time.monotonic(), Path(out)
    with start_world(config.device) as world, contextlib.ExitStack() as stack:
        run_log = RunLog(console or Console() if world.is_main else Console(quiet=True))
        # How training starts, in order of precedence:
        # 1. Resume: `out` has checkpoints, of a run that was stopped, was killed, or is finished. The newest sound
        #    checkpoint decides everything; `config.weights` is not read. If none is sound, the run is refused.
        # 2. Start again: `out` has a config but no checkpoint yet. Same as 3 or 4, if the config is the same.
        # 3. Start from `config.weights`, with their classifier if it has the same classes, else with a new one.
        # 4. Start from scratch, with random weights that depend on `config.seed`.
        starts = not (out / "checkpoints").exists()
        with world.all_or_none():
            resolved = resolve(config, starts=starts)
            if world.is_main:  # downloads and audits the data before the other processes open it
                run_folder.check_folder(out)
                require(config.log.to)
                split = open_data(resolved.config, run_log)
        with world.all_or_none():
            if not world.is_main:
                split = open_data(resolved.config, run_log, check=False)
            if resolved.config.parallel == "exact":
                stack.enter_context(same_kernels())
            trainer = _make_trainer(resolved, split, world=world, run_log=run_log, starts=starts)
        metrics: Logs | NullMetricsWriter = NullMetricsWriter()
        saved, best = None, Best()
        with world.all_or_none():  # nothing is written before data and model are known to work
            if world.is_main:
                stack.enter_context(run_folder.locked(out))
                run_log.attach_file(out / "log.txt")
                saved, best = restore_newest(trainer, out, run_log)
                run_folder.begin(out, trainer.config, split, trainer.net, trainer.total_steps, run_log)
                if (step := saved.step if saved else 0) < trainer.total_steps:
                    opened = open_logs(out, trainer.config, step=step, run_log=run_log)
                    metrics = stack.enter_context(contextlib.closing(opened))
            else:
                run_log.attach_file(Path(os.devnull))
        step, best = world.all_gather((saved.step if saved else 0, best))[0]
        trainer.state.restore_(saved)
        meter, saved = Meter(saved.state.get("meter") if saved else None), None
        step, best, scores = _steps(trainer, split, out, run_log, metrics, step=step, best=best, meter=meter)
        return _finish(trainer, split, out, run_log, step=step, best=best, scores=scores, start=start)


def _make_trainer(
    resolved: Resolved, split: Split, *, world: World, run_log: RunLog, starts: bool
) -> Trainer:
    """Return the trainer with random weights, or with `config.weights` if the run starts from them."""
    config = resolved.config
    weights = config.weights if starts else ""
    head = resolved.keeps_head(tuple(split.classes))
    if not head and not learns_embeddings(config.objective):
        run_log.info(f"a new classifier for {len(split.classes)} classes on the network of {weights}")
    trainer = Trainer(
        resolved, num_classes=len(split.classes), samples=len(split.train), weights=weights, head=head,
        class_weights=class_weights(split.train, config.optim.class_balance), world=world,
    )  # fmt: skip
    if trainer.config != config:  # micro_batch "auto" has become a number
        run_log.info(f"micro-batches of {trainer.config.input.micro_batch} images")
    if config.optim.optimizer != "sgd":
        run_log.info(
            f"optimizer {config.optim.optimizer}: learning rate {config.optim.lr:.3g}, "
            f"weight decay {config.optim.weight_decay:g}"
        )
    trained, every = (
        sum(p.numel() for p in trainer.net.parameters() if p.requires_grad or not only)
        for only in (True, False)
    )
    if trained < every:
        run_log.info(f"{trained:,} of {every:,} parameters are trained, the others are frozen")
    return trainer


def _steps(
    trainer: Trainer,
    split: Split,
    out: Path,
    run_log: RunLog,
    metrics: Logs | NullMetricsWriter,
    *,
    step: int,
    best: Best,
    meter: Meter,
) -> tuple[int, Best, Scores | None]:
    """Take the remaining steps after `step`, until the last one or a plateau.

    Returns:
        Number of steps done, the best score, and the scores after the last step, None if no step remained.
    """
    config, total, world = trainer.config, trainer.total_steps, trainer.world
    batch_size, samples = config.input.batch_size, len(split.train)
    scores: Scores | None = None
    if best.plateau(config.patience):
        return step, best, scores

    def due(length: str) -> bool:
        return step == total or step % max(1, steps_of(length, samples=samples, batch_size=batch_size)) == 0

    with (
        contextlib.closing(_batches(trainer, split, out, run_log, start_step=step)) as batches,
        ProgressLine(run_log, step=step, total_steps=total) as line,
        stop_flag() as stop,
    ):
        for batch in batches:
            loss, correct, report = trainer.step(batch, step)
            step += 1
            meter.add(loss, correct, batch_size)
            # If any process has received a signal, all stop after the same step.
            signal_number = world.largest(stop[0] if stop else 0)
            progress = {"step": step, "epoch": round(step * batch_size / samples, 4)}
            if due(f"{config.log.every}st"):
                values = {**meter.read(), "clipped": float(report)}
                ratios = {"ratios": trainer.ratios} if trainer.ratios else {}
                metrics.write(
                    **progress, **values, lr=trainer.current_lr, grad_norm=float(report.grad_norm), **ratios
                )
                line.update(step, **values)
            improved = False
            if due(config.log.evaluate_every):
                weights, average = scores = score(trainer, split)
                metrics.write(**progress, top1=weights.top1, top5=weights.top5, val_loss=weights.loss,
                              ema_top1=average.top1, ema_top5=average.top5, ema_val_loss=average.loss,
                              **recalls(weights, average))  # fmt: skip
                run_log.info(f"epoch {progress['epoch']:5.1f}  {score_name(weights)} {weights.top1:.2f} %  "
                             f"averaged {average.top1:.2f} %  loss {weights.loss:.3f}")  # fmt: skip
                best = best.after(weighted_top1(average, trainer.prepare.class_weights), average.loss, step)
                improved = best.step == step
            ended = step == total or best.plateau(config.patience)
            if improved or signal_number or ended or due(config.log.checkpoint_every):
                state = {
                    "best": best.state(),
                    "seed": config.seed,
                    "total_steps": total,
                    "meter": meter.state(),
                }
                save_checkpoint(trainer, out / "checkpoints", step, state, is_best=improved)
            if ended:
                break
            if signal_number:
                raise StoppedBySignal(step, signal_number)
    if step < total:
        run_log.info(f"no better score in {config.patience} evaluations: the best one, {best.score:.2f} %, "
                     f"was after step {best.step}")  # fmt: skip
    return step, best, scores


def _finish(
    trainer: Trainer,
    split: Split,
    out: Path,
    run_log: RunLog,
    *,
    step: int,
    best: Best,
    scores: Scores | None,
    start: float,
) -> run_folder.TrainResult:
    """Return to the best weights if the run has `patience`, score them if necessary, and write the model folder."""
    world, patience = trainer.world, trainer.config.patience
    if patience and best.step != step:
        saved = None
        with world.all_or_none():
            if world.is_main:
                saved = checkpoint.read(out / "checkpoints" / checkpoint.name_of(best.step))
        trainer.state.restore_(saved)
        scores = None
    weights, average = scores or score(trainer, split)
    scored_step, seconds = best.step if patience else step, time.monotonic() - start
    if trainer.embeds:
        weights, average = score(trainer, split, probe=True)
    result = run_folder.TrainResult(out, step, scored_step, weights, average, seconds)
    averaged = trainer.state.whole(trainer.ema.module)
    with world.all_or_none():
        if world.is_main and trainer.embeds:
            write_body(trainer.config, split, averaged, result, run_log)
        elif world.is_main:
            run_folder.finish(trainer.config, split, averaged, result, run_log)
    return result


def _batches(
    trainer: Trainer, split: Split, out: Path, run_log: RunLog, *, start_step: int
) -> Generator[Batch, None, None]:
    """Return the training batches from `start_step` on, under the profiler if the config asks for it."""
    config, world = trainer.config, trainer.world
    batches = train_batches(
        split.train, trainer.transform, batch_size=config.input.batch_size, seed=config.seed,
        start_step=start_step, num_steps=trainer.total_steps, workers=config.input.workers,
        pin_memory=trainer.device.type == "cuda", pairs=trainer.pairs, rank=world.rank, world_size=world.size,
        repeats=config.augment.repeats,
    )  # fmt: skip
    return profiled(
        batches, steps=config.log.profile if world.is_main else 0, net=trainer.net, folder=out / "profile",
        compiled=config.compile, log=run_log.info,
    )  # fmt: skip


def score(trainer: Trainer, split: Split, *, probe: bool = False) -> Scores:
    """Return the evaluations of the weights and of their average on the validation images.

    Args:
        probe: if embeddings are learned, also score a linear probe of them.
    """
    config, world = trainer.config, trainer.world
    trainer.state.align_()
    if trainer.embeds:
        nets = (trainer.state.whole(net) for net in (trainer.net, trainer.ema.module))
        weights, average = (score_embeddings(net, split, trainer, probe=probe) for net in nets)
        return weights, average

    def evaluated(net: nn.Module) -> Evaluation:
        return evaluate(
            trainer.state.whole(net), split.val, preprocessing=preprocessing(config),
            workers=0 if len(split.val) < IN_PROCESS else config.input.workers, device=trainer.device,
            rank=world.rank, world_size=world.size, gather=world.gather, sigmoid=uses_sigmoid(config.objective),
        )  # fmt: skip

    return evaluated(trainer.net), evaluated(trainer.ema.module)
