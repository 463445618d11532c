"""`open_source`: from the name or path of a data set to a training and a validation source."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from normfree.data.source import Source, Split
from normfree.data.sources.folders import DEFAULT_LIMITS, ImageLimits
from normfree.data.sources.listed import TABLES
from normfree.data.sources.torchvision_sets import TORCHVISION_SETS, open_torchvision
from normfree.data.spec import is_yes, parse_spec
from normfree.data.subset import check_fractions, halve_validation, hash_split, summary
from normfree.data.transforms.decode import FULL_RANGE
from normfree.suggest import closest, problem

DEFAULT_ROOT = Path("data")  # folder of the data sets of torchvision, below the working directory
NAMES = ("emoji", *TORCHVISION_SETS, "synthetic")
_DECODING = ("range", "max_pixels")
SCHEMES = {  # scheme -> its options
    "folder": _DECODING,
    "csv": ("image", "label", "separator", "root", "val", "test", *_DECODING),
    "shards": ("val", "test"),
    "packed": ("val", "test"),
    "nested": (),
    "hf": ("split", "val", "test", "image", "label", "subset", "revision", "download", "streaming", "buffer"),
}
_ALLOWED = f"a folder of images, or one of {', '.join([*NAMES, *(f'{scheme}:...' for scheme in SCHEMES)])}"


def open_source(
    data: str | os.PathLike[str],
    *,
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 0,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    pipes: bool = False,
    labels: bool = True,
) -> Split:
    """Open a data set by name or by path, split into training, validation and, if there is one, a test part.

    `data` is one of the following (docs/data.md has examples):

    - "emoji" (the default of the demo), "synthetic" (with options: "synthetic:classes=4,size=32,train=256,val=64");
    - "cifar10", "cifar100", "fashion_mnist" (with options: "cifar10:root=FOLDER,download=yes");
    - the path of a folder: class folders, train/, val/ and test/ of class folders, an export of Roboflow, ImageNet as
      published, or tar shards. Write "./emoji" for a folder that has the name of a data set, and
      "folder:PATH,range=4095,max_pixels=300000000" to state white in 16-bit images or the largest size;
    - the path of a table (.csv, .tsv) or list (.txt) of images: "csv:FILE[,image=COLUMN,label=COLUMN,root=FOLDER,...]";
    - "shards:PATTERN[,val=PATTERN]": WebDataset; the prefix is optional if the pattern ends in .tar, and a PATTERN may
      be "pipe:COMMAND";
    - "packed:FILE[,val=FILE]": files written by `pack`;
    - "nested:FOLDER": images with several classes, the names of all folders above them;
    - "hf:FOLDER_OR_NAME[,split=...,image=...,label=...,val=...,download=yes]": Hugging Face datasets.

    Args:
        data: Name or path.
        val_fraction: Fraction of each class for validation, for data without a validation part. Named data sets have
            fixed splits.
        test_fraction: Fraction of each class for the test, for data without a test part; 0: no test part. Of the named
            data sets, "emoji" and "synthetic" give half of their validation images if it is above 0, and those of
            torchvision have their published test part, with validation images from the training part.
        seed: Seed of that split.
        download: Allow torchvision's data sets and remote names after "hf:" to be downloaded. An option in `data`
            overrides it.
        root: Folder of torchvision's data sets, by default "data". An option in `data` overrides it.
        pipes: Allow the commands of "pipe:" to run. Pass True only for text that the user typed, not for text from a
            config file.
        labels: Whether labels are needed. If not, a folder of images without class folders is allowed; all its images
            get the class "unlabeled".

    Raises:
        ValueError: The data cannot be found or used.
        ModuleNotFoundError: A package is missing; the message names the extra that installs it.

    Examples:
        >>> split = normfree.open_source("synthetic:classes=3,size=16,train=6,val=3")
        >>> len(split.train), len(split.val), split.classes
        (6, 3, ('disk', 'ring', 'square'))
        >>> split.train.label(4), split.train.image(4).size
        (1, (16, 16))
    """
    text = os.fspath(data)
    check_fractions(val_fraction, test_fraction)
    if text.partition(":")[0] in NAMES:
        return _open_named(
            text,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            download=download,
            root=root,
        )
    spec = _spec(text)
    parts = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    if spec:
        return _open_spec(spec, **parts, seed=seed, download=download, pipes=pipes, labels=labels)
    return _open_folder(Path(text), DEFAULT_LIMITS, **parts, seed=seed, labels=labels)


def _open_named(
    text: str, *, val_fraction: float, test_fraction: float, seed: int, download: bool,
    root: str | os.PathLike[str] | None,
) -> Split:  # fmt: skip
    """Return the split of a data set with a name."""
    if text == "emoji":
        from normfree.data.sources.emoji import open_emoji

        split = open_emoji()
    elif text.partition(":")[0] == "synthetic":
        from normfree.data.sources.synthetic import open_synthetic

        split = open_synthetic(text)
    else:
        split = open_torchvision(text, root=Path(root or DEFAULT_ROOT), download=download)
        if not test_fraction:
            return split
        train, val, _ = hash_split(split.train, val_fraction=val_fraction, seed=seed)
        how = f"validation is {100 * val_fraction:g} % of each class, and the test part is the published one"
        notes = (summary(text, train, val, split.val), how)
        return replace(split, train=train, val=val, test=split.val, notes=notes)
    # The seed of a run does not matter, as for the split into training and validation.
    return halve_validation(split, seed=0) if test_fraction else split


def _open_folder(
    path: Path, limits: ImageLimits, *, val_fraction: float, test_fraction: float, seed: int, labels: bool
) -> Split:
    """Return the split of a folder of images."""
    from normfree.data.sources.folders import open_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet
    from normfree.data.sources.listed import find_roboflow, open_listed, roboflow_options
    from normfree.data.sources.unlabeled import is_flat, open_unlabeled

    path = path.expanduser()
    _check_folder(path)
    if not labels and is_flat(path):
        return open_unlabeled(
            path, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, limits=limits
        )
    if (table := find_roboflow(path)) is not None:
        return open_listed(
            table,
            roboflow_options(table),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
            limits=limits,
        )
    if find_imagenet(path):
        return open_imagenet(path, test_fraction=test_fraction, seed=seed)
    return open_folder(path, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, limits=limits)


def _check_folder(path: Path) -> None:
    """Raise `ValueError` unless `path` is a folder."""
    if not path.exists():
        raise ValueError(_unknown(str(path)))
    if not path.is_dir():
        raise ValueError(
            problem(
                f"{str(path)!r} is a file",
                allowed=_ALLOWED,
                fix="name the folder of images; an archive must be unpacked first",
            )
        )


def image_limits(data: str | os.PathLike[str]) -> ImageLimits:
    """Return the limits that a specification states with `range=` and `max_pixels=`; the defaults for others.

    Raises:
        ValueError: A value is no whole number above 0.

    >>> image_limits("folder:photos/,range=4095").pixel_range
    4095
    """
    text = _spec(os.fspath(data))
    scheme = text.partition(":")[0]
    if "range" not in SCHEMES.get(scheme, ()):
        return DEFAULT_LIMITS
    return _limits(parse_spec(text, allowed=SCHEMES[scheme])[1])


def _limits(options: Mapping[str, str]) -> ImageLimits:
    """Return the limits among the options of a specification."""
    found = {}
    for option, field, most in (("range", "pixel_range", FULL_RANGE), ("max_pixels", "max_pixels", 10**10)):
        if option in options:
            value = options[option]
            if not value.isdecimal() or not 0 < int(value) <= most:
                raise ValueError(
                    problem(
                        f"{option}={value}", allowed=f"a whole number from 1 to {most}", fix=f"{option}=4095"
                    )
                )
            found[field] = int(value)
    return ImageLimits(**found)


def open_labeled(
    data: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    pipes: bool = False,
    part: str = "val",
) -> Source:
    """Open the images to evaluate a trained network on: a held-out part if `data` has one, else every image.

    Nothing is downloaded unless an option in `data` requests it. Arguments and errors are those of `open_source`;
    `part` is the held-out part that is used if there are two, "val" or "test".
    """
    text = os.fspath(data)
    spec = _spec(text)
    if spec:
        return _open_labeled_spec(spec, pipes=pipes, part=part)
    path = Path(text).expanduser()
    if text.partition(":")[0] in NAMES:
        return open_source(data, root=root).val
    return _open_labeled_folder(path, DEFAULT_LIMITS, part)


def _open_labeled_folder(path: Path, limits: ImageLimits, part: str) -> Source:
    """Return the images of a folder to evaluate a trained network on."""
    from normfree.data.sources.folders import open_labeled_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet
    from normfree.data.sources.listed import find_roboflow, open_labeled_listed, roboflow_options

    path = path.expanduser()
    _check_folder(path)
    if (table := find_roboflow(path)) is not None:
        return open_labeled_listed(table, roboflow_options(table), limits=limits, part=part)
    if find_imagenet(path):
        return open_imagenet(path).val
    return open_labeled_folder(path, limits=limits, part=part)


def _spec(text: str) -> str:
    """Return `text` as SCHEME:..., or "" if it is a name or a folder of images."""
    scheme, colon, _ = text.partition(":")
    if colon and scheme in SCHEMES:
        return text
    if scheme == "pipe" and colon:
        return f"shards:{text}"
    misspelled = re.match(r"\w\w+:(?!//)", text) and not Path(text).exists()  # "shard:x.tar", not C:
    if re.search(r"\.tar(,val=|$)", text) and not misspelled:
        return f"shards:{text}"
    path = Path(text).expanduser()
    if path.suffix.lower() in TABLES and path.is_file():
        return f"csv:{text}"
    if text and path.is_dir():
        names = sorted(p.name for p in path.glob("*.tar"))
        # An archive next to class folders is not data.
        if names and not any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir()):
            return _shard_folder(path, names)
    return ""


def _shard_folder(path: Path, names: list[str]) -> str:
    """Return the specification of a folder of shards.

    Published shards have names such as imagenet1k-train-0000.tar and imagenet1k-validation-00.tar.
    """
    train, val = ([name for name in names if part in name] for part in ("train", "val"))
    folder = glob.escape(str(path))
    if train and val:
        if set(train) & set(val) or len(train) + len(val) < len(names):
            odd = next(name for name in names if (name in train) == (name in val))
            raise ValueError(
                problem(
                    f"{path} holds {odd}, which matches not exactly one of *train*.tar and *val*.tar",
                    allowed="shards of these two kinds, or of one kind",
                    fix=f"shards:{path}/...,val={path}/...",
                )
            )
        return f"shards:{folder}/*train*.tar,val={folder}/*val*.tar"
    return f"shards:{folder}/*.tar"


def _open_spec(
    text: str,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    download: bool,
    pipes: bool,
    labels: bool,
) -> Split:
    """Return the split of "SCHEME:TARGET,option=value,..."."""
    scheme = text.partition(":")[0]
    target, options = parse_spec(text, allowed=SCHEMES[scheme])
    fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
    if scheme == "folder":
        return _open_folder(Path(target), _limits(options), **fractions, seed=seed, labels=labels)
    if scheme == "csv":
        from normfree.data.sources.listed import open_listed

        return open_listed(
            Path(target).expanduser(), options, **fractions, seed=seed, limits=_limits(options)
        )
    if scheme == "shards":
        from normfree.data.sources.webdataset import split_shards

        return split_shards(
            target, options.get("val"), test=options.get("test"), **fractions, seed=seed, pipes=pipes
        )
    if scheme == "packed":
        from normfree.data.sources.packed import split_packed

        return split_packed(target, options.get("val"), test=options.get("test"), **fractions, seed=seed)
    if scheme == "nested":
        from normfree.data.sources.nested import open_nested

        return open_nested(Path(target).expanduser(), **fractions, seed=seed)
    from normfree.data.sources.huggingface import split_huggingface

    download = is_yes(options, "download", download)
    return split_huggingface(target, options, **fractions, seed=seed, download=download)


def _open_labeled_spec(text: str, *, pipes: bool, part: str) -> Source:
    """Return the images to evaluate on of "SCHEME:TARGET,option=value,..."."""
    scheme = text.partition(":")[0]
    target, options = parse_spec(text, allowed=SCHEMES[scheme])
    held = next((options[name] for name in (part, "val", "test") if name in options), target)
    if scheme == "folder":
        return _open_labeled_folder(Path(target), _limits(options), part)
    if scheme == "csv":
        from normfree.data.sources.listed import open_labeled_listed

        return open_labeled_listed(Path(target).expanduser(), options, limits=_limits(options), part=part)
    if scheme == "shards":
        from normfree.data.sources.webdataset import open_shards

        return open_shards(held, pipes=pipes)
    if scheme == "packed":
        from normfree.data.sources.packed import PackedSource

        return PackedSource(held)
    if scheme == "nested":
        from normfree.data.sources.nested import open_labeled_nested

        return open_labeled_nested(Path(target).expanduser(), part=part)
    from normfree.data.sources.huggingface import open_labeled_huggingface

    return open_labeled_huggingface(target, options, download=is_yes(options, "download"), part=part)


def _unknown(text: str) -> str:
    """Return the error message for a `text` that names no data set, with the most similar name."""
    scheme, colon, rest = text.partition(":")
    near = closest(text.lower().replace("-", "_"), NAMES)
    if colon and (similar := closest(scheme.lower(), (*SCHEMES, "synthetic"))):
        near = f"{similar}:{rest}"
    given = f"{text!r} is neither a folder nor a known data set"
    return problem(given, allowed=_ALLOWED, fix="" if near else "check the path") + (
        f" Did you mean {near!r}?" if near else ""
    )
