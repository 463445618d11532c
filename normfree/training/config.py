"""The config of a run: a strict, frozen tree of at most 50 keys, the same for TOML files and command-line flags.

    recipe (a function, a TOML file or the config of a run) -> overrides, left to right -> checked -> written

The docstring under each field is its text in `normfree train --help`. All errors are collected and reported at once,
each with the nearest key or the allowed values (`config_io.py`). This file does not import PyTorch, so that `--help`
answers at once. TOML has no null, so no value is None: "auto" takes the value from the model's variant (or from the
weights), "" and 0 mean none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from normfree.suggest import did_you_mean
from normfree.training.choices import (
    BODIES,
    CLIPS,
    DIVERGENCES,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    Choices,
    parse_choice,
)
from normfree.training.config_values import VAL_FRACTION, check_val_fraction, check_workers

Auto = Literal["auto"]


class ConfigError(ValueError):
    """Error in one or more keys or values of a config; the message lists all of them, one per line."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class ConfigSection(BaseModel):
    """Base class of all sections: strict types, finite numbers, no unknown keys, immutable."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for field in cls.model_fields.values():  # `--help` would keep the line breaks of the source
            field.description = " ".join((field.description or "").split())


# --- validators: a ValueError holds the allowed values, which config_io.py reports together with the given one ----

_LENGTH = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ep|st)")
# auto, HEIGHTxWIDTH or CHANNELSxHEIGHTxWIDTH. Images are decoded to RGB; networks see that or gray.
_SIZE = re.compile(r"auto|(?:([13])x)?([1-9]\d{0,5})x([1-9]\d{0,5})")
LOGGERS = ("tensorboard", "wandb")
_PROFILE = re.compile(r"profile=([1-9]\d{0,5})")
# A config may come from others. This is far above what machines can take, and far below what stops one.
MAX_BATCH = 1_000_000
MAX_EVERY = 1_000_000_000  # steps


def _check_length(value: str) -> str:
    if not _LENGTH.fullmatch(value):
        raise ValueError("a number of epochs or steps, for example '90ep' or '5000st'")
    return value


def _check_size(value: int | str) -> int | str:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        value = int(value)  # from the command line
    if (isinstance(value, int) and value < 1) or (isinstance(value, str) and not _SIZE.fullmatch(value)):
        raise ValueError(
            "1 pixel or more, 128x313 (height x width), 1x128x313 (with 1 or 3 channels), or 'auto'"
        )
    return value


def _check_eval_size(value: int | str) -> int | str:
    value = _check_size(value)
    if isinstance(value, str) and value.count("x") == 2:
        raise ValueError("a size without channels, which input.image_size has: 224, 128x313, or 'auto'")
    return value


def _check_count(value: int | str) -> int | str:
    if isinstance(value, int) and value < 0:
        raise ValueError("0 or more images, or 'auto'")
    return value


def _check_rate(value: float | str) -> float | str:
    if isinstance(value, float) and not 0.0 <= value < 1.0:
        raise ValueError("a number from 0 to below 1, or 'auto'")
    return value


def _check_loggers(value: str) -> str:
    for name in value.split(",") if value else ():
        if name.strip() not in LOGGERS and not _PROFILE.fullmatch(name.strip()):
            hint = did_you_mean(name.strip(), (*LOGGERS, "profile=20"))
            raise ValueError(f"tensorboard, wandb, profile=STEPS, or several separated by commas.{hint}")
    return value


def _check_peak(value: float | str) -> float | str:
    if isinstance(value, float) and not value > 0.0:
        raise ValueError("a number above 0, or 'auto'")
    return value


def _check_decay(value: float | str) -> float | str:
    if isinstance(value, float) and not value >= 0.0:
        raise ValueError("0 or more, or 'auto'")
    return value


def _check_divergence(value: str) -> str:
    options = parse_choice(value, DIVERGENCES).options
    if options and not (0.0 < options["lr"] < 1.0 and options["times"] > 0):
        raise ValueError("lr above 0 and below 1, and times of 1 or more")
    return value


def _chooses(choices: Choices) -> Callable[[str], str]:
    """Return a validator of a value that names one of `choices`."""

    def check(value: str) -> str:
        parse_choice(value, choices)
        return value

    return check


def loggers_in(to: str) -> tuple[str, ...]:
    """Return the loggers named in a value of `log.to`, each once, in the order of LOGGERS.

    >>> loggers_in("wandb, tensorboard")
    ('tensorboard', 'wandb')
    """
    named = [name.strip() for name in to.split(",")]
    return tuple(logger for logger in LOGGERS if logger in named)


def profile_steps(to: str) -> int:
    """Return the number of steps to record in a value of `log.to`; 0 if it asks for no profile.

    >>> profile_steps("tensorboard,profile=20"), profile_steps("")
    (20, 0)
    """
    matches = [match for name in to.split(",") if (match := _PROFILE.fullmatch(name.strip()))]
    return int(matches[-1][1]) if matches else 0


def size_of(size: int | str) -> int | tuple[int, int]:
    """Return the side of square images, or height and width, of a value of `input.image_size` that is not "auto".

    >>> size_of(224), size_of("1x224x224"), size_of("128x313")
    (224, 224, (128, 313))
    """
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    assert match, size
    height, width = int(match[2]), int(match[3])
    return height if height == width else (height, width)


def channels_of(size: int | str) -> int:
    """Return the number of channels in a value of `input.image_size`: 3 unless it states another number.

    >>> channels_of(224), channels_of("1x128x313")
    (3, 1)
    """
    match = None if isinstance(size, int) else _SIZE.fullmatch(size)
    return int(match[1] or 3) if match and match[2] else 3


def steps_of(length: str, *, samples: int, batch_size: int) -> int:
    """Return a length in optimizer steps, rounded to the nearest integer.

    Args:
        length: "90ep" (epochs) or "5000st" (steps).
        samples: Images per epoch.
        batch_size: Images per step.

    >>> steps_of("10ep", samples=50, batch_size=32)
    16
    """
    match = _LENGTH.fullmatch(length)
    assert match, length
    number = float(match[1])
    return round(number * samples / batch_size) if match[2] == "ep" else round(number)


# --- the schema -----------------------------------------------------------------------------------------


class NetConfig(ConfigSection):
    """Changes to the network's variant."""

    activation: str = "auto"
    """Name of the activation, for example silu. auto: that of the weights, else the variant's."""
    drop_rate: Auto | float = "auto"
    """Dropout rate before the classifier. auto: the variant's."""
    stochdepth_rate: Auto | float = "auto"
    """Stochastic depth rate of the last block; earlier blocks use proportionally less. auto: the variant's."""
    skip_gain: Auto | float = "auto"
    """Initial value of the learnable gain of each residual branch. auto: the variant's (0 in the published
    networks)."""
    alpha: Auto | float = "auto"
    """Scale of each residual branch. auto: that of the weights, else the variant's."""

    _rates = field_validator("drop_rate", "stochdepth_rate")(_check_rate)


