"""Learning-rate range test: the rate grows from step to step, and the loss shows how far it may grow (Smith 2015,
arXiv 1506.01186, section 3.3).

The rule. The loss is smoothed by a moving median, which neither noise nor an explosion moves. The edge is the last rate
at which it still keeps half of its fall. Suggested is a third of that: the test takes each rate for one step only, so
that a rate above the limit of stability shows late, with momentum 0.9 on noisy quadratics at 1.2 to 2.9 times the limit
(tests/train/test_find_lr.py). AGC hides a divergence longer, since it bounds every update by the weights; the loss
rises all the same, and the rule asks for no more than that.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from rich.console import Console

from normfree.data.loader import train_batches
from normfree.diagnose.plotting import BLUE, GRAY, GREEN, ORANGE, new_figure
from normfree.training import class_weights
from normfree.training.config import Config
from normfree.training.console import RunLog
from normfree.training.resolve import open_data, resolve
from normfree.training.trainer import DivergedError, Trainer

LOW, HIGH, PER_DECADE = 1e-5, 10.0, 20
STEPS = 1 + PER_DECADE * round(math.log10(HIGH / LOW))  # 121
REACH = 4  # steps on each side in a median: 9 in all
KEPT = 0.5  # of the fall, at the edge
SAFETY = 3.0
EXPLODED = 4.0  # times the loss at the start
CLEAR = 2.0  # a fall is one from this many deviations of single losses


@dataclass(frozen=True)
class RangeTest:
    """`losses[i]` is the mean loss of step i, before its update with `rates[i]`; `smoothed` its moving median.

    edge: the last rate at which the loss keeps half of its fall. suggested: a third of it; None: the loss never fell
    clearly. bounded: whether the loss rose again; else the edge is the highest rate tried.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    edge: float
    suggested: float | None
    bounded: bool


def sweep_rates(*, low: float = LOW, high: float = HIGH, steps: int = STEPS) -> list[float]:
    """`steps` rates from `low` to `high`, each the same multiple of the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def range_test(step: Callable[[float], float], rates: Sequence[float]) -> RangeTest:
    """Calls `step(rate)`, which returns the loss before its update, for rising rates until the loss explodes: not
    finite, `DivergedError`, or the median of five above 4 times that at the start.

    Raises:
        ValueError: it explodes within the first five rates.
    """
    losses: list[float] = []
    for rate in rates:
        try:
            loss = step(rate)
        except DivergedError:
            break
        if not math.isfinite(loss):
            break
        losses.append(loss)
        if median(losses[-5:]) > EXPLODED * median(losses[:5]):
            break
    if len(losses) <= 5:
        raise ValueError(
            f"the loss explodes at a rate of {rates[len(losses)]:.2g}, where the range test has hardly begun. "
            "The weights or the data are at fault rather than the rate: look at both."
        )
    return judge(rates, losses)


def judge(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """The rule of this page, for a sweep that is done; there may be fewer losses than rates."""
    smoothed = [median(losses[max(0, i - REACH) : i + REACH + 1]) for i in range(len(losses))]
    start, lowest = smoothed[0], min(smoothed)
    level = start - KEPT * (start - lowest)
    last = max(i for i, value in enumerate(smoothed) if value <= level)
    quiet = range(max(REACH, len(losses) // 3))  # too low a rate to change much: what moves there is noise
    noise = math.sqrt(fmean((losses[i] - smoothed[i]) ** 2 for i in quiet))
    fell = start - lowest > max(CLEAR * noise, 1e-9 * abs(start))
    return RangeTest(
        rates=tuple(rates[: len(losses)]), losses=tuple(losses), smoothed=tuple(smoothed), edge=rates[last],
        suggested=rates[last] / SAFETY if fell else None, bounded=last + 1 < len(losses),
    )  # fmt: skip


def find_lr(config: Config, out: str | Path, *, console: Console | None = None) -> RangeTest:
    """The range test for a run of `config`, from its first weights, over its own batches; prints a table and writes
    find_lr.json and find_lr.png into `out`. A function of the config and its seed; no run begins.

    Raises:
        ValueError: data or model cannot be used, or there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--find-lr takes one process. A rate holds for a batch size, not for a number of processes: "
                         "run it without torchrun, with --input.micro_batch to fit the memory.")  # fmt: skip
    run_log = RunLog(console or Console())
    resolved = resolve(_constant(config))
    config = resolved.config
    split = open_data(config, run_log)
    trainer = Trainer(
        resolved, num_classes=len(split.classes), samples=len(split.train), weights=config.weights,
        head=resolved.keeps_head(tuple(split.classes)),
        class_weights=class_weights.class_weights(split.train, config.optim.class_balance),
    )  # fmt: skip
    batches = train_batches(
        split.train, trainer.transform, batch_size=config.input.batch_size, seed=config.seed, num_steps=STEPS,
        workers=config.input.workers, pairs=trainer.pairs, pin_memory=trainer.device.type == "cuda",
        repeats=config.augment.repeats,
    )  # fmt: skip

    def step(rate: float) -> float:
        trainer.lr = rate
        batch = next(batches)
        return float(trainer.step(batch, batch.step)[0])

    try:
        result = range_test(step, sweep_rates())
    finally:
        batches.close()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "find_lr.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    for line in lines(result):
        run_log.info(line)
    try:
        title = f"{config.model} on {config.data}, {config.input.batch_size} images a step"
        draw(result, folder / "find_lr.png", title=title)
        run_log.info(f"picture: {folder / 'find_lr.png'}")
    except ModuleNotFoundError as error:
        run_log.info(f"no picture: {error}")
    return result


