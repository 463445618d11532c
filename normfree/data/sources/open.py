"""From what a user names to a training and a validation source: `open_source`."""

from __future__ import annotations

import glob
import os
import re
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from normfree.data.source import ArraySource, Source, Split
from normfree.data.spec import is_yes, parse_word
from normfree.data.torchvision_import import torchvision_module

DEFAULT_ROOT = Path("data")  # where the sets of torchvision lie, below the working directory


def open_source(
    data: str | os.PathLike[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
    pipes: bool = False,
) -> Split:
    """Find a data set by name or by path.

    `data` is one of these words (docs/data.md has examples):

    - "emoji" (the default of the demo), "synthetic" (with options: "synthetic:classes=4,size=32,train=256,val=64");
    - "cifar10", "cifar100", "fashion_mnist" (with options: "cifar10:root=FOLDER,download=yes");
    - the path of a folder: class folders, train/ and val/ of class folders, ImageNet as it is published, or tar
      shards; a folder that bears the name of a set is meant by "./emoji";
    - "shards:PATTERN[,val=PATTERN]", where the prefix may be left out if the pattern ends in .tar: WebDataset;
      a PATTERN may be "pipe:COMMAND";
    - "packed:FILE[,val=FILE]": what `pack` wrote;
    - "hf:FOLDER_OR_NAME[,split=...,image=...,label=...,val=...,download=yes]": Hugging Face datasets.

    `val_fraction` and `seed` split what has no validation part of its own; the named sets have fixed splits.
    `root` is where the sets of torchvision lie (default "data"); they, and remote names after "hf:", are
    downloaded only when `download` is True; what the word itself says of these two goes first. `pipes`: the
    commands of "pipe:" may run; for a word that was typed, not for one that a config brought. Raises `ValueError`
    for what cannot be found or used, and `ModuleNotFoundError` naming the extra for a package that is missing.
    """
    text = os.fspath(data)
    if text == "emoji":
        from normfree.data.sources.emoji import open_emoji

        return open_emoji()
    if text.partition(":")[0] == "synthetic":
        from normfree.data.sources.synthetic import open_synthetic

        return open_synthetic(text)
    if text.partition(":")[0] in TORCHVISION_SETS:
        return _open_torchvision(text, root=Path(root or DEFAULT_ROOT), download=download)
    word = _word(text)
    if word:
        return _open_word(word, val_fraction=val_fraction, seed=seed, download=download, pipes=pipes)
    path = Path(text).expanduser()
    if not path.exists():
        raise ValueError(_unknown(text))
    if not path.is_dir():
        raise ValueError(
            f"{text!r} is a file. Allowed: {_ALLOWED}. "
            f"Fix: name the folder of images; an archive must be unpacked first"
        )
    from normfree.data.sources.folders import open_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet

    if find_imagenet(path):
        return open_imagenet(path)
    return open_folder(path, val_fraction=val_fraction, seed=seed)


def open_labeled(
    data: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None, pipes: bool = False
) -> Source:
    """The images to score a finished network on: the validation part of a named data set, that of a folder or word
    which has one, or else every image. Nothing is downloaded unless the word says so. `pipes` and errors as for
    `open_source`.
    """
    text = os.fspath(data)
    word = _word(text)
    if word:
        return _open_word_labelled(word, pipes=pipes)
    path = Path(text).expanduser()
    if text.partition(":")[0] in NAMES or not path.is_dir():
        return open_source(data, root=root).val
    from normfree.data.sources.folders import open_labeled_folder
    from normfree.data.sources.imagenet import find_imagenet, open_imagenet

    if find_imagenet(path):
        return open_imagenet(path).val
    return open_labeled_folder(path)


SCHEMES = {  # word -> its options
    "shards": ("val",),
    "packed": ("val",),
    "hf": ("split", "val", "image", "label", "subset", "revision", "download", "streaming", "buffer"),
}


def _word(text: str) -> str:
    """`text` as SCHEME:..., or "" when it is a name or a folder of images."""
    scheme, colon, _ = text.partition(":")
    if colon and scheme in SCHEMES:
        return text
    if scheme == "pipe" and colon:
        return f"shards:{text}"
    misspelt = re.match(r"\w+:(?!//)", text) and not Path(text).exists()  # "shard:x.tar"
    if re.search(r"\.tar(,val=|$)", text) and not misspelt:
        return f"shards:{text}"
    path = Path(text).expanduser()
    if text and path.is_dir():
        names = sorted(p.name for p in path.glob("*.tar"))
        # An archive that lies beside class folders is not meant.
        if names and not any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir()):
            return _shard_folder(path, names)
    return ""


