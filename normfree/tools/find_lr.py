"""Learning-rate range test: the learning rate grows in each step until the loss rises (Smith 2015, arXiv 1506.01186,
section 3.3).

The loss is smoothed by a moving median, which is robust to noise and to a sudden divergence. The edge is the last
learning rate at which the smoothed loss is still below the middle between its start and its minimum. We suggest a third
of it: each rate is used for one step only, so a rate above the limit of stability is noticed late. With momentum 0.9 on
noisy quadratics the edge is 1.2 to 2.9 times that limit (tests/tools/test_find_lr.py). AGC delays a divergence because
it bounds each update by the weights; the loss still rises, which is all that the rule needs.
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
from normfree.files import atomic_write_text
from normfree.suggest import problem
from normfree.training import class_weights
from normfree.training.choices import is_private
from normfree.training.config import Config
from normfree.training.console import RunLog
from normfree.training.default_network import with_network
from normfree.training.distributed.world import start_world
from normfree.training.divergence import DivergedError
from normfree.training.loading import loading
from normfree.training.resolve import open_data, resolve
from normfree.training.trainer import Trainer

LOW, HIGH, PER_DECADE = 1e-5, 10.0, 20
STEPS = 1 + PER_DECADE * round(math.log10(HIGH / LOW))  # 121
# Steps on each side of a step in the moving median, which has 9 steps in total.
REACH = 4
# Fraction of the decrease of the loss that is left at the edge.
KEPT = 0.5
# The edge divided by the suggested learning rate.
SAFETY = 3.0
# The test ends if the loss is this many times the loss at the start.
EXPLODED = 4.0
# The loss has decreased if the difference is this many standard deviations of the losses of single steps.
CLEAR = 2.0


@dataclass(frozen=True)
class RangeTest:
    """Result of a range test.

    Attributes:
        rates: Learning rate of each step.
        losses: Mean loss of each step, before the update.
        smoothed: Moving median of `losses`.
        edge: Last learning rate at which half of the decrease of the smoothed loss is left.
        suggested: A third of `edge`, or None if the loss never decreased by more than its noise.
        bounded: Whether the loss rose again; otherwise `edge` is the highest learning rate tried.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    edge: float
    suggested: float | None
    bounded: bool


def sweep_rates(*, low: float = LOW, high: float = HIGH, steps: int = STEPS) -> list[float]:
    """Return `steps` learning rates from `low` to `high` in geometric progression."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def range_test(step: Callable[[float], float], rates: Sequence[float]) -> RangeTest:
    """Call `step(rate)`, which returns the loss before its update, for each of the rising `rates`; return the result.

    The test ends early if the loss diverges: it is not finite, `step` raises `DivergedError`, or the median of the last
    five losses is above 4 times that of the first five.

    Raises:
        ValueError: The loss diverges within the first five rates.
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
            problem(
                f"the loss diverges at a learning rate of {rates[len(losses)]:.2g}, at the start of the range test",
                fix="check the weights and the data, which are more likely the cause than the learning rate",
            )
        )
    return judge(rates, losses)


def judge(rates: Sequence[float], losses: Sequence[float]) -> RangeTest:
    """Apply the rule described above to the losses of a test; there may be fewer losses than rates."""
    smoothed = [median(losses[max(0, i - REACH) : i + REACH + 1]) for i in range(len(losses))]
    start, lowest = smoothed[0], min(smoothed)
    level = start - KEPT * (start - lowest)
    last = max(i for i, value in enumerate(smoothed) if value <= level)
    quiet = range(max(REACH, len(losses) // 3))  # low rates change little, so differences are noise
    noise = math.sqrt(fmean((losses[i] - smoothed[i]) ** 2 for i in quiet))
    fell = start - lowest > max(CLEAR * noise, 1e-9 * abs(start))
    return RangeTest(
        rates=tuple(rates[: len(losses)]), losses=tuple(losses), smoothed=tuple(smoothed), edge=rates[last],
        suggested=rates[last] / SAFETY if fell else None, bounded=last + 1 < len(losses),
    )  # fmt: skip


def find_lr(config: Config, out: str | Path, *, console: Console | None = None) -> RangeTest:
    """Do the range test with the initial weights and the batches of `config`; the result depends only on the config.

    Prints a table and writes find_lr.json and find_lr.png to the folder `out`. No run is started.

    Raises:
        ValueError: The data or the model cannot be used, or there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            problem(
                "--find-lr in several processes",
                allowed="one process; the learning rate depends on the batch size, not on the number of processes",
                fix="run it without torchrun, with a smaller --input.micro_batch if it needs too much memory",
            )
        )
    if is_private(config.optim.clip):
        given = (
            "--find-lr for a private run, whose rate would then depend on the training images without noise"
        )
        fix = "choose the rate on public images, with --optim.clip off, or by private runs of their own"
        raise ValueError(problem(given, fix=fix))
    run_log = RunLog(console or Console())
    with start_world(config.device) as world:
        resolved = resolve(with_network(_constant(config), world, run_log))
    config = resolved.config
    split = open_data(config, run_log).split
    trainer = Trainer(
        resolved, num_classes=len(split.classes), samples=len(split.train), weights=config.weights,
        head=resolved.keeps_head(tuple(split.classes)),
        class_weights=class_weights.class_weights(split.train, config.optim.class_balance),
    )  # fmt: skip
    run_log.info(f"precision {trainer.config.precision}")
    batches = train_batches(
        split.train, trainer.transform, batch_size=config.input.batch_size, seed=config.seed, num_steps=STEPS,
        workers=loading(config).workers, pairs=trainer.pairs, pin_memory=trainer.device.type == "cuda",
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
    atomic_write_text(folder / "find_lr.json", json.dumps(asdict(result), indent=1) + "\n")
    for line in lines(result):
        run_log.info(line)
    try:
        title = f"{config.model} on {config.data}, {config.input.batch_size} images per step"
        draw(result, folder / "find_lr.png", title=title)
        run_log.info(f"plot: {folder / 'find_lr.png'}")
    except ModuleNotFoundError as error:
        run_log.info(f"no plot: {error}")
    return result


def _constant(config: Config) -> Config:
    """Return the config with a constant learning rate, the length of the test and one process."""
    optim = config.optim.model_copy(update={"schedule": "constant", "warmup": "0st"})
    return config.model_copy(update={"length": f"{STEPS}st", "parallel": "replicated", "optim": optim})


def lines(result: RangeTest) -> list[str]:
    """Return the lines to print: learning rate and smoothed loss twice per decade, and the suggestion."""
    table = ["     lr    loss"]
    for i in range(0, len(result.rates), PER_DECADE // 2):
        table.append(f"{result.rates[i]:7.1e}  {result.smoothed[i]:6.3f}")
    if result.suggested is None:
        advice = (
            "no suggestion: the loss did not decrease by more than its noise. Larger batches have less noise."
        )
    elif result.bounded:
        advice = (
            f"suggested: --optim.lr {result.suggested:.2g}, a third of {result.edge:.2g}, the last learning rate with "
            "at least half of the decrease of the loss"
        )
    else:
        advice = (
            f"suggested: --optim.lr {result.suggested:.2g} or more: a third of {result.edge:.2g}, the highest learning "
            "rate tried, at which the loss had not risen again"
        )
    return [*table, advice]


def draw(result: RangeTest, path: Path, *, title: str) -> None:
    """Plot the losses against the learning rates, with the edge and the suggestion, and save it as PNG.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message names the package to install.
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
