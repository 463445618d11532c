"""The config of a run: a strict, frozen tree of at most 50 keys, one file and one set of flags.

    recipe (a function, a TOML file, or a run's own config) -> overrides, left to right -> checked -> written

Every error is collected and reported once, each with the nearest key or the values allowed. This file imports
neither torch nor any room, so that `normfree train --help` answers at once. TOML has no null, hence no `None`:
"auto" takes a value from the model's row, "" and 0 mean none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Auto = Literal["auto"]


class ConfigError(ValueError):
    """One or more keys or values of a config are wrong; the message lists all of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class ConfigSection(BaseModel):
    """Base of all sections: strict types, finite numbers, no unknown keys, no change after creation."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


_LENGTH = re.compile(r"(\d+(?:\.\d+)?)(ep|st)")


def _check_length(value: str) -> str:
    if not _LENGTH.fullmatch(value):
        raise ValueError("expected a number of epochs or steps, for example '90ep' or '5000st'")
    return value


def _check_size(value: int | str) -> int | str:
    if isinstance(value, int) and value < 1:
        raise ValueError("expected 1 pixel or more, or 'auto'")
    return value


def _check_count(value: int | str) -> int | str:
    if isinstance(value, int) and value < 0:
        raise ValueError("expected 0 or more images, or 'auto'")
    return value


def _check_rate(value: float | str) -> float | str:
    if isinstance(value, float) and not 0.0 <= value < 1.0:
        raise ValueError("expected a number from 0 to below 1, or 'auto'")
    return value


LOGGERS = ("tensorboard", "wandb")


def loggers_in(to: str) -> tuple[str, ...]:
    """The loggers that a value of `log.to` names, each once, in their own order."""
    named = [word.strip() for word in to.split(",")]
    return tuple(logger for logger in LOGGERS if logger in named)


def _check_loggers(value: str) -> str:
    for word in value.split(",") if value else ():
        if word.strip() not in LOGGERS:
            near = difflib.get_close_matches(word.strip(), LOGGERS, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"expected tensorboard, wandb, or both with a comma between them. Nearest to {word.strip()!r}: {near}"
            )
    return value


def steps_of(length: str, *, samples: int, batch_size: int) -> int:
    """A length in optimizer steps: "90ep" of `samples` images at `batch_size` a step, or "5000st". Rounded."""
    match = _LENGTH.fullmatch(length)
    assert match, length
    number = float(match[1])
    return round(number * samples / batch_size) if match[2] == "ep" else round(number)


class NetConfig(ConfigSection):
    """Changes to the model's row."""

    activation: str = "auto"
    """Activation by the reference's name, for example silu; auto: that of the weights, else the row's."""
    drop_rate: Auto | float = "auto"
    """Dropout before the classifier; auto: the row's."""
    stochdepth_rate: Auto | float = "auto"
    """Stochastic depth of the last block; auto: the row's."""
    skip_gain: Auto | float = "auto"
    """Initial value of each branch's learnable scalar; auto: the row's, 0 in the published ones."""
    alpha: Auto | float = "auto"
    """Scale of each residual branch; auto: that of the weights, else the row's."""

    _rates = field_validator("drop_rate", "stochdepth_rate")(_check_rate)


