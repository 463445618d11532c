"""A user's folder of images: find the classes, refuse what would train wrongly, split off a validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normfree.data.encoded import EncodedSource
from normfree.data.seeds import key
from normfree.data.source import Split
from normfree.data.transforms.decode import MAX_PIXELS, SUFFIXES

if TYPE_CHECKING:
    pass

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first one found is taken
_LITTER = {"__macosx", "thumbs.db", "desktop.ini"}  # what file managers leave behind
_LAYOUT = "one folder of images per class, or train/ and val/ with one such folder per class"


class FolderSource(EncodedSource):
    """Image files with labels. `samples` holds (path relative to `root`, class number)."""

    def __init__(
        self,
        root: Path,
        samples: Sequence[tuple[str, int]],
        *,
        classes: Sequence[str],
        background: tuple[int, int, int] = (255, 255, 255),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.classes = tuple(classes)
        self._root = root
        self._samples = list(samples)
        super().__init__(background=background, max_pixels=max_pixels)

    def __len__(self) -> int:
        return len(self._samples)

    def label(self, index: int) -> int:
        """The class of file `index`."""
        return self._samples[index][1]

    def data(self, index: int) -> str:
        """The path of file `index`."""
        return self.name(index)

    def name(self, index: int) -> str:
        """The path of file `index`."""
        return str(self._root / self._samples[index][0])


@dataclass(frozen=True)
class _Listing:
    root: Path
    files: dict[str, list[str]]  # class -> file names, both sorted
    ignored: int  # visible files that are not images, and images outside the class folders

    def samples(self) -> list[tuple[str, int]]:
        return [(f"{c}/{name}", k) for k, (c, names) in enumerate(self.files.items()) for name in names]


def open_folder(root: Path, *, val_fraction: float, seed: int) -> Split:
    """The split of a folder: `train/` and `val/` (or `validation/`, `valid/`, `test/`) if it has them.

    Otherwise every class gives `val_fraction` of its files to validation, chosen by a hash of (seed, class,
    file name): the same files in every run, and mostly the same ones after files are added. A class keeps at
    least one file to train on and, when it has two, gives at least one. Classes are the sorted folder names.
    Hidden files are skipped, files without an image suffix counted. Raises `ValueError` for a layout that
    would train wrongly.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}. Allowed: above 0 and below 1. Fix: val_fraction=0.1")
    train_root, val_root = _part(root, TRAIN_NAMES), _part(root, VAL_NAMES)
    if train_root is not None and val_root is not None:
        return _two_folders(root, _listing(train_root), _listing(val_root))
    return _one_folder(_listing(train_root or root), val_fraction=val_fraction, seed=seed)


def open_labeled_folder(root: Path) -> FolderSource:
    """Every labelled image to score a network on: those of the folder's validation part, if it has one, else all."""
    listing = _listing(_part(root, VAL_NAMES) or root)
    return FolderSource(listing.root, listing.samples(), classes=tuple(listing.files))


def _two_folders(root: Path, train: _Listing, val: _Listing) -> Split:
    only_train, only_val = (sorted(a.files.keys() - b.files.keys()) for a, b in ((train, val), (val, train)))
    if only_train or only_val:
        odd = [
            f"only in {part.root.name}/: {_some(names)}"
            for part, names in ((train, only_train), (val, only_val))
            if names
        ]
        raise ValueError(
            f"{train.root} and {val.root} have different classes ({'; '.join(odd)}). "
            "Allowed: the same class folders in both. Fix: rename or remove the odd ones"
        )
    notes = [_summary(root, len(train.samples()), len(val.samples()), len(train.files))]
    notes.append(f"validation is {val.root.name}/")
    left = [name for name in VAL_NAMES if name != val.root.name and (root / name).is_dir()]
    notes += [f"{name}/ was left alone" for name in left]
    return Split(
        train=FolderSource(train.root, train.samples(), classes=tuple(train.files)),
        val=FolderSource(val.root, val.samples(), classes=tuple(val.files)),
        classes=tuple(train.files),
        notes=(*notes, *_ignored(train.ignored + val.ignored)),
        files=True,
    )


