"""A folder of images: find the classes, refuse layouts that would train wrongly, and split off validation images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from normfree.data.encoded import EncodedSource
from normfree.data.source import Split
from normfree.data.subset import check_val_fraction, hash_split, summary
from normfree.data.transforms.decode import MAX_PIXELS, SUFFIXES
from normfree.suggest import problem

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first one found is used
_LITTER = {"__macosx", "thumbs.db", "desktop.ini"}  # files of file managers
_LAYOUT = "one folder of images per class, or train/ and val/ with one such folder per class"


class FolderSource(EncodedSource):
    """A source of labeled image files; `samples` lists (path relative to `root`, class number)."""

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
        """Return the class of file `index`."""
        return self._samples[index][1]

    def data(self, index: int) -> str:
        """Return the path of file `index`."""
        return self.name(index)

    def name(self, index: int) -> str:
        """Return the path of file `index`."""
        return str(self._root / self._samples[index][0])


@dataclass(frozen=True)
class _Listing:
    """The class folders of `root` and their images."""

    root: Path
    files: dict[str, list[str]]  # class -> file names, both sorted
    ignored: int  # visible files that are not images, and images outside the class folders

    def samples(self) -> list[tuple[str, int]]:
        """Return (path relative to `root`, class number) of all images."""
        return [(f"{c}/{name}", k) for k, (c, names) in enumerate(self.files.items()) for name in names]


def open_folder(root: Path, *, val_fraction: float, seed: int) -> Split:
    """Return the split of a folder: `train/` and `val/` (or `validation/`, `valid/`, `test/`) if it has them.

    Otherwise every class gives `val_fraction` of its files to validation, chosen by a hash of (seed, class, file
    name): the same files in every run, and mostly the same ones after files are added (`hash_split`). Classes are the
    sorted folder names. Hidden files are skipped, and files without an image suffix are counted.

    Raises:
        ValueError: The layout would train wrongly, for instance class folders that differ between train/ and val/.
    """
    check_val_fraction(val_fraction)
    train_root, val_root = _part(root, TRAIN_NAMES), _part(root, VAL_NAMES)
    if train_root is not None and val_root is not None:
        return _two_folders(root, _listing(train_root), _listing(val_root))
    return _one_folder(_listing(train_root or root), val_fraction=val_fraction, seed=seed)


def open_labeled_folder(root: Path) -> FolderSource:
    """Return the labeled images to evaluate a network on: the validation images if the folder has some, else all."""
    listing = _listing(_part(root, VAL_NAMES) or root)
    return FolderSource(listing.root, listing.samples(), classes=tuple(listing.files))


def _two_folders(root: Path, train: _Listing, val: _Listing) -> Split:
    """Return the split of a training and a validation folder with the same classes."""
    only_train, only_val = (sorted(a.files.keys() - b.files.keys()) for a, b in ((train, val), (val, train)))
    if only_train or only_val:
        odd = [
            f"only in {part.root.name}/: {_some(names)}"
            for part, names in ((train, only_train), (val, only_val))
            if names
        ]
        raise ValueError(
            problem(
                f"{train.root} and {val.root} have different classes ({'; '.join(odd)})",
                allowed="the same class folders in both",
                fix="rename or remove the others",
            )
        )
    sources = [FolderSource(part.root, part.samples(), classes=tuple(part.files)) for part in (train, val)]
    notes = [summary(str(root), *sources), f"validation is {val.root.name}/"]
    unused = [name for name in VAL_NAMES if name != val.root.name and (root / name).is_dir()]
    notes += [f"{name}/ was not used" for name in unused]
    return Split(
        train=sources[0],
        val=sources[1],
        classes=tuple(train.files),
        notes=(*notes, *_ignored(train.ignored + val.ignored)),
        files=True,
    )


def _one_folder(listing: _Listing, *, val_fraction: float, seed: int) -> Split:
    """Return the split of one folder by a hash of the file names."""
    samples = listing.samples()
    train, val = hash_split(
        FolderSource(listing.root, samples, classes=tuple(listing.files)),
        val_fraction=val_fraction,
        seed=seed,
        ident=lambda index: samples[index][0].partition("/")[2],
        what=str(listing.root),
        fix="add images, or a val/ folder next to train/",
    )
    notes = (
        summary(str(listing.root), train, val),
        f"validation is {100 * val_fraction:g} % of each class, the same files in every run with this seed",
        *_ignored(listing.ignored),
    )
    return Split(
        train=train,
        val=val,
        classes=tuple(listing.files),
        notes=notes,
        files=True,
    )


def _part(root: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of the folders `names` in `root` that has class folders.

    A folder named "train" that contains images is a class (of locomotives), not the training data.
    """
    for name in names:
        folders, images, _ = _entries(root / name) if (root / name).is_dir() else ([], [], 0)
        if folders and not images:
            return root / name
    return None


