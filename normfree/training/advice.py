"""What a run prints before its first step about settings that work, but hardly as they were meant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from normfree.pretrained import Description
from normfree.suggest import number_of
from normfree.training.config import Config, channels_of, steps_of
from normfree.training.loading import cores, loading

# Judgement: below this number of steps, weights and their average have hardly left their initial values.
FEW_STEPS = 50
# Judgement: networks of more parameters on fewer images overfit from random weights, and profit from trained ones.
MANY_PARAMETERS, FEW_IMAGES = 10_000_000, 10_000


@dataclass(frozen=True)
class RunSize:
    """How large a run is: training images, optimizer steps, and parameters of the network."""

    samples: int
    steps: int
    parameters: int


def advice(config: Config, size: RunSize) -> list[str]:
    """Return a sentence for each setting of a resolved config that does not do what it seems to."""
    found = []
    batch_size, samples, steps = config.input.batch_size, size.samples, size.steps
    repeats = config.augment.repeats
    if batch_size > samples * repeats:
        # The loss of simclr knows pairs of views, not images; the losses with labels compare classes.
        views = ", and simclr pushes copies of an image apart" * config.objective.startswith("simclr")
        found.append(
            f"a batch of {batch_size} is more than the {samples} training images: every step takes some of them "
            f"more than once{views}; --input.batch_size {max(1, samples // 2) * repeats} would not"
        )
    exact = steps_of(config.length, samples=samples, batch_size=batch_size)
    if exact == 0:
        found.append(
            f"a length of {config.length} is less than half a step of {batch_size} images: it is one step"
        )
    elif steps < FEW_STEPS:
        fixed = str(config.length).endswith("st")  # a number of steps, which does not depend on the batch
        change = "a longer --length" if fixed else "a longer --length or a smaller --input.batch_size"
        found.append(
            f"a length of {config.length} gives only {steps} x {batch_size} images; {change} gives more steps"
        )
    warmup = steps_of(config.optim.warmup, samples=samples, batch_size=batch_size)
    if warmup >= steps > 1:
        found.append(
            f"the warm-up of {config.optim.warmup} takes all {steps} steps, so that the learning rate never reaches "
            "its peak; --optim.warmup is shorter"
        )
    found += _patience(config, size)
    workers, usable = loading(config).workers, cores()
    if workers > usable:
        found.append(
            f"{workers} processes load images on {number_of(usable, 'core')}; --input.workers {usable} is as fast"
        )
    if not config.weights and size.parameters >= MANY_PARAMETERS and samples < FEW_IMAGES:
        found.append(
            f"{size.parameters / 1e6:.0f} M parameters start from random weights on {samples:,} images; trained "
            f"weights usually do better: normfree train finetune --data {config.data} --weights FOLDER"
        )
    return found


def _patience(config: Config, size: RunSize) -> list[str]:
    """Return a sentence if early stopping cannot end the run before its last evaluation."""
    every = max(
        1, steps_of(config.log.evaluate_every, samples=size.samples, batch_size=config.input.batch_size)
    )
    evaluations = math.ceil(size.steps / every)
    # The first evaluation is always the best so far, so `patience` others must come before the last one.
    if not config.patience or config.patience <= evaluations - 2:
        return []
    times = "once" if evaluations == 1 else f"{evaluations} times"
    return [
        f"patience {config.patience} cannot end the run early, because it is evaluated {times}; the best step is kept "
        "all the same"
    ]


def weights_notes(weights: Description, config: Config) -> list[str]:
    """Return what a new run prints about the weights that it starts from: of which step those of an unfinished run
    are, and that they were trained on another number of channels."""
    notes = [weights.note] if weights.note else []
    given, wanted = weights.arguments.get("in_channels", 3), channels_of(config.input.image_size)
    if given != wanted:
        notes.append(
            f"the first convolution of {config.weights} is adapted from {given} to {wanted} channels"
        )
    return notes
