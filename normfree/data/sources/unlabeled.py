"""A folder of images without class folders, for training without labels."""

from __future__ import annotations

from pathlib import Path

from normfree.data.source import Split
from normfree.data.sources.folders import DEFAULT_LIMITS, FolderSource, ImageLimits
from normfree.data.subset import audit_notes, hash_split
from normfree.data.walk import left_out, list_folder
from normfree.suggest import number_of

UNLABELED = "unlabeled"  # the only class


def is_flat(root: Path) -> bool:
    """Return True if a folder has images and no folders, except hidden ones."""
    entries = list_folder(root)
    return bool(entries.images) and not entries.folders


def open_unlabeled(
    root: Path, *, val_fraction: float, seed: int, limits: ImageLimits = DEFAULT_LIMITS
) -> Split:
    """Return the split of the images in a folder: `val_fraction` of them, chosen by a hash of their names, validate.

    Raises:
        ValueError: there is only one image, or the fraction is out of range.
    """
    entries = list_folder(root)
    names = entries.images
    source = FolderSource(
        root, [(name, 0) for name in names], classes=(UNLABELED,), max_pixels=limits.max_pixels,
        pixel_range=limits.pixel_range,
    )  # fmt: skip
    train, val, _ = hash_split(
        source, val_fraction=val_fraction, seed=seed, ident=lambda index: names[index], what=str(root),
        fix="add images",
    )  # fmt: skip
    note = f"{root}: {number_of(len(train), 'image')} without labels to train on, {len(val)} to validate"
    return Split(
        train=train,
        val=val,
        classes=(UNLABELED,),
        notes=(note, *left_out(entries.others), *audit_notes(len(names))),
        files=True,
    )