class InputConfig(ConfigSection):
    """From files to batches."""

    image_size: Auto | int = "auto"
    """Side of the training images in pixels; auto: the row's train_size, or in its ratio to the weights' test size."""
    eval_size: Auto | int = "auto"
    """Side of the evaluation images; auto: the weights', else the row's test_size, or image_size when that is given."""
    eval_crop: Literal["auto", "resize_crop_32", "crop_resize", "squash"] = "auto"
    """Preprocessing for evaluation; auto: squash up to 96 px, resize_crop_32 above."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimizer step, over all processes."""
    micro_batch: Auto | int = 0
    """Images per forward and backward pass, to save memory; 0: the whole batch at once; auto: as many as fit."""
    workers: int = Field(default=1, ge=0)
    """Processes that read images; 0 reads in the training process. Batches do not depend on it."""
    val_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of a folder without a val/ of its own that is kept for validation."""

    _sizes = field_validator("image_size", "eval_size")(_check_size)
    _count = field_validator("micro_batch")(_check_count)


class AugmentConfig(ConfigSection):
    """What happens to training images."""

    crop_min: float = Field(default=0.08, gt=0.0, le=1.0)
    """Smallest share of the area that a random crop keeps."""
    repeats: int = Field(default=1, ge=1)
    """How often an image stands in its batch, each time augmented anew."""
    flip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability of a mirror image."""
    randaugment: str = "off"
    """off, auto (the row's), trivial, <layers>x<magnitude> of DeepMind's (4x5), or tv:2x9, torchvision's."""
    mixup: float = Field(default=0.0, ge=0.0)
    """Beta parameter of mixup; 0: none. With cutmix too, each gets half of the batch."""
    cutmix: float = Field(default=0.0, ge=0.0)
    """Beta parameter of cutmix; 0: none, 1: uniform."""
    mix_with: Literal["batch", "fresh"] = "batch"
    """Partners: others of the batch, or images read for it alone and augmented after mixing, as the papers did."""
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Probability mass spread over all classes, after mixing."""


class OptimConfig(ConfigSection):
    """SGD with momentum, clipping and averaging."""

    lr: float = Field(default=0.1, gt=0.0)
    """Peak learning rate, as applied (the papers: 0.1 * batch_size / 256)."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Momentum, in Nesterov's form."""
    weight_decay: float = Field(default=2e-5, ge=0.0)
    """Coupled L2 decay; gains, biases and skip gains are exempt."""
    clip: Literal["agc", "norm", "value", "off"] = "agc"
    """Adaptive gradient clipping, or clipping by global norm or by value for comparison."""
    clipping: float = Field(default=0.01, gt=0.0)
    """AGC: largest ratio of a unit's gradient norm to its weight norm. norm, value: the bound itself."""
    clipping_eps: float = Field(default=1e-3, gt=0.0)
    """AGC: floor of the weight norm, so that zeros can move."""
    unclipped: str = "head.weight"
    """AGC: parameters that are not clipped, as patterns of names with commas between them; nothing: all are."""
    class_balance: float = Field(default=0.0, ge=0.0, le=1.0)
    """Weight of an image in the loss: 1 / (images of its class) to this power; 0: all alike, 1: all classes alike."""
    warmup: str = "5ep"
    """Linear warm-up from 0."""
    schedule: Literal["warmup_cosine", "warmup_linear", "constant"] = "warmup_cosine"
    """Course of the learning rate."""
    final_lr: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where the schedule ends, as a share of the peak."""
    sam_rho: float = Field(default=0.0, ge=0.0)
    """Sharpness-aware minimization: length of the step uphill at which the gradient is taken; 0: none."""
    ema_decay: float = Field(default=0.99999, ge=0.0, le=1.0)
    """Decay of the weight average, reached by the ramp (1 + t) / (10 + t)."""

    _length = field_validator("warmup")(_check_length)


class LogConfig(ConfigSection):
    """What is written, and when."""

    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    evaluate_every: str = "1ep"
    """Between evaluations."""
    checkpoint_every: str = "5ep"
    """Between checkpoints; one is always written at the end and when the run is stopped."""
    keep: int = Field(default=2, ge=2)
    """Newest checkpoints to keep, besides the best."""
    to: str = ""
    """Loggers beside metrics.jsonl: tensorboard, wandb, or both with a comma between them."""
    profile: int = Field(default=0, ge=0)
    """Steps to record with PyTorch's profiler, after the first few; 0: none."""

    _length = field_validator("evaluate_every", "checkpoint_every")(_check_length)
    _loggers = field_validator("to")(_check_loggers)


class Config(ConfigSection):
    """Everything that decides a run."""

    data: str = "emoji"
    """A folder of images, emoji, synthetic, cifar10:root=data,download=no, or another word of docs/data.md."""
    model: str = "nf_resnet_nano"
    """A name from `normfree list`; auto: the network of weights."""
    weights: str = ""
    """A model or run folder to start from, with a new classifier if it knows other classes; empty: random weights."""
    length: str = "60ep"
    """How long to train: epochs (90ep) or steps (5000st)."""
    patience: int = Field(default=0, ge=0)
    """Evaluations without a better averaged score after which the run ends, its best weights kept; 0: to the end."""
    seed: int = Field(default=0, ge=0)
    """Decides initial weights, order, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto: the first GPU, else the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of activations; weights, momentum and average are always float32."""
    parallel: Literal["replicated", "sharded", "exact"] = "replicated"
    """Several processes: each with the whole network, with a part of it (FSDP2), or with bits that do not depend on
    their number."""
    compile: bool = False
    """Compile stem and blocks with torch.compile, one graph for each shape."""
    net: NetConfig = NetConfig()
    input: InputConfig = InputConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()

    _length = field_validator("length")(_check_length)


# --- keys --------------------------------------------------------------------------------------------


# --- in and out --------------------------------------------------------------------------------------
