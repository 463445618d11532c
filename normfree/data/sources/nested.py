"""Folders within folders as labels: an image has the names of all folders above it as its classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from normfree.data.source import Split
from normfree.data.sources.folders import TRAIN_NAMES, VAL_NAMES, FolderSource
from normfree.data.subset import make_split
from normfree.data.transforms.decode import SUFFIXES
from normfree.suggest import problem


class NestedSource(FolderSource):
    """A source of image files with several classes each.

    Args:
        root: folder of the files.
        samples: (path relative to `root`, class numbers) of each file.
        classes: class names.
    """

    def __init__(
        self, root: Path, samples: Sequence[tuple[str, tuple[int, ...]]], *, classes: Sequence[str]
    ) -> None:
        super().__init__(
            root, [(name, numbers[0] if numbers else 0) for name, numbers in samples], classes=classes
        )
        self._classes_of = [numbers for _, numbers in samples]

    def labels(self, index: int) -> tuple[int, ...]:
        """Return all classes of file `index`."""
        return self._classes_of[index]


def open_nested(root: Path, *, val_fraction: float, seed: int) -> Split:
    """Return the split of a folder whose images have the names of all folders above them as classes.

    outdoor/dog/1.jpg is of the classes "outdoor" and "dog", outdoor/2.jpg of "outdoor", and 3.jpg, directly in `root`,
    of none. With train/ and val/ (or the other names of `open_folder`), these are the parts; otherwise `val_fraction`
    of the images are held out.

    Raises:
        ValueError: there are no images, or fewer than two classes.
    """
    train_root, val_root = (_part(root, names) for names in (TRAIN_NAMES, VAL_NAMES))
    both = train_root is not None and val_root is not None
    own = train_root if both and train_root is not None else root
    files = _files(own)
    classes = sorted({part for name in files for part in name.split("/")[:-1]})
    if len(classes) < 2:
        given = f"{own} has images in {len(classes)} folders, which are the classes"
        raise ValueError(problem(given, allowed="two or more", fix="put images into folders within folders"))
    source = _source(own, files, classes)
    val = _source(val_root, _files(val_root), classes) if both and val_root is not None else None
    return make_split(
        str(root), source, val, val_fraction=val_fraction, seed=seed, ident=lambda index: files[index]
    )


def open_labeled_nested(root: Path) -> NestedSource:
    """Return the images to evaluate on: those of val/ if the folder has one, else all."""
    own = _part(root, VAL_NAMES) or root
    files = _files(own)
    return _source(own, files, sorted({part for name in files for part in name.split("/")[:-1]}))


def _source(root: Path, files: Sequence[str], classes: Sequence[str]) -> NestedSource:
    """Return the source of files, whose folders must be among `classes`."""
    numbers = {name: number for number, name in enumerate(classes)}
    samples = []
    for name in files:
        folders = sorted(set(name.split("/")[:-1]))
        unknown = [folder for folder in folders if folder not in numbers]
        if unknown:
            given = f"{root / name} is in the folder {unknown[0]!r}, which the training images do not have"
            raise ValueError(problem(given, fix="rename or remove the folder"))
        samples.append((name, tuple(numbers[folder] for folder in folders)))
    return NestedSource(root, samples, classes=classes)


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of the folders `names` in `root` that exists."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def _files(root: Path) -> list[str]:
    """Return the sorted paths of all images below `root`, relative to it, with slashes."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise ValueError(problem(f"{root} holds no images", fix="check the path"))
    return sorted(found)
