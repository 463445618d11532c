"""A folder of images: find the parts and the classes, refuse layouts that would train wrongly, split off validation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normfree.data.encoded import EncodedSource
from normfree.data.source import Source, Split
from normfree.data.subset import check_fractions, make_split
from normfree.data.transforms.decode import FULL_RANGE, MAX_PIXELS, suffixes
from normfree.data.walk import left_out, list_folder, unreadable_images
from normfree.suggest import number_of, problem

# The strings in the name of a folder that make it a part, as in "Training", "seg_train" or "test-images". Of several
# folders, the one whose string comes first is used.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing"),
}
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
        pixel_range: int = FULL_RANGE,
    ) -> None:
        self.classes = tuple(classes)
        self._root = root
        self._samples = list(samples)
        super().__init__(background=background, max_pixels=max_pixels, pixel_range=pixel_range)

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

    def ident(self, index: int) -> str:
        """Return the path of file `index` in its class folder, which does not change when the data are moved."""
        return self._samples[index][0].partition("/")[2] or self._samples[index][0]


@dataclass(frozen=True)
class ImageLimits:
    """How the files of a data set are decoded: the largest width times height, and white in 16-bit gray images."""

    max_pixels: int = MAX_PIXELS
    pixel_range: int = FULL_RANGE


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class _Listing:
    """The class folders of `root` and their images."""

    root: Path
    files: dict[str, tuple[str, ...]]  # class -> file names, both sorted
    others: Counter[str]  # files that are not images, by suffix
    outside: int  # images outside the class folders

    def source(self, classes: Sequence[str], limits: ImageLimits) -> FolderSource:
        """Return the source of all images, with labels that are indices into `classes`."""
        numbers = {name: number for number, name in enumerate(classes)}
        samples = [(f"{c}/{name}", numbers[c]) for c, names in self.files.items() for name in names]
        return FolderSource(
            self.root, samples, classes=classes, max_pixels=limits.max_pixels, pixel_range=limits.pixel_range
        )


def open_folder(
    root: Path,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Split:
    """Return the split of a folder: its parts, such as `train/`, `valid/` and `Testing/`, or fractions of its classes.

    A part is a folder of class folders whose name contains one of `PARTS`. Parts that are missing are taken from the
    training data: every class gives `val_fraction` of its files to validation, and `test_fraction` to the test, chosen
    by a hash of (seed, class, file name): the same files in every run, and mostly the same ones after files are added
    (`hash_split`). Classes are the sorted folder names. A folder that holds nothing but one folder with the data is
    entered. Hidden files are skipped, and files without an image suffix are counted.

    Raises:
        ValueError: The layout would train wrongly, for instance class folders of val/ that train/ does not have.
    """
    check_fractions(val_fraction, test_fraction)
    given, root = root, unwrapped(root)
    parts = find_parts(root)
    train = _listing(parts["train"].root if "train" in parts else root, training=True)
    classes = tuple(train.files)
    held: dict[str, _Listing] = {}
    for part in ("val", "test"):
        if "train" in parts and part in parts:
            held[part] = _listing(parts[part].root)
            _check_known(train, held[part])
    sources: dict[str, Source] = {part: listing.source(classes, limits) for part, listing in held.items()}
    own = train.source(classes, limits)
    split = make_split(
        str(root), own, sources.get("val"), test=sources.get("test"), val_fraction=val_fraction,
        test_fraction=test_fraction, seed=seed, ident=own.ident, fix="add images, or a val/ folder next to train/",
    )  # fmt: skip
    first, how, *more = split.notes
    if "val" in held:
        how = f"validation is {parts['val'].shown}/"
    notes = [first, how, *([f"the test part is {parts['test'].shown}/"] if "test" in held else []), *more]
    if root != given:
        notes.append(f"{given} holds one folder, {root.relative_to(given)}/, which was taken for the data")
    notes += [f"{name}/ was not used" for name in _unused(root, parts) if "train" in parts]
    for part, listing in held.items():
        missing = [name for name in classes if not listing.files.get(name)]
        if missing:
            notes.append(f"{parts[part].shown}/ has no images of {_some(missing)}")
    listings = (train, *held.values())
    others = sum((listing.others for listing in listings), Counter[str]())
    notes += left_out(others, outside=sum(listing.outside for listing in listings))
    return replace(split, notes=tuple(notes))


def open_labeled_folder(
    root: Path, *, limits: ImageLimits = DEFAULT_LIMITS, part: str = "val"
) -> FolderSource:
    """Return the labeled images to evaluate a network on: a held-out part if the folder has one, else all images.

    Args:
        root: The folder.
        limits: How its files are decoded.
        part: The part to use if there is a choice, "val" or "test".
    """
    root = unwrapped(root)
    parts = find_parts(root)
    order = [part, *(name for name in ("val", "test", "train") if name != part)]
    found = next((parts[name].root for name in order if name in parts), root)
    listing = _listing(found)
    return listing.source(tuple(listing.files), limits)


# --- parts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundPart:
    """A part of a data set: the folder of its class folders, and the name of its folder in the root."""

    root: Path
    shown: str


def part_of(name: str) -> tuple[str, int] | None:
    """Return which part the name of a folder states, and the position of the string that states it in PARTS.

    >>> part_of("Training"), part_of("seg_test"), part_of("train_val"), part_of("trains")
    (('train', 1), ('test', 0), None, None)
    """
    tokens = re.split(r"[^a-z]+", name.lower())
    hits = [(part, known.index(t)) for part, known in PARTS.items() for t in tokens if t in known]
    return hits[0] if len({part for part, _ in hits}) == 1 else None


def find_parts(root: Path) -> dict[str, FoundPart]:
    """Return the parts in a folder by "train", "val" and "test".

    A folder named "train" that contains images is a class (of locomotives), not the training data.
    """
    found: dict[str, tuple[tuple[int, int], FoundPart]] = {}
    for name in list_folder(root).folders:
        stated = part_of(name)
        if stated is None:
            continue
        inner = unwrapped(root / name)
        entries = list_folder(inner)
        rank = (stated[1], len(name))
        if entries.folders and not entries.images and (stated[0] not in found or rank < found[stated[0]][0]):
            found[stated[0]] = (rank, FoundPart(inner, name))
    return {part: best for part, (_, best) in found.items()}


def unwrapped(root: Path) -> Path:
    """Return the folder of the data: while a folder holds one folder of folders and no images, that one is entered.

    Unpacked archives often have such a layout, as in seg_train/seg_train/.
    """
    for _ in range(8):  # a link may lead to a folder above it
        entries = list_folder(root)
        if len(entries.folders) != 1 or entries.images:
            break
        inner = root / entries.folders[0]
        inside = list_folder(inner)
        # A folder of folders without images in them is a layout that is not known.
        if (
            not inside.folders
            or inside.images
            or (part_of(inner.name) and part_of(root.name) != part_of(inner.name))
        ):
            break
        root = inner
    return root


def _unused(root: Path, parts: dict[str, FoundPart]) -> list[str]:
    """Return the names of the folders in `root` that are no part."""
    used = {part.shown for part in parts.values()}
    return [name for name in list_folder(root).folders if name not in used]


# --- class folders --------------------------------------------------------------------------------------------


def _check_known(train: _Listing, held: _Listing) -> None:
    """Raise `ValueError` if a held-out part has images of classes that the training part does not have."""
    unknown = [name for name, files in held.files.items() if files and name not in train.files]
    if unknown:
        raise ValueError(
            problem(
                f"{held.root} has classes that {train.root} does not have: {_some(unknown)}",
                allowed=f"class folders with the names of those in {train.root.name}/; some may be missing",
                fix="rename or remove the others",
            )
        )
    for name in [name for name in held.files if name not in train.files]:
        del held.files[name]  # an empty folder


def _listing(root: Path, *, training: bool = False) -> _Listing:
    """Return the classes and images of `root`; raise `ValueError` for a layout that would train wrongly.

    In a held-out part, a class folder may be empty, and one class is enough.
    """
    top = list_folder(root)
    if not top.folders:
        raise ValueError(_no_classes(root, len(top.images), top.others))
    contents = {name: list_folder(root / name) for name in top.folders}
    any_images = any(entries.images for entries in contents.values())
    others = sum((entries.others for entries in contents.values()), top.others)
    for name, entries in contents.items():
        deeper = [folder for folder in entries.folders if list_folder(root / name / folder).images]
        if deeper and not any_images:
            raise ValueError(_one_deeper(root, contents.keys()))
        if deeper:
            raise ValueError(
                problem(
                    f"the class folder {root / name} has images in folders of its own ({_some(deeper)})",
                    allowed="images directly in the class folder",
                    fix="move them up, or out",
                )
            )
        if training and not entries.images and any_images:
            count = sum(entries.others.values())
            raise ValueError(
                problem(
                    f"the class folder {root / name} holds no images ({number_of(count, 'other file')})",
                    allowed=f"one image or more ({_suffixes()})",
                    fix=unreadable_images(entries.others) or "add images, or delete the folder",
                )
            )
    if not any_images:
        raise ValueError(
            problem(
                f"{root} holds no images ({_suffixes()})",
                allowed=_LAYOUT,
                fix=unreadable_images(others) or "check the path",
            )
        )
    if training and len(top.folders) == 1:
        raise ValueError(
            problem(
                f"{root} holds one class, {top.folders[0]!r}",
                allowed="two classes or more",
                fix="add a folder with images of something else, or, to train without labels, "
                f"pass {root / top.folders[0]}",
            )
        )
    files = {name: entries.images for name, entries in contents.items()}
    return _Listing(root, files, others, len(top.images))


def _one_deeper(root: Path, names: Sequence[str] | object) -> str:
    """Return the error message for a folder whose images are two levels below it; never advise a test part."""
    assert hasattr(names, "__iter__")
    inner = [name for name in names if list_folder(root / name).folders]
    trains = [name for name in inner if (stated := part_of(name)) and stated[0] == "train"]
    given = f"{root} has no images in its class folders; they are one level deeper, in {_some(inner)}"
    if len(trains) == 1:
        return problem(given, allowed=f"{_LAYOUT}. Did you mean {str(root / trains[0])!r}?")
    fix = "give the folder that holds the class folders to train on, or name the parts train/, val/ and test/"
    return problem(given, allowed=_LAYOUT, fix=fix)


def _no_classes(root: Path, images: int, others: Counter[str]) -> str:
    """Return the error message for a folder without class folders."""
    if not images:
        fix = unreadable_images(others) or "check the path"
        return problem(f"{root} holds no images ({_suffixes()})", allowed=_LAYOUT, fix=fix)
    given = f"{root} holds {number_of(images, 'image')} and no class folders"
    found = (p for where in (root, root.parent) for p in where.glob("*.csv"))
    tables = sorted(found, key=lambda path: (path.stem != root.name, path))
    if tables:
        return problem(given, allowed=_LAYOUT) + f" Did you mean the table of labels, {str(tables[0])!r}?"
    parent = root.resolve().parent
    siblings = [name for name in list_folder(parent).folders if list_folder(parent / name).images]
    if len(siblings) >= 2 and part_of(root.name) is None:
        return problem(given, allowed=f"{_LAYOUT}. Did you mean the parent folder, {str(parent)!r}?")
    return problem(
        given, allowed=_LAYOUT, fix=f"put the images into {root / '<class>'}, or give a CSV file of labels"
    )


def _some(names: Sequence[str]) -> str:
    """Return the first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _suffixes() -> str:
    """Return the image suffixes for messages."""
    return " ".join(sorted(suffixes()))