def _one_folder(listing: _Listing, *, val_fraction: float, seed: int) -> Split:
    train, val = [], []
    for k, (name, files) in enumerate(listing.files.items()):
        order = sorted(files, key=lambda file: (key(seed, "split", name, file), file))
        count = max(min(1, len(files) - 1), min(round(val_fraction * len(files)), len(files) - 1))
        val += [(f"{name}/{file}", k) for file in sorted(order[:count])]
        train += [(f"{name}/{file}", k) for file in sorted(order[count:])]
    if not val:
        raise ValueError(
            f"{listing.root} holds one image per class, which leaves none for validation. "
            "Allowed: two images or more in at least one class. Fix: add images, or a val/ folder beside train/"
        )
    notes = (
        _summary(listing.root, len(train), len(val), len(listing.files)),
        f"validation is {100 * val_fraction:g} % of each class, the same files in every run with this seed",
        *_ignored(listing.ignored),
    )
    return Split(
        train=FolderSource(listing.root, train, classes=tuple(listing.files)),
        val=FolderSource(listing.root, val, classes=tuple(listing.files)),
        classes=tuple(listing.files),
        notes=notes,
        files=True,
    )


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    # A folder named "train" that holds images itself is a class (of locomotives), not a part of the data.
    for name in names:
        folders, images, _ = _entries(root / name) if (root / name).is_dir() else ([], [], 0)
        if folders and not images:
            return root / name
    return None


def _listing(root: Path) -> _Listing:
    folders, loose, ignored = _entries(root)
    if not folders:
        raise ValueError(_no_classes(root, len(loose)))
    contents = {name: _entries(root / name) for name in folders}
    for name, (inner, images, others) in contents.items():
        deeper = [folder for folder in inner if _entries(root / name / folder)[1]]
        if deeper and not any(found for _, found, _ in contents.values()):
            raise ValueError(
                f"{root} has no images in its class folders; they are one level deeper. "
                f"Allowed: {_LAYOUT}. Did you mean {str(root / name)!r}?"
            )
        if deeper:
            raise ValueError(
                f"the class folder {root / name} has images in folders of its own ({_some(deeper)}). "
                "Allowed: images directly in the class folder. Fix: move them up, or out"
            )
        if not images and any(found for _, found, _ in contents.values()):
            raise ValueError(
                f"the class folder {root / name} holds no images ({others} other files). "
                f"Allowed: one image or more ({_suffixes()}). Fix: add images, or delete the folder"
            )
    if not any(found for _, found, _ in contents.values()):
        raise ValueError(f"{root} holds no images ({_suffixes()}). Allowed: {_LAYOUT}. Fix: check the path")
    if len(folders) == 1:
        raise ValueError(
            f"{root} holds one class, {folders[0]!r}. Allowed: two classes or more. "
            "Fix: add a folder with images of something else"
        )
    return _Listing(
        root,
        {name: images for name, (_, images, _) in contents.items()},
        ignored + len(loose) + sum(others for _, _, others in contents.values()),
    )


def _no_classes(root: Path, images: int) -> str:
    if not images:
        return f"{root} holds no images ({_suffixes()}). Allowed: {_LAYOUT}. Fix: check the path"
    parent = root.resolve().parent
    hint = f"put the images into {root / '<class>'}"
    if sum(bool(_entries(parent / name)[1]) for name in _entries(parent)[0]) >= 2:
        return (
            f"{root} holds {images} images and no class folders. "
            f"Allowed: {_LAYOUT}. Did you mean the folder above, {str(parent)!r}?"
        )
    return f"{root} holds {images} images and no class folders. Allowed: {_LAYOUT}. Fix: {hint}"


def _entries(folder: Path) -> tuple[list[str], list[str], int]:
    # sorted names of folders (symbolic links followed) and of images, and the count of other visible files
    folders, images, others = [], [], 0
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            continue
        if path.is_dir():
            folders.append(path.name)
        elif path.suffix.lower() in SUFFIXES:  # a broken link too: the audit names it
            images.append(path.name)
        else:
            others += 1
    return sorted(folders), sorted(images), others


def _summary(root: Path, train: int, val: int, classes: int) -> str:
    return f"{root}: {train} images to train on, {val} to validate, {classes} classes"


def _ignored(count: int) -> tuple[str, ...]:
    return (
        (f"{count} other files were left out (no image suffix, or outside the class folders)",)
        if count
        else ()
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES))
