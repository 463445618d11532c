"""Resolve a config once, at the start of a run: which network, which weights, and what every "auto" means for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normfree.data.audit import (
    AuditReport,
    BadImage,
    audit,
    duplicates,
    range_notes,
    require_clean,
    without_bad,
)
from normfree.data.record import SampleRecord, records_of
from normfree.data.source import Split, as_streamed, require_class_names
from normfree.data.sources.open import image_limits
from normfree.data.substituting import Substituting
from normfree.data.transforms.normalize import channel_statistics, height_and_width
from normfree.models.variant import Variant
from normfree.models.variants import variant_of
from normfree.preprocessing import SQUASH_UP_TO, Preprocessing
from normfree.pretrained import TRAINING_FIELDS, Description, describe
from normfree.suggest import problem
from normfree.training.choices import OPTIMIZERS, parse_choice, uses_sigmoid
from normfree.training.config import Config, OptimConfig, channels_of, size_of
from normfree.training.console import RunLog
from normfree.training.objective_rules import check_objective
from normfree.training.privacy import check_privacy
from normfree.training.run_data import open_config_data
from normfree.weights.hub import PREFIX, repository_of


@dataclass(frozen=True)
class Resolved:
    """A config without any "auto" that depends on the network, and what it was resolved with.

    Attributes:
        config: the config; `precision` and `input.micro_batch`, which depend on the device, may still be "auto".
        variant: the network.
        weights: description of the model folder in `config.weights`; None for random weights, a file of weights, or a
            run that continues.
    """

    config: Config
    variant: Variant
    weights: Description | None

    def keeps_head(self, classes: tuple[str, ...]) -> bool:
        """Return True if a run on `classes` starts with the classifier of the weights: it has the same classes in the
        same order. A file of weights names no classes; it must fit as a whole."""
        return self.weights is None or self.weights.classes == classes


def resolve(config: Config, *, starts: bool = True) -> Resolved:
    """Replace every "auto" by what it means for this network and these weights.

    Args:
        config: as the user gave it, or as a run folder holds it.
        starts: whether the weights are needed. False for a run that continues: its weights may be gone.

    Raises:
        ValueError: the model is unknown, it is "auto" without weights, or the network of the weights has other fields
            than its variant.
    """
    if config.model == "auto" and not config.weights:
        given = "model is 'auto', the network of --weights, and no weights are given"
        raise ValueError(problem(given, fix="add --weights FOLDER, or --model NAME"))
    weights = config.weights
    if weights == "download":
        weights = PREFIX + repository_of(config.model)
    repeats, batch_size = config.augment.repeats, config.input.batch_size
    if batch_size % repeats:
        given = f"augment.repeats={repeats} with input.batch_size={batch_size}"
        fix = f"--input.batch_size {batch_size // repeats * repeats}"
        if repeats > batch_size:
            fix = f"--augment.repeats {batch_size}"
        raise ValueError(problem(given, allowed="a divisor of the batch size", fix=fix))
    if uses_sigmoid(config.objective) and config.optim.class_balance:
        given = f"optim.class_balance={config.optim.class_balance:g} with objective={config.objective!r}"
        raise ValueError(problem(given, allowed="0, or objective='classify'", fix="--optim.class_balance 0"))
    net = config.net
    auto = "auto" in (config.model, config.input.image_size, net.activation, net.alpha)
    is_folder = bool(weights) and not Path(weights).is_file()
    found = describe(weights) if is_folder and (starts or auto) else None
    model = found.variant if found is not None and config.model == "auto" else config.model
    if model == "auto":
        found = describe(weights)  # a file may carry its description
        model = found.variant
    variant = variant_of(model)
    check_objective(config, norm=variant.norm)
    train_size: int | str = variant.train_size
    test_size: int | str = variant.test_size
    if found is not None and auto and is_folder:
        variant = _as_trained(variant, found, weights)
        train_size, test_size = _sizes(variant, found.preprocessing.image_size)
    size = train_size if config.input.image_size == "auto" else config.input.image_size
    fallback = test_size if config.input.image_size == "auto" else _without_channels(size)
    eval_size = fallback if config.input.eval_size == "auto" else config.input.eval_size
    if found is not None and found.arguments.get("in_channels", 3) != 3 and config.input.image_size == "auto":
        size = "x".join(map(str, (found.arguments["in_channels"], *height_and_width(size_of(size)))))
    crop = config.input.eval_crop
    if crop == "auto":
        small = max(height_and_width(size_of(eval_size))) <= SQUASH_UP_TO
        crop = "squash" if small else "resize_crop_32"
    fields = {k: getattr(variant, k) if v == "auto" else v for k, v in net.model_dump().items()}
    rates = {name: fields[name] for name in ("drop_rate", "stochdepth_rate")}
    check_privacy(config, norm=variant.norm, **rates)
    augment = config.augment
    if augment.randaugment == "auto":
        augment = augment.model_copy(update={"randaugment": variant.randaugment})
    inputs = {"image_size": size, "eval_size": eval_size, "eval_crop": crop}
    updates = {
        "optim": _with_rates(config.optim, config.input.batch_size),
        "model": model,
        "weights": weights,
        "net": net.model_copy(update=fields),
        "input": config.input.model_copy(update=inputs),
        "augment": augment,
    }
    return Resolved(config.model_copy(update=updates), variant, found if is_folder and starts else None)


def _with_rates(optim: OptimConfig, batch_size: int) -> OptimConfig:
    """Return the config of the optimizer with numbers for its learning rate and weight decay."""
    name = parse_choice(optim.optimizer, OPTIMIZERS).name
    lr, decay = optim.lr, optim.weight_decay
    if lr == "auto":
        # sgd: [B] section 4.3. The others: 4e-3 at batch size 4096 (ConvNeXt, arXiv 2201.03545, with AdamW), scaled by
        # the square root of the batch size, as timm scales adaptive optimizers. Muon's steps have the size of AdamW's.
        lr = 0.1 * batch_size / 256 if name == "sgd" else 1e-3 * math.sqrt(batch_size / 256)
    if decay == "auto":  # sgd: [B] section 4.3; decoupled decay: ConvNeXt
        decay = 2e-5 if name in ("sgd", "adam", "rmsprop") else 0.05
    return optim.model_copy(update={"lr": lr, "weight_decay": decay})


def _as_trained(variant: Variant, found: Description, weights: str) -> Variant:
    """Return the variant with the fields in which the network of `found` computes something else.

    A config can express two of them; fields that concern training alone are the new run's own.

    Raises:
        ValueError: there are others.
    """
    changed = {k: v for k, v in found.arguments.items() if k not in TRAINING_FIELDS | {"in_channels"}}
    other = sorted(changed.keys() - {"activation", "alpha"})
    if other:
        fields = ", ".join(other)
        given = (
            f"the network of {weights} differs from {found.variant} in {fields}, which a run cannot change"
        )
        fix = "train it in Python, with from_pretrained and an optimizer"
        raise ValueError(problem(given, allowed="differences in activation and alpha", fix=fix))
    return variant.with_overrides(changed)


def _without_channels(size: int | str) -> int | str:
    """Return a value of `input.image_size` as one of `input.eval_size`."""
    side = size_of(size)
    return side if isinstance(side, int) else "{}x{}".format(*side)


def _sizes(variant: Variant, tested: int | tuple[int, int]) -> tuple[int | str, int | str]:
    """Return training and test size in px for weights that were tested at `tested` px.

    The test size stays; the training size has the variant's ratio of the two, in multiples of 32 px as in [B] table 1,
    or is the same for images that are not square.
    """
    if not isinstance(tested, int):
        return "{}x{}".format(*tested), "{}x{}".format(*tested)
    if tested == variant.test_size or variant.train_size == variant.test_size:
        return tested * variant.train_size // variant.test_size, tested
    return max(32, 32 * round(tested * variant.train_size / variant.test_size / 32)), tested


def preprocessing(config: Config) -> Preprocessing:
    """Return how a resolved config preprocesses validation images."""
    mean, std = channel_statistics(channels_of(config.input.image_size))
    return Preprocessing(
        size_of(config.input.eval_size), crop=config.input.eval_crop, mean=mean, std=std,
        pixel_range=image_limits(config.data).pixel_range,
    )  # fmt: skip


@dataclass(frozen=True)
class OpenedData:
    """The data of a run.

    Attributes:
        split: the parts. Images that cannot be read are left out or, in training, replaced.
        whole: the same with all images.
        bad: the images that cannot be read.
        records: the samples for samples.csv.
    """

    split: Split
    whole: Split
    bad: tuple[BadImage, ...] = ()
    records: tuple[SampleRecord, ...] = ()


def open_data(
    config: Config,
    log: RunLog,
    *,
    check: bool = True,
    bad: Sequence[BadImage] = (),
    list_file: Path | None = None,
) -> OpenedData:
    """Open the data; with `check`, audit all parts of folders of images: each file is decoded once.

    Args:
        config: the config of the run.
        log: where notes on the data are printed.
        check: False in the processes that do not audit.
        bad: images that the auditing process left out.
        list_file: file for the names of bad images if they are too many for a message.

    Raises:
        ValueError: the data cannot be used; files that cannot be read are named.
    """
    split = open_config_data(config)
    require_class_names(split.classes, source=config.data)
    reports: dict[str, AuditReport] = {}
    notes: tuple[str, ...] = ()
    if check and split.files:
        reports = {part: audit(source) for part, source in split.parts().items()}
        bad = tuple(image for report in reports.values() for image in report.bad)
        if config.input.bad_images == "stop":
            require_clean(*reports.values(), list_file=list_file)
        notes = (*duplicates(split, reports), *range_notes(reports))
    digests = {part: report.digests for part, report in reports.items()}
    records = tuple(records_of(split, digests)) if check else ()
    whole, split = split, without_bad(split, bad)
    if config.input.bad_images == "skip" and as_streamed(split.train) is None:
        # The number of training images stays, so that a run may continue after more of them have gone bad.
        split = replace(split, train=Substituting(whole.train))
    for note in (*split.notes, *notes):
        log.info(note)
    return OpenedData(split, whole, tuple(bad), records)