class InputConfig(ConfigSection):
    """Reading images and forming batches."""

    image_size: int | str = "auto"
    """Size of training images in pixels: a side, 128x313 (height x width), or 1x128x313 with channels, 3 (RGB) or 1
    (gray). auto: the variant's train_size, scaled to match the evaluation size of the weights if they were trained at
    another."""
    eval_size: int | str = "auto"
    """Size of evaluation images in pixels: a side, or height x width. auto: image_size if that is given, else the
    evaluation size of the weights, else the variant's test_size."""
    eval_crop: Literal["auto", "resize_crop_32", "crop_resize", "squash", "letterbox"] = "auto"
    """Resizing and cropping for evaluation. auto: squash up to 96 pixels, resize_crop_32 above. letterbox: the whole
    image with gray bars; training images get the bars too, before the random crop."""
    batch_size: int = Field(default=64, ge=1, le=MAX_BATCH)
    """Images per optimizer step, summed over all processes."""
    micro_batch: Auto | int = 0
    """Images per forward and backward pass; smaller values need less memory. 0: the whole batch at once. auto: as
    many as fit in memory."""
    workers: int | str = 1
    """Number of processes that load images; 0 loads them in the training process. It does not change the batches. auto:
    4, or as many as there are cores if these are fewer. 4:deadline=600 also ends the run, saved, when no batch arrives
    for 600 seconds, which is the default."""
    val_fraction: float | str = VAL_FRACTION
    """Fraction of each class that is held out for validation if the data have no part for it. The validation images
    choose the best step. 0: all images are trained on, and the scores are those of some of them. fold:2/5: the second
    of five folds of all images except the test part, for cross-validation; --folds 5 trains all of them."""
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Fraction of each class that is held out for the test if the data have no part for it. The test images are scored
    once, at the end; the model card reports that score. 0: only a test part of the data."""
    bad_images: Literal["stop", "skip"] = "stop"
    """What happens to images that cannot be read. stop: the run ends, before the first step if it can, and names all.
    skip: the run goes on without them; the log and the model card name them."""

    _size = field_validator("image_size")(_check_size)
    _eval_size = field_validator("eval_size")(_check_eval_size)
    _fraction = field_validator("val_fraction")(check_val_fraction)
    _workers = field_validator("workers")(check_workers)
    _count = field_validator("micro_batch")(_check_count)


class AugmentConfig(ConfigSection):
    """Augmentation of training images."""

    crop_min: float = Field(default=0.08, gt=0.0, le=1.0)
    """Smallest fraction of the image area that a random crop keeps."""
    repeats: int = Field(default=1, ge=1)
    """How many times each image occurs in a batch, each time with another augmentation."""
    flip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability of a horizontal flip."""
    orientation: Literal["upright", "vertical_flip", "quarter_turns"] = "upright"
    """For images without an up and down. vertical_flip: half of the images are also flipped vertically.
    quarter_turns: and turned by a random multiple of 90 degrees."""
    randaugment: str = "off"
    """RandAugment: off, auto (the variant's), trivial (TrivialAugment), LAYERSxMAGNITUDE as in DeepMind's code, for
    example 4x5, tv:LAYERSxMAGNITUDE as in torchvision, for example tv:2x9, or simclr:STRENGTH, the changes of color of
    SimCLR, for example simclr:0.5."""
    mixup: float = Field(default=0.0, ge=0.0)
    """Parameter of the Beta distribution of mixup; 0: no mixup. With cutmix too, each is used for half of the batch."""
    cutmix: float = Field(default=0.0, ge=0.0)
    """Parameter of the Beta distribution of cutmix; 0: no cutmix, 1: uniform."""
    mix_with: Literal["batch", "fresh"] = "batch"
    """Which images are mixed in. batch: other images of the batch. fresh: additional images, augmented after mixing, as
    in the papers."""
    label_smoothing: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Probability mass that is spread evenly over all classes, after mixing."""


class OptimConfig(ConfigSection):
    """Optimizer, gradient clipping and weight averaging."""

    optimizer: str = "sgd"
    """sgd:momentum=0.9,nesterov=yes, or one of PyTorch's: adamw:betas=0.9/0.999,eps=1e-08, adam, nadam, radam, rmsprop,
    muon. Another optimizer than the recipe's sets lr and weight_decay to auto unless they are given."""
    lr: Auto | float = 0.1
    """Peak learning rate, used as given. auto: 0.1 * batch_size / 256 for sgd, as in the papers, and
    0.001 * sqrt(batch_size / 256) for the others."""
    weight_decay: Auto | float = 2e-5
    """Weight decay, not applied to gains, biases and skip gains. sgd, adam and rmsprop add it to the gradient, the
    others shrink the weights. auto: 2e-5, and 0.05 for those that shrink."""
    body: str = "train"
    """Training of everything except the classifier. train:lr=0.1 is a factor on the learning rate,
    train:layer_decay=0.75 one for each layer below the classifier, train:freeze=stem,stages.0 names parts that are not
    trained. freeze: only the classifier is trained."""
    clip: str = "agc"
    """Gradient clipping: agc (adaptive gradient clipping), norm (global norm), value (each element) or off.
    agc:eps=0.001 is the lower bound of the weight norm, agc:unclipped=head.weight names the parameters that are not
    clipped, as patterns separated by commas. private:epsilon=8,delta=1e-05,accountant=rdp clips the gradient of each
    example and adds noise (differential privacy; accountant rdp or prv)."""
    clipping: float = Field(default=0.01, gt=0.0)
    """agc: largest allowed ratio of a unit's gradient norm to its weight norm. norm, value, private: largest allowed
    norm, absolute value, or norm of the gradient of an example."""
    class_balance: float = Field(default=0.0, ge=0.0, le=1.0)
    """Exponent p of the loss weights: an image of a class with n images has a weight proportional to 1 / n^p.
    0: all images count equally. 1: all classes count equally."""
    warmup: str = "5ep"
    """Length of the linear warm-up from a learning rate of 0, in epochs (5ep) or steps (1000st)."""
    schedule: str = "warmup_cosine"
    """Learning rate after the warm-up: warmup_cosine, warmup_linear or constant. warmup_cosine:final=0.01 ends at that
    fraction of lr instead of 0."""
    sam_rho: float = Field(default=0.0, ge=0.0)
    """Radius of sharpness-aware minimization (SAM); 0: no SAM."""
    ema_decay: float = Field(default=0.99999, ge=0.0, le=1.0)
    """Decay of the exponential moving average of the weights. In step t it is at most (1 + t) / (10 + t)."""

    _length = field_validator("warmup")(_check_length)
    _peak = field_validator("lr")(_check_peak)
    _decay = field_validator("weight_decay")(_check_decay)
    _optimizer = field_validator("optimizer")(_chooses(OPTIMIZERS))
    _body = field_validator("body")(_chooses(BODIES))
    _clip = field_validator("clip")(_chooses(CLIPS))
    _schedule = field_validator("schedule")(_chooses(SCHEDULES))


