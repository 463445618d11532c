"""A folder of images without class folders, for training without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from normfree.data.source import Split
from normfree.data.sources.folders import DEFAULT_LIMITS, FolderSource, ImageLimits
from normfree.data.subset import make_split
from normfree.data.walk import left_out, list_folder
from normfree.suggest import number_of

UNLABELED = "unlabeled"  # the only class


def is_flat(root: Path) -> bool:
    """Return True if a folder has images and no folders, except hidden ones."""
    entries = list_folder(root)
    return bool(entries.images) and not entries.folders


def open_unlabeled(
    root: Path,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Split:
    """Return the split of the images in a folder: `val_fraction` and `test_fraction` of them, chosen by a hash of their
    names, validate and test. With a `val_fraction` of 0 all are trained on.

    Raises:
        ValueError: there is only one image, or the fraction is out of range.
    """
    entries = list_folder(root)
    names = entries.images
    source = FolderSource(
        root, [(name, 0) for name in names], classes=(UNLABELED,), max_pixels=limits.max_pixels,
        pixel_range=limits.pixel_range,
    )  # fmt: skip
    split = make_split(
        str(root), source, None, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed,
        ident=lambda index: names[index], fix="add images",
    )  # fmt: skip
    counts = f"{root}: {number_of(len(split.train), 'image')} without labels to train on"
    counts += f", {len(split.val)} to validate" if split.held_out else ""
    counts += f", {len(split.test)} to test" if split.test is not None else ""
    _, how, *more = split.notes
    return replace(
        split, notes=(counts, *([] if split.held_out else [how]), *left_out(entries.others), *more)
    )
