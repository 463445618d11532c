"""From what a user names to a training and a validation source: `open_source`."""

from __future__ import annotations

import os
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from normfree.data.protocol import ArraySource, Source, Split
from normfree.data.vision import torchvision_module

DEFAULT_ROOT = Path("data")  # where the sets of torchvision lie, below the working directory


def open_source(
    data: str | os.PathLike[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    download: bool = False,
    root: str | os.PathLike[str] | None = None,
) -> Split:
    """Find a data set by name or by path.

    `data` is "emoji" (the default of the demo), "cifar10", "cifar100", "fashion_mnist", "synthetic" (with
    options: "synthetic:classes=4,size=32,train=256,val=64"), or the path of a folder of images; a folder that
    bears one of these names is meant by "./emoji". `val_fraction` and `seed` split a folder that has no
    validation part of its own; the named sets have fixed splits. `root` is where the sets of torchvision lie
    (default "data"); they are downloaded there only when `download` is True. Raises `ValueError` for what
    cannot be found or used.
    """
    text = os.fspath(data)
    if text == "emoji":
        from normfree.data.emoji import open_emoji

        return open_emoji()
    if text.partition(":")[0] == "synthetic":
        from normfree.data.synthetic import open_synthetic

        return open_synthetic(text)
    if text in TORCHVISION_SETS:
        return _open_torchvision(text, root=Path(root or DEFAULT_ROOT), download=download)
    path = Path(text).expanduser()
    if not path.exists():
        raise ValueError(_unknown(text))
    if not path.is_dir():
        raise ValueError(
            f"{text!r} is a file. Allowed: a folder of images, or one of {', '.join(NAMES)}. "
            f"Fix: name the folder of images; an archive must be unpacked first"
        )
    from normfree.data.folders import open_folder

    return open_folder(path, val_fraction=val_fraction, seed=seed)


def open_labelled(data: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Source:
    """The images to score a finished network on: the validation part of a named data set, that of a folder which
    has one, or else every image of a folder of class folders. Nothing is downloaded. Raises as `open_source`.
    """
    path = Path(os.fspath(data)).expanduser()
    if os.fspath(data).partition(":")[0] in NAMES or not path.is_dir():
        return open_source(data, root=root).val
    from normfree.data.folders import open_labelled_folder

    return open_labelled_folder(path)


# name -> class in torchvision.datasets, folder below the root, side in pixels, credit
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 32, "CIFAR-10: A. Krizhevsky, 2009."),
    "cifar100": ("CIFAR100", "cifar-100-python", 32, "CIFAR-100: A. Krizhevsky, 2009."),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", 28, "Fashion-MNIST: Zalando SE, MIT licence."),
}
NAMES = ("emoji", *TORCHVISION_SETS, "synthetic")


def _open_torchvision(name: str, *, root: Path, download: bool) -> Split:
    class_name, folder, size, credit = TORCHVISION_SETS[name]
    if not download and not (root / folder).is_dir():
        raise ValueError(
            f"{name!r} is not here: looked in {root / folder}. Allowed: a copy in that place, or a download when "
            "told to. Fix: --input.download true"
        )
    opener = getattr(torchvision_module("datasets"), class_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy deplores how the arrays of 2009 were pickled
            parts = [opener(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError:  # missing or damaged files: torchvision compares their MD5 sums
        raise ValueError(
            f"{name!r} in {root / folder} is incomplete or damaged. Allowed: the files as they were published. "
            "Fix: delete that folder, then --input.download true"
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


def _unknown(text: str) -> str:
    near = get_close_matches(text.lower().replace("-", "_"), NAMES, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else "Fix: check the path"
    allowed = f"a folder of images, or one of {', '.join(NAMES)}"
    return f"{text!r} is neither a folder nor a known data set. Allowed: {allowed}. {fix}"
