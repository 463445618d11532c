"""normfree.training.resolve."""

from __future__ import annotations

from pathlib import Path

from normfree.data.audit import audit, require_clean
from normfree.data.source import Split
from normfree.data.sources.open import open_source
from normfree.models.variant import Variant
from normfree.models.variants import variant_of
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TRAINING_FIELDS, Description, describe
from normfree.training.config import Config
from normfree.training.console import RunLog
from normfree.weights.hub import PREFIX, repository_of

SQUASH_UP_TO = 96  # px; a margin of 32 px, as at ImageNet sizes, would cut a small picture's content away


def with_model(config: Config) -> Config:
    """The config with the network of its weights in place of model "auto", and an address in place of "download".

    Raises:
        ValueError: "auto" without weights, weights that do not say, or none that are published.
    """
    if config.model == "auto":
        if not config.weights:
            raise ValueError(
                "model='auto' is the network of --weights, and none are given. Say --weights FOLDER, or --model NAME."
            )
        config = config.model_copy(update={"model": describe(config.weights).row})
    if config.weights == "download":
        config = config.model_copy(update={"weights": PREFIX + repository_of(config.model)})
    return config


def resolve(config: Config) -> Config:
    """The config with every "auto" replaced by what it means for this model.

    Raises:
        ValueError: the model is unknown, "auto" without weights to tell it, or weights of a network with other fields
            than its row.
    """
    config = with_model(config)
    row = variant_of(config.model)
    train_size, test_size = row.train_size, row.test_size
    if "auto" in (config.input.image_size, config.net.activation, config.net.alpha) and _is_folder(
        config.weights
    ):
        found = describe(config.weights)
        row = _as_trained(row, found, config.weights)
        train_size, test_size = _sizes(row, found.preprocessing.image_size)
    size = train_size if config.input.image_size == "auto" else config.input.image_size
    fallback = test_size if config.input.image_size == "auto" else size
    eval_size = fallback if config.input.eval_size == "auto" else config.input.eval_size
    crop = config.input.eval_crop
    if crop == "auto":
        crop = "squash" if eval_size <= SQUASH_UP_TO else "resize_crop_32"
    net = {k: getattr(row, k) if v == "auto" else v for k, v in config.net.model_dump().items()}
    augment = config.augment
    if augment.randaugment == "auto":
        augment = augment.model_copy(update={"randaugment": row.randaugment})
    inputs = {"image_size": size, "eval_size": eval_size, "eval_crop": crop}
    return config.model_copy(
        update={
            "net": config.net.model_copy(update=net),
            "input": config.input.model_copy(update=inputs),
            "augment": augment,
        }
    )


def _is_folder(weights: str) -> bool:
    return bool(weights) and not Path(weights).is_file()


def _as_trained(row: Variant, found: Description, weights: str) -> Variant:
    """The row with the fields in which the network of `found` computes something else. A config can say two of them;
    whatever concerns training alone is the new run's own.

    Raises:
        ValueError: there are others.
    """
    changed = {k: v for k, v in found.arguments.items() if k not in TRAINING_FIELDS | {"in_channels"}}
    other = sorted(changed.keys() - {"activation", "alpha"})
    if other:
        raise ValueError(
            f"the network of {weights} differs from its row {found.row} in {', '.join(other)}, which a run cannot "
            "change. Allowed: activation, alpha. Train it in Python: from_pretrained, then an optimizer of your own."
        )
    return row.with_overrides(changed)


def _sizes(row: Variant, seen: int) -> tuple[int, int]:
    """Training and test size for weights that were tested at `seen` px: that size again, and the row's ratio of the
    two, in whole 32 px as in [B] table 1."""
    if seen == row.test_size or row.train_size == row.test_size:
        return seen * row.train_size // row.test_size, seen
    return max(32, 32 * round(seen * row.train_size / row.test_size / 32)), seen


def keeps_head(weights: str, classes: tuple[str, ...]) -> bool:
    """Whether a run on `classes` starts with the classifier of `weights` too: if that knows the same ones, in the same
    order. A file of weights does not say; it must fit as a whole."""
    return not _is_folder(weights) or describe(weights).classes == classes


def preprocessing(config: Config) -> Preprocessing:
    """How a resolved config looks at validation images."""
    return Preprocessing(image_size=int(config.input.eval_size), crop=config.input.eval_crop)


def open_data(config: Config, voice: RunLog, *, check: bool = True) -> Split:
    """The data, opened, and with `check` audited if it is a folder of the user's: each file is decoded once.

    Raises:
        ValueError: it cannot be used; files that cannot be read are named.
    """
    variant_of(with_model(config).model)  # a misspelt model is reported before any data is read
    split = open_source(
        config.data, val_fraction=config.input.val_fraction, seed=config.seed
    )  # fmt: skip
    if check and split.files:
        for source in (split.train, split.val):
            require_clean(audit(source))
    for note in split.notes:
        voice.say(note)
    return split
