"""Data sets of torchvision that fit into memory: CIFAR-10, CIFAR-100 and Fashion-MNIST."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from normfree.data.source import ArraySource, Split
from normfree.data.spec import is_yes, parse_spec
from normfree.data.torchvision_import import torchvision_module
from normfree.suggest import problem

# name -> class in torchvision.datasets, folder below the root, side in pixels, credit
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py", 32, "CIFAR-10: A. Krizhevsky, 2009."),
    "cifar100": ("CIFAR100", "cifar-100-python", 32, "CIFAR-100: A. Krizhevsky, 2009."),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", 28, "Fashion-MNIST: Zalando SE, MIT license."),
}


def open_torchvision(text: str, *, root: Path, download: bool) -> Split:
    """Return the split of "NAME" or "NAME:root=FOLDER,download=yes"; options in `text` override the arguments.

    Raises:
        ValueError: The files are missing or damaged, or the download failed.
        ImportError: torchvision cannot be imported.
    """
    name = text.partition(":")[0]
    _, options = parse_spec(text, allowed=("root", "download"), named=True)
    root = Path(options.get("root", root)).expanduser()
    download = is_yes(options, "download", download)
    fix = f"{name}:" + (f"root={options['root']}," if "root" in options else "") + "download=yes"
    class_name, folder, size, credit = TORCHVISION_SETS[name]
    if not download and not (root / folder).is_dir():
        raise ValueError(
            problem(
                f"{name!r} is not in {root / folder}",
                allowed="a copy in that folder, or a download on request",
                fix=fix,
            )
        )
    opener = getattr(torchvision_module("datasets"), class_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about the way these arrays were pickled in 2009
            parts = [opener(str(root), train=train, download=download) for train in (True, False)]
    except RuntimeError:  # missing or damaged files: torchvision compares their MD5 sums
        raise ValueError(
            problem(
                f"{name!r} in {root / folder} is incomplete or damaged",
                allowed="the files as they were published",
                fix=f"delete that folder, then {fix}",
            )
        ) from None
    except OSError as error:
        raise ValueError(
            problem(
                f"{name!r} could not be downloaded: {error}",
                allowed=f"a network connection, or a copy in {root / folder}",
                fix="copy it there from a machine that has it",
            )
        ) from error
    train, val = (
        _array_source(name, part, data) for part, data in zip(("train", "test"), parts, strict=True)
    )
    counts = f"{len(train)} images to train on, {len(val)} to validate (its test set)"
    note = f"{name}: {counts}, {len(train.classes)} classes"
    return Split(train=train, val=val, classes=train.classes, credit=credit, image_size=size, notes=(note,))


def _array_source(name: str, part: str, data: Any) -> ArraySource:
    """Return the images of a torchvision data set as an `ArraySource`."""
    images = np.asarray(data.data, dtype=np.uint8)
    if images.ndim == 3:  # gray, N H W
        images = np.repeat(images[..., None], 3, axis=3)
    labels = [int(label) for label in data.targets]
    return ArraySource(
        images, labels, classes=tuple(data.classes), names=[f"{name}/{part}/{i}" for i in range(len(labels))]
    )