class LogConfig(ConfigSection):
    """Logging, evaluation and checkpoints."""

    every: int = Field(default=10, ge=1, le=MAX_EVERY)
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: str = "1ep"
    """Epochs (1ep) or steps (500st) between evaluations."""
    checkpoint_every: str = "5ep"
    """Epochs (5ep) or steps (500st) between checkpoints. One is also written at the end and when the run is stopped."""
    to: str = ""
    """What is written in addition to metrics.jsonl, separated by commas: tensorboard, wandb, and profile=20, which
    records 20 steps with PyTorch's profiler, after a few steps of warm-up. Empty: nothing."""

    _length = field_validator("evaluate_every", "checkpoint_every")(_check_length)
    _loggers = field_validator("to")(_check_loggers)


class Config(ConfigSection):
    """All settings that determine a run: strict types, no unknown keys, immutable.

    Sections are `input`, `net`, `augment`, `optim` and `log`; `normfree train --help` describes every key.

    Raises:
        pydantic.ValidationError: a key or a value is not allowed.

    Examples:
        >>> config = normfree.Config(data="photos/", model="nf_resnet50", length="90ep")
        >>> config.optim.clip, config.input.batch_size
        ('agc', 64)
    """

    data: str = "emoji"
    """Training data: a folder with one subfolder of images per class, emoji, synthetic,
    cifar10:root=data,download=no, or another source described in docs/data.md."""
    model: str = "nf_resnet_nano"
    """Name of a variant, see `normfree list`. auto: the variant of the weights. fit: the same, and without weights one
    that this machine can train."""
    weights: str = ""
    """Model or run folder to initialize from; the classifier is replaced if the classes differ. Empty: random
    weights."""
    objective: str = "classify"
    """What is learned. classify: one class for each image, by softmax cross entropy. bce: each class is present or
    absent, by binary cross entropy, bce:threshold=0.0,sum=no. simclr:temperature=0.2,dim=128: two views of each image
    have similar embeddings, without labels. triplet:margin=0.2,mining=hard and pairwise:margin=1.0: images of one class
    have similar embeddings."""
    length: str = "60ep"
    """Length of training in epochs (90ep) or steps (5000st)."""
    patience: int = Field(default=0, ge=0)
    """Early stopping: end the run after this many evaluations in which the averaged weights do not improve, and keep
    the best ones. 0: never."""
    on_divergence: str = "stop"
    """What happens when a gradient is not finite. stop: the run ends. rollback:lr=0.3,times=3: it goes back to its last
    checkpoint and on with its learning rate multiplied by 0.3, at most 3 times."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of initial weights, sample order, augmentation and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps. auto: the first GPU if there is one, else the CPU."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of activations in training: float32, bfloat16, or auto, which is bfloat16 on a device that computes
    faster in it (measured at the start), else float32. A run keeps what it began with. Weights, momentum, averaged
    weights, scores, predictions and exports are always float32."""
    parallel: Literal["replicated", "sharded", "exact"] = "replicated"
    """How several processes share the model: replicated (DDP), sharded (FSDP2), or exact (replicated, with
    bit-identical results for any number of processes)."""
    compile: bool = False
    """Compile the stem and the blocks with torch.compile, one graph for each input shape."""
    net: NetConfig = NetConfig()
    input: InputConfig = InputConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    log: LogConfig = LogConfig()

    _length = field_validator("length")(_check_length)
    _objective = field_validator("objective")(_chooses(OBJECTIVES))
    _divergence = field_validator("on_divergence")(_check_divergence)
