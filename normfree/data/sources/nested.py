"""Folders within folders as labels: an image has the names of all folders above it as its classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.data.source import Split
from normfree.data.sources.folders import FolderSource, part_of
from normfree.data.subset import make_split
from normfree.data.walk import list_folder, walk_images
from normfree.suggest import problem


class NestedSource(FolderSource):
    """A source of image files with several classes each.

    Args:
        root: folder of the files.
        samples: (path relative to `root`, class numbers) of each file.
        classes: class names.
        options: how images are decoded, see `FolderSource`.
    """

    def __init__(
        self,
        root: Path,
        samples: Sequence[tuple[str, tuple[int, ...]]],
        *,
        classes: Sequence[str],
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            [(name, numbers[0] if numbers else 0) for name, numbers in samples],
            classes=classes,
            **options,
        )
        self._classes_of = [numbers for _, numbers in samples]

    def labels(self, index: int) -> tuple[int, ...]:
        """Return all classes of file `index`."""
        return self._classes_of[index]


def open_nested(root: Path, *, val_fraction: float, test_fraction: float = 0.0, seed: int) -> Split:
    """Return the split of a folder whose images have the names of all folders above them as classes.

    outdoor/dog/1.jpg is of the classes "outdoor" and "dog", outdoor/2.jpg of "outdoor", and 3.jpg, directly in `root`,
    of none. Folders such as train/, val/ and test/ are the parts; those that are missing are fractions of the images.

    Raises:
        ValueError: there are no images, or fewer than two classes.
    """
    parts = _parts(root)
    own = parts.get("train", root)
    files = _files(own)
    classes = sorted({part for name in files for part in name.split("/")[:-1]})
    if len(classes) < 2:
        given = f"{own} has images in {len(classes)} folders, which are the classes"
        raise ValueError(problem(given, allowed="two or more", fix="put images into folders within folders"))
    held = {part: _source(where, _files(where), classes) for part, where in parts.items() if part != "train"}
    return make_split(
        str(root), _source(own, files, classes), held.get("val"), test=held.get("test"), val_fraction=val_fraction,
        test_fraction=test_fraction, seed=seed, ident=lambda index: files[index],
    )  # fmt: skip


def open_labeled_nested(root: Path, *, part: str = "val") -> NestedSource:
    """Return the images to evaluate on: those of a held-out part if the folder has one, else all."""
    parts = _parts(root)
    own = next((parts[name] for name in (part, "val", "test") if name in parts), root)
    files = _files(own)
    return _source(own, files, sorted({part for name in files for part in name.split("/")[:-1]}))


def _parts(root: Path) -> dict[str, Path]:
    """Return the folders of the parts, if there is one to train on and one that is held out."""
    found: dict[str, Path] = {}
    for name in list_folder(root).folders:
        if stated := part_of(name):
            found.setdefault(stated[0], root / name)
    return found if "train" in found and len(found) > 1 else {}


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


def _files(root: Path) -> list[str]:
    """Return the sorted paths of all images below `root`, relative to it, with slashes."""
    found, _ = walk_images(root)
    if not found:
        raise ValueError(problem(f"{root} holds no images", fix="check the path"))
    return [path.relative_to(root).as_posix() for path in found]
