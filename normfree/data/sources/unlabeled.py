"""A folder of images without class folders, for training without labels."""

from __future__ import annotations

from pathlib import Path

from normfree.data.source import Split
from normfree.data.sources.folders import FolderSource
from normfree.data.subset import audit_notes, hash_split
from normfree.data.transforms.decode import SUFFIXES

UNLABELED = "unlabeled"  # the only class


def is_flat(root: Path) -> bool:
    """Return True if a folder has images and no folders, except hidden ones."""
    visible = [path for path in root.iterdir() if not path.name.startswith(".")]
    return any(_is_image(path) for path in visible) and not any(path.is_dir() for path in visible)


def open_unlabeled(root: Path, *, val_fraction: float, seed: int) -> Split:
    """Return the split of the images in a folder: `val_fraction` of them, chosen by a hash of their names, validate.

    Raises:
        ValueError: there is only one image, or the fraction is out of range.
    """
    names = sorted(path.name for path in root.iterdir() if _is_image(path))
    source = FolderSource(root, [(name, 0) for name in names], classes=(UNLABELED,))
    train, val = hash_split(
        source, val_fraction=val_fraction, seed=seed, ident=lambda index: names[index], what=str(root),
        fix="add images",
    )  # fmt: skip
    note = f"{root}: {len(train)} images without labels to train on, {len(val)} to validate"
    return Split(
        train=train, val=val, classes=(UNLABELED,), notes=(note, *audit_notes(len(names))), files=True
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
