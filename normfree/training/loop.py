"""The training loop, kept short enough to hold in your head.

    data -> trainer -> checkpoint, if any -> steps, with metrics, scores and checkpoints in between -> model folder

There are no callbacks: to change the procedure, copy this file; to monitor a run, read metrics.jsonl. One step is in
`trainer.py`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from normfree.data.source import Source, Split
from normfree.data.supervision import LoadingStopped, never
from normfree.inference import NotFiniteLogitsError, evaluate
from normfree.scores import Evaluation
from normfree.training import checkpoint, run_folder
from normfree.training.advice import RunSize, advice, weights_notes
from normfree.training.choices import learns_embeddings, uses_sigmoid
from normfree.training.class_weights import class_weights
from normfree.training.config import Config, steps_of
from normfree.training.console import ProgressLine, RunLog
from normfree.training.default_network import with_network
from normfree.training.distributed.exact import same_kernels
from normfree.training.distributed.world import World, start_world
from normfree.training.divergence import DivergedError, Rollbacks
from normfree.training.early_stopping import Progress
from normfree.training.embedding_scores import recalls, score_embeddings, score_name, write_body
from normfree.training.identity import identity_of
from normfree.training.loading import loading
from normfree.training.loggers import Logs, open_logs, require
from normfree.training.metrics import Meter, NullMetricsWriter
from normfree.training.multilabel_run import check_labels, deciding_score, logged_scores, scores_text
from normfree.training.precision import with_precision
from normfree.training.privacy import check_private_data, open_secret, spent_so_far, state_of
from normfree.training.resolve import OpenedData, Resolved, open_data, preprocessing, resolve
from normfree.training.resume import Checkpoints, restore_newest
from normfree.training.run_batches import FAILED, fetch, leave, run_batches, tell_replaced
from normfree.training.secret import KEY_FILE
from normfree.training.stop import Stop, stop_signals, stop_with_launcher
from normfree.training.trainer import Trainer

# Validation sets below this number of images are evaluated faster without starting worker processes.
IN_PROCESS = 2000
Scores = tuple[Evaluation, Evaluation]  # of the weights, and of their average


class _Agreed(Exception):
    """All processes know that an evaluation is stopped."""


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
        DivergedError: a gradient was not finite, and `on_divergence` does not go back, or no longer.
        StoppedBySignal: SIGTERM, SIGINT, SIGHUP or SIGUSR1 arrived; a checkpoint was written first.

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
    with stop_signals() as stop, start_world(config.device) as world:
        stop_with_launcher()
        run_log = RunLog(console or Console() if world.is_main else Console(quiet=True))
        config = with_network(config, world, run_log)
        rollbacks = Rollbacks(config.on_divergence)
        while True:
            try:
                return _run(config, out, world, run_log, stop, rollbacks=rollbacks, start=start)
            except DivergedError as error:
                run_log.info(rollbacks.again(error))


def _run(
    config: Config,
    out: Path,
    world: World,
    run_log: RunLog,
    stop: Stop,
    *,
    rollbacks: Rollbacks,
    start: float,
) -> run_folder.TrainResult:
    """Start or continue the run in `out` and train it to its end; see `train`."""
    with contextlib.ExitStack() as stack:
        # How training starts, in order of precedence:
        # 1. Resume: `out` has checkpoints, of a run that was stopped, was killed, or is finished. The newest sound
        #    checkpoint decides everything; `config.weights` is not read. If none is sound, the run is refused.
        # 2. Start again: `out` has a config but no checkpoint yet. Same as 3 or 4, if the config is the same.
        # 3. Start from `config.weights`, with their classifier if it has the same classes, else with a new one.
        # 4. Start from scratch, with random weights that depend on `config.seed`.
        starts = not (out / "checkpoints").exists()
        config = with_precision(config, out / "config.toml", world=world, run_log=run_log)
        with world.all_or_none():
            resolved = resolve(config, starts=starts)
            if world.is_main:  # downloads and audits the data before the other processes open it
                run_folder.check_folder(out)
                require(config.log.to)
                data = open_data(resolved.config, run_log, list_file=run_folder.list_file(out))
                check_labels(data.split, config)
        bad = world.all_gather(data.bad if world.is_main else ())[0]
        with world.all_or_none():
            if not world.is_main:
                data = open_data(resolved.config, run_log, check=False, bad=bad)
            split = data.split
            if resolved.config.parallel == "exact":
                stack.enter_context(same_kernels())
            trainer = _make_trainer(resolved, split, world=world, run_log=run_log, starts=starts)
        metrics: Logs | NullMetricsWriter = NullMetricsWriter()
        saved, at = None, Progress()
        identity: dict[str, Any] = {}
        with world.all_or_none():  # nothing is written before data and model are known to work
            if world.is_main:
                identity = identity_of(trainer.config, data.whole)
                saved, at, metrics = _open_run(trainer, data, out, run_log, stack, identity=identity)
            else:
                run_log.attach_file(Path(os.devnull))
        at = world.all_gather(at)[0]
        rollbacks.resume(at.rollbacks)
        at.rollbacks, trainer.lr_factor = rollbacks.count, rollbacks.lr_factor
        trainer.state.restore_(saved)
        meter, saved = Meter(saved.state.get("meter") if saved else None), None
        checkpoints = Checkpoints(trainer, out / "checkpoints", run_log, identity=identity, metrics=metrics)
        scores = _steps(
            trainer, split, out, run_log, metrics, at=at, meter=meter, checkpoints=checkpoints, stop=stop
        )
        return _finish(trainer, split, out, run_log, at=at, scores=scores, start=start)


def _open_run(
    trainer: Trainer,
    data: OpenedData,
    out: Path,
    run_log: RunLog,
    stack: contextlib.ExitStack,
    *,
    identity: dict[str, Any],
) -> tuple[checkpoint.Checkpoint | None, Progress, Logs | NullMetricsWriter]:
    """Lock the run folder, find the checkpoint to continue from, and open the files that the run appends to."""
    stack.enter_context(run_folder.locked(out))
    run_log.attach_file(out / "log.txt")
    run_folder.check_samples(out, data, trainer.config)
    saved, best = restore_newest(trainer, out, run_log, identity=identity)
    state = saved.state if saved else {}
    at = Progress(
        saved.step if saved else 0, best, bool(state.get("evaluated", True)), state.get("rollbacks", 0)
    )
    if trainer.privacy is not None:
        ended = at.step == trainer.total_steps or (at.evaluated and best.plateau(trainer.config.patience))
        trainer.keep_private(*open_secret(trainer.privacy, out, state or None, ended=ended))
        run_log.info(trainer.privacy.text())
    run_folder.begin(out, trainer.config, data, trainer.net, trainer.total_steps, run_log)
    if at.step == trainer.total_steps and at.evaluated:
        return saved, at, NullMetricsWriter()
    parameters = sum(p.numel() for p in trainer.net.parameters())
    for line in advice(trainer.config, RunSize(trainer.samples, trainer.total_steps, parameters)):
        run_log.info(line)
    expected = state.get("metrics")
    logs = open_logs(out, trainer.config, step=at.step, run_log=run_log, expected=expected)
    return saved, at, stack.enter_context(contextlib.closing(logs))


def _make_trainer(
    resolved: Resolved, split: Split, *, world: World, run_log: RunLog, starts: bool
) -> Trainer:
    """Return the trainer with random weights, or with `config.weights` if the run starts from them."""
    config = resolved.config
    weights = config.weights if starts else ""
    if starts and resolved.weights is not None:
        for note in weights_notes(resolved.weights, config):
            run_log.info(note)
    head = resolved.keeps_head(tuple(split.classes))
    if not head and not learns_embeddings(config.objective):
        run_log.info(f"a new classifier for {len(split.classes)} classes on the network of {weights}")
    trainer = Trainer(
        resolved, num_classes=len(split.classes), samples=len(split.train), weights=weights, head=head,
        class_weights=class_weights(split.train, config.optim.class_balance), world=world,
    )  # fmt: skip
    if trainer.privacy is not None:
        check_private_data(split)
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
    at: Progress,
    meter: Meter,
    checkpoints: Checkpoints,
    stop: Stop,
) -> Scores | None:
    """Take the remaining steps, until the last one or a plateau, and update `at`.

    Returns:
        The scores after the last step, None if no step remained.

    Raises:
        StoppedBySignal: a signal arrived; a checkpoint was written.
        ValueError: an image or a worker failed; a checkpoint was written.
    """
    config, total, world = trainer.config, trainer.total_steps, trainer.world
    batch_size, samples = config.input.batch_size, len(split.train)
    unsaved, scores, replaced = False, None, set(split.left_out)

    def due(length: str) -> bool:
        every = max(1, steps_of(length, samples=samples, batch_size=batch_size))
        return at.step == total or at.step % every == 0

    with (
        contextlib.closing(run_batches(trainer, split, out, run_log, stop, start_step=at.step)) as batches,
        ProgressLine(run_log, step=at.step, total_steps=total) as line,
        stop.deferred(),
    ):
        while True:
            # 1. Evaluate if it is due, fetch the next batch, and agree with the other processes whether to go on.
            improved = False
            if not at.evaluated and (scores := score(trainer, split, stop)) is not None:
                _record(at, scores, trainer, metrics, run_log, samples=samples)
                unsaved, improved = True, at.best.step == at.step
            ended = at.evaluated and (at.step == total or at.best.plateau(config.patience))
            batch, failure = (None, None) if ended else fetch(batches)
            reason = 0 if ended else world.largest(FAILED if failure else stop.number)
            # 2. Save.
            if unsaved and (improved or reason or ended or due(config.log.checkpoint_every)
                            or checkpoints.retry(at.step)):  # fmt: skip
                state = {"best": at.best.state(), "evaluated": at.evaluated, "seed": config.seed,
                         "total_steps": total, "meter": meter.state(), "rollbacks": at.rollbacks,
                         **state_of(trainer.privacy, trainer.secret)}  # fmt: skip
                required = bool(reason or ended)
                unsaved = not checkpoints.save(at.step, state, best=at.best, required=required)
            if ended:
                return scores
            if reason:
                leave(at.step, reason, failure, world, run_log)
            # 3. Take a step.
            assert batch is not None
            tell_replaced(batch, replaced, run_log)
            loss, correct, report = trainer.step(batch, at.step)
            at.step, unsaved, scores = at.step + 1, True, None
            at.evaluated = not due(config.log.evaluate_every)
            if trainer.privacy is None:  # else the loss of training images must not be known
                meter.add(loss, correct, batch_size)
            if due(f"{config.log.every}st"):
                values = {**meter.read(), "clipped": float(report)} if trainer.privacy is None else {}
                ratios = {"ratios": trainer.ratios} if trainer.ratios else {}
                metrics.write(step=at.step, epoch=round(at.step * batch_size / samples, 4), **values,
                              lr=trainer.current_lr, grad_norm=float(report.grad_norm), **ratios)  # fmt: skip
                line.update(at.step, **values)
            else:
                line.advance(at.step)


def _record(
    at: Progress,
    scores: Scores,
    trainer: Trainer,
    metrics: Logs | NullMetricsWriter,
    run_log: RunLog,
    *,
    samples: int,
) -> None:
    """Write and print the scores after the current step, and update the best one."""
    weights, average = scores
    epoch = round(at.step * trainer.config.input.batch_size / samples, 4)
    spent = spent_so_far(trainer.privacy, at.step, run_log.info)
    metrics.write(step=at.step, epoch=epoch, **spent, top1=weights.top1, top5=weights.top5, val_loss=weights.loss,
                  ema_top1=average.top1, ema_top5=average.top5, ema_val_loss=average.loss,
                  **recalls(weights, average), **logged_scores(weights, average))  # fmt: skip
    run_log.info(f"epoch {epoch:5.1f}  {score_name(weights)} {weights.top1:.2f} %  averaged {average.top1:.2f} %  "
                 f"loss {weights.loss:.3f}")  # fmt: skip
    if text := scores_text(average):
        run_log.info(f"             averaged: {text}")
    score = deciding_score(average, trainer.prepare.class_weights)
    at.best, at.evaluated = at.best.after(score, average.loss, at.step), True


def _finish(
    trainer: Trainer,
    split: Split,
    out: Path,
    run_log: RunLog,
    *,
    at: Progress,
    scores: Scores | None,
    start: float,
) -> run_folder.TrainResult:
    """Return to the best weights if the run has `patience`, score them if necessary, and write the model folder."""
    world, patience = trainer.world, trainer.config.patience
    if at.step < trainer.total_steps:
        run_log.info(f"no better score in {patience} evaluations: the best one, {at.best.score:.2f} %, "
                     f"was after step {at.best.step}")  # fmt: skip
    scored_step = at.best.step if patience else at.step
    if scored_step != at.step:
        saved = None
        if world.is_main:
            try:
                saved = checkpoint.read(out / "checkpoints" / checkpoint.name_of(scored_step))
            except ValueError as error:  # the disk refused it, or has damaged it since
                run_log.info(f"{error} The model is that of the last step.")
        if world.any(saved is not None):
            trainer.state.restore_(saved)
            scores = None
        else:
            scored_step = at.step
    scores = score(trainer, split, probe=True) if trainer.embeds else scores or score(trainer, split)
    assert scores is not None
    weights, average = scores
    seconds = time.monotonic() - start
    test = score_test(trainer, split)
    privacy = None if trainer.privacy is None else trainer.privacy.report(at.step)
    result = run_folder.TrainResult(
        out, at.step, scored_step, weights, average, seconds, test, at.rollbacks, privacy
    )
    averaged = trainer.state.whole(trainer.ema.module)
    with world.all_or_none():
        if world.is_main and trainer.embeds:
            write_body(trainer.config, split, averaged, result, run_log)
        elif world.is_main:
            run_folder.finish(trainer.config, split, averaged, result, run_log)
        if world.is_main:  # no step will need it again
            (out / KEY_FILE).unlink(missing_ok=True)
    return result


def score(trainer: Trainer, split: Split, stop: Stop | None = None, *, probe: bool = False) -> Scores | None:
    """Return the evaluations of the weights and of their average on the validation images.

    The result is None if a signal arrived in one of the processes before the end.

    Args:
        stop: hears of signals; None: nothing stops the evaluation.
        probe: if embeddings are learned, also score a linear probe of them.
    """
    world = trainer.world
    trainer.state.align_()
    stopped = never if stop is None else stop.requested
    if trainer.embeds:
        nets = (trainer.state.whole(net) for net in (trainer.net, trainer.ema.module))
        first, second = (score_embeddings(net, split, trainer, probe=probe) for net in nets)
        return None if world.any(stopped()) else (first, second)

    def gather(rows: Tensor) -> Tensor:
        if world.any(stopped()):
            raise _Agreed
        return world.gather(rows)

    def evaluated(net: nn.Module) -> Evaluation | None:
        try:
            return _evaluated(trainer, net, split.val, gather=gather, stopped=stopped)
        except _Agreed:
            return None
        except LoadingStopped:  # this process knows; tell the others, which wait in `gather`
            world.any(True)
            return None

    weights = evaluated(trainer.net)
    average = None if weights is None else evaluated(trainer.ema.module)
    return None if weights is None or average is None else (weights, average)


def score_test(trainer: Trainer, split: Split) -> Evaluation | None:
    """Return the evaluation of the averaged weights on the test images, None if there are none."""
    if split.test is None:
        return None
    trainer.state.align_()
    if trainer.embeds:
        net = trainer.state.whole(trainer.ema.module)
        return score_embeddings(net, split, trainer, source=split.test, probe=True)
    return _evaluated(trainer, trainer.ema.module, split.test, gather=trainer.world.gather, stopped=never)


def _evaluated(
    trainer: Trainer,
    net: nn.Module,
    source: Source,
    *,
    gather: Callable[[Tensor], Tensor],
    stopped: Callable[[], bool],
) -> Evaluation:
    """Return the evaluation of the run's network, or of its average, on labeled images.

    Raises:
        DivergedError: logits are not finite.
    """
    config, world = trainer.config, trainer.world
    workers, deadline = loading(config)
    try:
        return evaluate(
            trainer.state.whole(net), source, preprocessing=preprocessing(config),
            workers=0 if len(source) < IN_PROCESS else workers, device=trainer.device, rank=world.rank,
            world_size=world.size, gather=gather, sigmoid=uses_sigmoid(config.objective), stopped=stopped,
            deadline=deadline,
        )  # fmt: skip
    except NotFiniteLogitsError as error:
        raise DivergedError(str(error)) from None