def _constant(config: Config) -> Config:
    """The config with the rate as it is given, for as many steps as the test takes, in one process."""
    optim = config.optim.model_copy(update={"schedule": "constant", "warmup": "0st"})
    return config.model_copy(update={"length": f"{STEPS}st", "parallel": "replicated", "optim": optim})


def lines(result: RangeTest) -> list[str]:
    """What the command prints: twice a decade the rate and the smoothed loss, then the suggestion and why."""
    table = ["     lr    loss"]
    for i in range(0, len(result.rates), PER_DECADE // 2):
        table.append(f"{result.rates[i]:7.1e}  {result.smoothed[i]:6.3f}")
    if result.suggested is None:
        said = "the loss fell no further than its noise: no rate can be suggested. Larger batches have less noise."
    elif result.bounded:
        said = f"suggested: --optim.lr {result.suggested:.2g}, a third of {result.edge:.2g}, the last rate at which " \
               "the loss kept half of its fall"  # fmt: skip
    else:
        said = f"the loss had not risen again at {result.edge:.2g}, the highest rate tried; --optim.lr " \
               f"{result.suggested:.2g} is a third of that, and more may do"  # fmt: skip
    return [*table, said]


def draw(result: RangeTest, path: Path, *, title: str) -> None:
    """The losses over the rates, with the edge and the suggestion, as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    start, lowest = result.smoothed[0], min(result.smoothed)
    margin = 0.6 * max(start - lowest, 0.02 * abs(start))
    axis.plot(result.rates, result.losses, color=GRAY, lw=0.8, alpha=0.6, label="loss of a batch")
    axis.plot(result.rates, result.smoothed, color=BLUE, lw=2, label=f"moving median of {2 * REACH + 1}")
    axis.axvline(result.edge, color=ORANGE, ls="--", label=f"edge {result.edge:.2g}")
    if result.suggested is not None:
        axis.axvline(result.suggested, color=GREEN, lw=2, label=f"suggested {result.suggested:.2g}")
    axis.set_xscale("log")
    axis.set_xlim(LOW if result.rates[0] >= LOW else result.rates[0], max(HIGH, result.rates[-1]))
    axis.set_ylim(lowest - margin, start + 2 * margin)
    axis.set_xlabel("learning rate, one step each")
    axis.set_ylabel("training loss, nats")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper left")
    axis.set_title(title, loc="left", fontsize=10, parse_math=False)
    figure.savefig(path, dpi=130)