def _listing(root: Path) -> _Listing:
    """Return the classes and images of `root`; raise `ValueError` for a layout that would train wrongly."""
    folders, loose, ignored = _entries(root)
    if not folders:
        raise ValueError(_no_classes(root, len(loose)))
    contents = {name: _entries(root / name) for name in folders}
    for name, (inner, images, others) in contents.items():
        deeper = [folder for folder in inner if _entries(root / name / folder)[1]]
        if deeper and not any(found for _, found, _ in contents.values()):
            raise ValueError(
                problem(
                    f"{root} has no images in its class folders; they are one level deeper",
                    allowed=f"{_LAYOUT}. Did you mean {str(root / name)!r}?",
                )
            )
        if deeper:
            raise ValueError(
                problem(
                    f"the class folder {root / name} has images in folders of its own ({_some(deeper)})",
                    allowed="images directly in the class folder",
                    fix="move them up, or out",
                )
            )
        if not images and any(found for _, found, _ in contents.values()):
            raise ValueError(
                problem(
                    f"the class folder {root / name} holds no images ({others} other files)",
                    allowed=f"one image or more ({_suffixes()})",
                    fix="add images, or delete the folder",
                )
            )
    if not any(found for _, found, _ in contents.values()):
        raise ValueError(
            problem(f"{root} holds no images ({_suffixes()})", allowed=_LAYOUT, fix="check the path")
        )
    if len(folders) == 1:
        raise ValueError(
            problem(
                f"{root} holds one class, {folders[0]!r}",
                allowed="two classes or more",
                fix="add a folder with images of something else",
            )
        )
    return _Listing(
        root,
        {name: images for name, (_, images, _) in contents.items()},
        ignored + len(loose) + sum(others for _, _, others in contents.values()),
    )


def _no_classes(root: Path, images: int) -> str:
    """Return the error message for a folder without class folders."""
    if not images:
        return problem(f"{root} holds no images ({_suffixes()})", allowed=_LAYOUT, fix="check the path")
    given = f"{root} holds {images} images and no class folders"
    parent = root.resolve().parent
    if sum(bool(_entries(parent / name)[1]) for name in _entries(parent)[0]) >= 2:
        return problem(given, allowed=f"{_LAYOUT}. Did you mean the parent folder, {str(parent)!r}?")
    return problem(given, allowed=_LAYOUT, fix=f"put the images into {root / '<class>'}")


def _entries(folder: Path) -> tuple[list[str], list[str], int]:
    """Return the sorted names of folders (following symbolic links) and of images, and the number of other files."""
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


def _ignored(count: int) -> tuple[str, ...]:
    """Return a note if files were left out."""
    return (
        (f"{count} other files were left out (no image suffix, or outside the class folders)",)
        if count
        else ()
    )


def _some(names: Sequence[str]) -> str:
    """Return the first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _suffixes() -> str:
    """Return the image suffixes for messages."""
    return " ".join(sorted(SUFFIXES))