def _shard_folder(path: Path, names: list[str]) -> str:
    # names like imagenet1k-train-0000.tar and imagenet1k-validation-00.tar, as they are published
    train, val = ([name for name in names if word in name] for word in ("train", "val"))
    folder = glob.escape(str(path))
    if train and val:
        if set(train) & set(val) or len(train) + len(val) < len(names):
            odd = next(name for name in names if (name in train) == (name in val))
            raise ValueError(
                f"{path} holds {odd}, which is neither *train*.tar nor *val*.tar alone. Allowed: these two, or one "
                f"kind. Fix: shards:{path}/...,val={path}/..."
            )
        return f"shards:{folder}/*train*.tar,val={folder}/*val*.tar"
    return f"shards:{folder}/*.tar"


def _open_word(text: str, *, val_fraction: float, seed: int, download: bool, pipes: bool) -> Split:
    scheme = text.partition(":")[0]
    target, options = parse_word(text, allowed=SCHEMES[scheme])
    if scheme == "shards":
        from normfree.data.sources.webdataset import split_shards

        return split_shards(target, options.get("val"), val_fraction=val_fraction, seed=seed, pipes=pipes)
    if scheme == "packed":
        from normfree.data.sources.packed import split_packed

        return split_packed(target, options.get("val"), val_fraction=val_fraction, seed=seed)
    from normfree.data.sources.huggingface import split_hugging

    download = is_yes(options, "download", download)
    return split_hugging(target, options, val_fraction=val_fraction, seed=seed, download=download)


def _open_word_labelled(text: str, *, pipes: bool) -> Source:
    scheme = text.partition(":")[0]
    target, options = parse_word(text, allowed=SCHEMES[scheme])
    if scheme == "shards":
        from normfree.data.sources.webdataset import open_shards

        return open_shards(options.get("val", target), pipes=pipes)
    if scheme == "packed":
        from normfree.data.sources.packed import PackedSource

        return PackedSource(options.get("val", target))
    from normfree.data.sources.huggingface import labelled_hugging

    return labelled_hugging(target, options, download=is_yes(options, "download"))


# name -> class in torchvision.datasets, folder below the root, side in pixels, credit
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 32, "CIFAR-10: A. Krizhevsky, 2009."),
    "cifar100": ("CIFAR100", "cifar-100-python", 32, "CIFAR-100: A. Krizhevsky, 2009."),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", 28, "Fashion-MNIST: Zalando SE, MIT licence."),
}
NAMES = ("emoji", *TORCHVISION_SETS, "synthetic")


def _open_torchvision(text: str, *, root: Path, download: bool) -> Split:
    name = text.partition(":")[0]
    _, options = parse_word(text, allowed=("root", "download"), named=True)
    root = Path(options.get("root", root)).expanduser()
    download = is_yes(options, "download", download)
    fix = f"{name}:" + (f"root={options['root']}," if "root" in options else "") + "download=yes"
    class_name, folder, size, credit = TORCHVISION_SETS[name]
    if not download and not (root / folder).is_dir():
        raise ValueError(
            f"{name!r} is not here: looked in {root / folder}. Allowed: a copy in that place, or a download when "
            f"told to. Fix: {fix}"
        )
    opener = getattr(torchvision_module("datasets"), class_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy deplores how the arrays of 2009 were pickled
            parts = [opener(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError:  # missing or damaged files: torchvision compares their MD5 sums
        raise ValueError(
            f"{name!r} in {root / folder} is incomplete or damaged. Allowed: the files as they were published. "
            f"Fix: delete that folder, then {fix}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{name!r} could not be downloaded: {error}. Allowed: a network connection, or a copy in "
            f"{root / folder}. Fix: copy it there from a machine that has it"
        ) from error
    train, val = (
        _array_source(name, part, data) for part, data in zip(("train", "test"), parts, strict=True)
    )
    counts = f"{len(train)} images to train on, {len(val)} to validate (its test set)"
    note = f"{name}: {counts}, {len(train.classes)} classes"
    return Split(train=train, val=val, classes=train.classes, credit=credit, image_size=size, notes=(note,))


def _array_source(name: str, part: str, data: Any) -> ArraySource:
    images = np.asarray(data.data, dtype=np.uint8)
    if images.ndim == 3:  # grey, N H W
        images = np.repeat(images[..., None], 3, axis=3)
    labels = [int(label) for label in data.targets]
    return ArraySource(
        images, labels, classes=tuple(data.classes), names=[f"{name}/{part}/{i}" for i in range(len(labels))]
    )


_ALLOWED = f"a folder of images, or one of {', '.join([*NAMES, *(f'{word}:...' for word in SCHEMES)])}"


def _unknown(text: str) -> str:
    scheme, colon, rest = text.partition(":")
    near = get_close_matches(text.lower().replace("-", "_"), NAMES, n=1)
    close = get_close_matches(scheme.lower(), (*SCHEMES, "synthetic"), n=1, cutoff=0.5) if colon else []
    fix = f"Did you mean {near[0]!r}?" if near else "Fix: check the path"
    if close:
        fix = f"Did you mean {close[0] + ':' + rest!r}?"
    return f"{text!r} is neither a folder nor a known data set. Allowed: {_ALLOWED}. {fix}"
