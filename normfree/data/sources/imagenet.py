"""ImageNet as it is published: train/ in class folders, and a val/ that is one folder of 50,000 files."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.data.source import Split
from normfree.data.sources.folders import FolderSource
from normfree.data.subset import AUDIT_LIMIT
from normfree.data.transforms.decode import SUFFIXES

VAL_NAMES = ("val", "validation", "valid")
_WNID = r"n\d{8}"
# The words under which the labels of the flat folder are passed on, the plainest first.
LABEL_FILES = ("val.txt", "val_map.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
_TRUTH = LABEL_FILES[-1]
_FOLDERS = (
    "",
    "..",
    "../..",
    "data",
    "devkit/data",
    "ILSVRC2012_devkit_t12/data",
)  # where unpacked archives leave them
_NUMBERS = ("map_clsloc.txt", "meta.mat")  # what the numbers of the ground truth mean
_LAYOUT = (
    f"a label file ({', '.join(LABEL_FILES)}) beside train/ or in val/, or val/ in class folders like train/"
)


def find_imagenet(root: Path) -> bool:
    """Whether `root` has a train/ of class folders, and a val/ (validation/, valid/) of loose images."""
    train, val = _parts(root)
    return train is not None and val is not None


def open_imagenet(root: Path) -> Split:
    """Train on train/, validate on the flat val/ with the labels of a file.

    The file lies beside train/, inside val/, one or two folders above, or in the unpacked devkit, and is one of

    - val.txt, val_map.txt: "FILE CLASS" in each line, where CLASS is the name of a class folder, or its position
      (from 0) in the sorted names;
    - LOC_val_solution.csv: "ImageId,PredictionString", the class folder is the string's first word;
    - ILSVRC2012_validation_ground_truth.txt: a number for each file in the order of their names. These numbers
      (ILSVRC2012_ID, from 1) are not positions in the sorted names; map_clsloc.txt or meta.mat of the devkit
      says what they mean (the latter needs SciPy: extra `imagenet`).

    Classes are the sorted folder names of train/, the order of the released weights. Raises `ValueError` for a
    missing or partial list, an unknown class, and a val/ file without a label.
    """
    train_root, val_root = _parts(root)
    assert train_root is not None
    assert val_root is not None
    classes = sorted(p.name for p in _visible(train_root) if p.is_dir())
    samples = [
        (f"{name}/{file.name}", number)
        for number, name in enumerate(classes)
        for file in _images(train_root / name, sort=True)
    ]
    empty = sorted(set(range(len(classes))) - {number for _, number in samples})
    if empty or len(classes) < 2:
        what = (
            f"the class folder {train_root / classes[empty[0]]} holds no images"
            if empty
            else f"{train_root} holds one class"
        )
        raise ValueError(
            f"{what}. Allowed: two classes or more, with images in each. Fix: unpack the archives again"
        )
    files = [file.name for file in _images(val_root, sort=True)]
    path, labels = _labels(root, val_root, files, classes)
    held = [(name, labels[name]) for name in files]
    total = len(samples) + len(held)
    notes = [
        f"{root}: {len(samples)} images to train on, {len(held)} to validate, {len(classes)} classes",
        f"validation is {val_root.name}/ with the labels of {path.name}",
    ]
    if total > AUDIT_LIMIT:
        notes.append(
            f"{total} images are too many to open each before training; a bad one stops the run by name"
        )
    return Split(
        train=FolderSource(train_root, samples, classes=classes),
        val=FolderSource(val_root, held, classes=classes),
        classes=tuple(classes),
        notes=tuple(notes),
        files=total <= AUDIT_LIMIT,
    )


def _parts(root: Path) -> tuple[Path | None, Path | None]:
    train = root / "train"
    if (
        not train.is_dir()
        or not any(p.is_dir() for p in _visible(train))
        or _images(train, sort=False, first=True)
    ):
        return None, None
    for name in VAL_NAMES:
        val = root / name
        if val.is_dir():
            flat = _images(val, sort=False, first=True) and not any(p.is_dir() for p in _visible(val))
            return train, val if flat else None
    return train, None


def _visible(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")]


def _images(folder: Path, *, sort: bool, first: bool = False) -> list[Path]:
    found = []
    for path in folder.iterdir():
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            found.append(path)
            if first:
                break
    return sorted(found) if sort else found


def _labels(
    root: Path, val: Path, files: Sequence[str], classes: Sequence[str]
) -> tuple[Path, dict[str, int]]:
    for name in LABEL_FILES:
        path = _find(root, val, name)
        if path is None:
            continue
        words = _truth(root, val, path, files) if name == _TRUTH else _mapping(path)
        positions = {word: number for number, word in enumerate(classes)}
        digits = all(word.isdecimal() for word in words.values()) and not any(c.isdecimal() for c in classes)
        labels: dict[str, int] = {}
        for file in files:
            word = words.get(file) or words.get(file.partition(".")[0])
            if word is None:
                raise ValueError(
                    f"{path} has no label for {file!r} of {val}. Allowed: one for each. Fix: complete it"
                )
            number = int(word) if digits else positions.get(word, -1)
            if not 0 <= number < len(classes):
                low = f"a class folder of {root / 'train'}, or its position from 0 to {len(classes) - 1}"
                raise ValueError(
                    f"{path} gives {file!r} the class {word!r}. Allowed: {low}. Fix: use the list of this set"
                )
            labels[file] = number
        return path, labels
    raise ValueError(
        f"{val} holds {len(files)} images and no class folders. Allowed: {_LAYOUT}. Fix: add val.txt"
    )


def _find(root: Path, val: Path, name: str) -> Path | None:
    places = [val / name, *(root / folder / name for folder in _FOLDERS)]
    return next((path for path in places if path.is_file()), None)


def _mapping(path: Path) -> dict[str, str]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row.get("ImageId"), row.get("PredictionString")) for row in csv.DictReader(file)]
        return {image: words.split()[0] for image, words in rows if image and words and words.split()}
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, word = line.strip().rpartition(" ")
        if name:
            found[name.strip().rpartition("/")[2]] = word
    return found


def _truth(root: Path, val: Path, path: Path, files: Sequence[str]) -> dict[str, str]:
    numbers = path.read_text(encoding="utf-8").split()
    if len(numbers) != len(files):
        raise ValueError(
            f"{path} has {len(numbers)} labels for {len(files)} images in {val}. Allowed: one for each, in the order "
            "of their names. Fix: unpack the archive of validation images again"
        )
    for name in _NUMBERS:
        where = path.parent / name if (path.parent / name).is_file() else _find(root, val, name)
        if where is not None:
            table = _from_text(where) if name == "map_clsloc.txt" else _from_mat(where)
            odd = next((number for number in numbers if number not in table), None)
            if odd is not None:
                raise ValueError(
                    f"{path} has the number {odd}, which {where} does not. Allowed: a pair. "
                    "Fix: take both from one devkit"
                )
            return {file: table[number] for file, number in zip(files, numbers, strict=True)}
    raise ValueError(
        f"{path} gives numbers whose meaning is in the devkit. Allowed: {' or '.join(_NUMBERS)} beside it. "
        "Fix: copy meta.mat from ILSVRC2012_devkit_t12/data"
    )


def _from_text(path: Path) -> dict[str, str]:
    # "n02119789 1 kit_fox"
    found = re.findall(rf"^({_WNID}) (\d+)\b", path.read_text(encoding="utf-8"), flags=re.M)
    return {number: wnid for wnid, number in found}


def _from_mat(path: Path) -> dict[str, str]:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs SciPy: pip install 'normfree[imagenet]'") from None
    try:
        rows: Any = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # a damaged file raises many things
        raise ValueError(
            f"{path} is no table of synsets ({error}). Allowed: meta.mat as published. Fix: copy it again"
        ) from None
