"""`open_source`: from the name or path of a data set to a training and a validation source."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from normfree.data.source import Source, Split
from normfree.data.sources.torchvision_sets import TORCHVISION_SETS, open_torchvision
from normfree.data.spec import is_yes, parse_spec
from normfree.suggest import closest, problem

DEFAULT_ROOT = Path("data")  # folder of the data sets of torchvision, below the working directory
NAMES = ("emoji", *TORCHVISION_SETS, "synthetic")
SCHEMES = {  # scheme -> its options
    "shards": ("val",),
    "packed": ("val",),
    "nested": (),
    "hf": ("split", "val", "image", "label", "subset", "revision", "download", "streaming", "buffer"),
}
_ALLOWED = f"a folder of images, or one of {', '.join([*NAMES, *(f'{scheme}:...' for scheme in SCHEMES)])}"


def open_source(
    data: str | os.PathLike[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    pipes: bool = False,
    labels: bool = True,
) -> Split:
    """Open a data set by name or by path, split into training and validation.

    `data` is one of the following (docs/data.md has examples):

    - "emoji" (the default of the demo), "synthetic" (with options: "synthetic:classes=4,size=32,train=256,val=64");
    - "cifar10", "cifar100", "fashion_mnist" (with options: "cifar10:root=FOLDER,download=yes");
    - the path of a folder: class folders, train/ and val/ of class folders, ImageNet as published, or tar shards. Write
      "./emoji" for a folder that has the name of a data set;
    - "shards:PATTERN[,val=PATTERN]": WebDataset; the prefix is optional if the pattern ends in .tar, and a PATTERN may
      be "pipe:COMMAND";
    - "packed:FILE[,val=FILE]": files written by `pack`;
    - "nested:FOLDER": images with several classes, the names of all folders above them;
    - "hf:FOLDER_OR_NAME[,split=...,image=...,label=...,val=...,download=yes]": Hugging Face datasets.

    Args:
        data: Name or path.
        val_fraction: Fraction of each class for validation, for data without a validation part. Named data sets have
            fixed splits.
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
    if text == "emoji":
        from normfree.data.sources.emoji import open_emoji

        return open_emoji()
    if text.partition(":")[0] == "synthetic":
        from normfree.data.sources.synthetic import open_synthetic

        return open_synthetic(text)
    if text.partition(":")[0] in TORCHVISION_SETS:
        return open_torchvision(text, root=Path(root or DEFAULT_ROOT), download=download)
    spec = _spec(text)
    if spec:
        return _open_spec(spec, val_fraction=val_fraction, seed=seed, download=download, pipes=pipes)
    return _open_path(Path(text).expanduser(), text, val_fraction=val_fraction, seed=seed, labels=labels)


def _open_path(path: Path, text: str, *, val_fraction: float, seed: int, labels: bool) -> Split:
    """Return the split of the folder at `path`, which was given as `text`."""
    if not path.exists():
        raise ValueError(_unknown(text))
    if not path.is_dir():
        raise ValueError(
            problem(
                f"{text!r} is a file",
                allowed=_ALLOWED,
                fix="name the folder of images; an archive must be unpacked first",
            )
        )
    from normfree.data.sources.folders import open_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet
    from normfree.data.sources.unlabeled import is_flat, open_unlabeled

    if not labels and is_flat(path):
        return open_unlabeled(path, val_fraction=val_fraction, seed=seed)
    if find_imagenet(path):
        return open_imagenet(path)
    return open_folder(path, val_fraction=val_fraction, seed=seed)


def open_labeled(
    data: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None, pipes: bool = False
) -> Source:
    """Open the images to evaluate a trained network on: the validation part if `data` has one, else every image.

    Nothing is downloaded unless an option in `data` requests it. Arguments and errors are those of `open_source`.
    """
    text = os.fspath(data)
    spec = _spec(text)
    if spec:
        return _open_labeled_spec(spec, pipes=pipes)
    path = Path(text).expanduser()
    if text.partition(":")[0] in NAMES or not path.is_dir():
        return open_source(data, root=root).val
    from normfree.data.sources.folders import open_labeled_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet

    if find_imagenet(path):
        return open_imagenet(path).val
    return open_labeled_folder(path)


def _spec(text: str) -> str:
    """Return `text` as SCHEME:..., or "" if it is a name or a folder of images."""
    scheme, colon, _ = text.partition(":")
    if colon and scheme in SCHEMES:
        return text
    if scheme == "pipe" and colon:
        return f"shards:{text}"
    misspelled = re.match(r"\w+:(?!//)", text) and not Path(text).exists()  # "shard:x.tar"
    if re.search(r"\.tar(,val=|$)", text) and not misspelled:
        return f"shards:{text}"
    path = Path(text).expanduser()
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


def _open_spec(text: str, *, val_fraction: float, seed: int, download: bool, pipes: bool) -> Split:
    """Return the split of "SCHEME:TARGET,option=value,..."."""
    scheme = text.partition(":")[0]
    target, options = parse_spec(text, allowed=SCHEMES[scheme])
    if scheme == "shards":
        from normfree.data.sources.webdataset import split_shards

        return split_shards(target, options.get("val"), val_fraction=val_fraction, seed=seed, pipes=pipes)
    if scheme == "packed":
        from normfree.data.sources.packed import split_packed

        return split_packed(target, options.get("val"), val_fraction=val_fraction, seed=seed)
    if scheme == "nested":
        from normfree.data.sources.nested import open_nested

        return open_nested(Path(target).expanduser(), val_fraction=val_fraction, seed=seed)
    from normfree.data.sources.huggingface import split_huggingface

    download = is_yes(options, "download", download)
    return split_huggingface(target, options, val_fraction=val_fraction, seed=seed, download=download)


def _open_labeled_spec(text: str, *, pipes: bool) -> Source:
    """Return the images to evaluate on of "SCHEME:TARGET,option=value,..."."""
    scheme = text.partition(":")[0]
    target, options = parse_spec(text, allowed=SCHEMES[scheme])
    if scheme == "shards":
        from normfree.data.sources.webdataset import open_shards

        return open_shards(options.get("val", target), pipes=pipes)
    if scheme == "packed":
        from normfree.data.sources.packed import PackedSource

        return PackedSource(options.get("val", target))
    if scheme == "nested":
        from normfree.data.sources.nested import open_labeled_nested

        return open_labeled_nested(Path(target).expanduser())
    from normfree.data.sources.huggingface import open_labeled_huggingface

    return open_labeled_huggingface(target, options, download=is_yes(options, "download"))


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
