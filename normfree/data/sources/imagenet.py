"""ImageNet as published: train/ in class folders, and val/ as one flat folder of 50,000 files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normfree.data.source import Split
from normfree.data.sources.folders import FolderSource
from normfree.data.subset import make_split
from normfree.data.transforms.decode import suffixes
from normfree.data.walk import is_litter, list_folder
from normfree.files import read_bytes, read_csv, read_text
from normfree.suggest import needs, problem

VAL_NAMES = ("val", "validation", "valid")
_WNID = r"n\d{8}"
# Usual names of the label file of the flat folder, the simplest format first.
LABEL_FILES = ("val.txt", "val_map.txt", "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt")
_TRUTH = LABEL_FILES[-1]
# Folders, relative to the root, in which unpacked archives leave the label file.
_FOLDERS = ("", "..", "../..", "data", "devkit/data", "ILSVRC2012_devkit_t12/data")
_BYTES = 20_000_000  # of a label file; the largest published one has 2 MB
_MAT_BYTES = 1_000_000  # of meta.mat, which is compressed
_NUMBERS = ("map_clsloc.txt", "meta.mat")  # tables of the numbers in the ground truth
_LAYOUT = (
    f"a label file ({', '.join(LABEL_FILES)}) next to train/ or in val/, or val/ in class folders like train/"
)


def find_imagenet(root: Path) -> bool:
    """Return True if `root` has a train/ of class folders, and a flat val/ (validation/, valid/) of images."""
    train, val = _parts(root)
    return train is not None and val is not None


def open_imagenet(root: Path, *, test_fraction: float = 0.0, seed: int = 0) -> Split:
    """Return the split of train/ and the flat val/, whose labels come from a file.

    The file is next to train/, inside val/, one or two folders above, or in the unpacked devkit, and is one of

    - val.txt, val_map.txt: "FILE CLASS" in each line, where CLASS is the name of a class folder, or its index
      (from 0) in the sorted names;
    - LOC_val_solution.csv: "ImageId,PredictionString"; the string begins with the name of the class folder;
    - ILSVRC2012_validation_ground_truth.txt: a number for each file in the order of their names. These numbers
      (ILSVRC2012_ID, from 1) are not indices into the sorted names; map_clsloc.txt or meta.mat of the devkit
      translates them (the latter needs SciPy: extra `imagenet`).

    Classes are the sorted folder names of train/, the order of the released weights. With `test_fraction`, that
    fraction of each class of train/ is the test part, chosen by a hash of `seed` and the file name.

    Raises:
        ValueError: The label file is missing or incomplete, or names an unknown class.
    """
    train_root, val_root = _parts(root)
    assert train_root is not None
    assert val_root is not None
    classes = list_folder(train_root).folders
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
            problem(what, allowed="two classes or more, with images in each", fix="unpack the archives again")
        )
    files = [file.name for file in _images(val_root, sort=True)]
    path, labels = _labels(root, val_root, files, classes)
    held = [(name, labels[name]) for name in files]
    own = FolderSource(train_root, samples, classes=classes)
    val = FolderSource(val_root, held, classes=classes)
    split = make_split(
        str(root), own, val, val_fraction=0.1, test_fraction=test_fraction, seed=seed, ident=own.ident
    )
    first, _, *more = split.notes
    how = f"validation is {val_root.name}/ with the labels of {path.name}"
    return replace(split, notes=(first, how, *more))


def _parts(root: Path) -> tuple[Path | None, Path | None]:
    """Return train/ if it has class folders, and the validation folder if it is flat."""
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
    """Return the entries that are not hidden."""
    return [p for p in folder.iterdir() if not is_litter(p.name)]


def _images(folder: Path, *, sort: bool, first: bool = False) -> list[Path]:
    """Return the images of a folder, or with `first` only one of them."""
    found = []
    for path in folder.iterdir():
        if path.suffix.lower() in suffixes() and not is_litter(path.name):
            found.append(path)
            if first:
                break
    return sorted(found) if sort else found


def _labels(
    root: Path, val: Path, files: Sequence[str], classes: Sequence[str]
) -> tuple[Path, dict[str, int]]:
    """Return the label file, and the class number of each of `files`."""
    for name in LABEL_FILES:
        path = _find(root, val, name)
        if path is None:
            continue
        texts = _truth(root, val, path, files) if name == _TRUTH else _mapping(path)
        numbers = {text: number for number, text in enumerate(classes)}
        digits = all(text.isdecimal() for text in texts.values()) and not any(c.isdecimal() for c in classes)
        labels: dict[str, int] = {}
        for file in files:
            text = texts.get(file) or texts.get(file.partition(".")[0])
            if text is None:
                raise ValueError(
                    problem(
                        f"{path} has no label for {file!r} of {val}",
                        allowed="one for each",
                        fix="complete it",
                    )
                )
            number = int(text) if digits else numbers.get(text, -1)
            if not 0 <= number < len(classes):
                raise ValueError(
                    problem(
                        f"{path} gives {file!r} the class {text!r}",
                        allowed=f"a class folder of {root / 'train'}, or its index from 0 to {len(classes) - 1}",
                        fix="use the list of this data set",
                    )
                )
            labels[file] = number
        return path, labels
    raise ValueError(
        problem(f"{val} holds {len(files)} images and no class folders", allowed=_LAYOUT, fix="add val.txt")
    )


def _find(root: Path, val: Path, name: str) -> Path | None:
    """Return the file `name` in the folders where unpacked archives leave it, or None."""
    paths = [val / name, *(root / folder / name for folder in _FOLDERS)]
    return next((path for path in paths if path.is_file()), None)


def _mapping(path: Path) -> dict[str, str]:
    """Return the class as it is written in the label file, by file name."""
    if path.suffix == ".csv":
        header, *rows = read_csv(path, limit=_BYTES) or [[]]
        known = (dict(zip(header, row, strict=False)) for row in rows)
        pairs = [(row.get("ImageId"), row.get("PredictionString")) for row in known]
        return {image: text.split()[0] for image, text in pairs if image and text and text.split()}
    found: dict[str, str] = {}
    for line in read_text(path, limit=_BYTES).splitlines():
        name, _, text = line.strip().rpartition(" ")
        if name:
            found[name.strip().rpartition("/")[2]] = text
    return found


def _truth(root: Path, val: Path, path: Path, files: Sequence[str]) -> dict[str, str]:
    """Return the class folder of each of `files`, from the numbers of the ground truth and a table of the devkit."""
    numbers = read_text(path, limit=_BYTES).split()
    if len(numbers) != len(files):
        raise ValueError(
            problem(
                f"{path} has {len(numbers)} labels for {len(files)} images in {val}",
                allowed="one for each, in the order of their names",
                fix="unpack the archive of validation images again",
            )
        )
    for name in _NUMBERS:
        where = path.parent / name if (path.parent / name).is_file() else _find(root, val, name)
        if where is not None:
            table = _from_text(where) if name == "map_clsloc.txt" else _from_mat(where)
            odd = next((number for number in numbers if number not in table), None)
            if odd is not None:
                raise ValueError(
                    problem(
                        f"{path} has the number {odd}, which {where} does not",
                        allowed="two files of one devkit",
                        fix="take both from one devkit",
                    )
                )
            return {file: table[number] for file, number in zip(files, numbers, strict=True)}
    raise ValueError(
        problem(
            f"{path} holds numbers that only the devkit explains",
            allowed=f"{' or '.join(_NUMBERS)} next to it",
            fix="copy meta.mat from ILSVRC2012_devkit_t12/data",
        )
    )


def _from_text(path: Path) -> dict[str, str]:
    """Return class folder by number, from lines such as "n02119789 1 kit_fox"."""
    found = re.findall(rf"^({_WNID}) (\d+)\b", read_text(path, limit=_BYTES), flags=re.M)
    return {number: wnid for wnid, number in found}


def _from_mat(path: Path) -> dict[str, str]:
    """Return class folder by number, from the devkit's meta.mat."""
    with needs(str(path), install="normfree[imagenet]"):
        from scipy.io import loadmat
    try:
        rows: Any = loadmat(io.BytesIO(read_bytes(path, limit=_MAT_BYTES)), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # damaged files raise many types
        raise ValueError(
            problem(
                f"{path} is no table of synsets ({error})",
                allowed="meta.mat as published",
                fix="copy it again",
            )
        ) from None
