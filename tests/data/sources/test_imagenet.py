from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from scipy.io import savemat

from normfree.data.sources.open import open_labeled, open_source

WNIDS = (
    "n02119789",
    "n01440764",
    "n02100735",
)  # ILSVRC2012_ID 1, 2, 3 here: not in sorted order, as in the devkit
CLASSES = sorted(WNIDS)
TRUTH = (3, 1, 2, 2)  # of the validation files, in the order of their names
LABELS = [CLASSES.index(WNIDS[number - 1]) for number in TRUTH]
FILES = [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 5)]


def imagenet(root: Path, *, val: str = "val") -> Path:
    for k, wnid in enumerate(WNIDS):
        (root / "train" / wnid).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (4, 4), (k, 0, 0)).save(root / "train" / wnid / f"{wnid}_{i}.JPEG")
    (root / val).mkdir()
    for name in FILES:
        Image.new("RGB", (4, 4)).save(root / val / name)
    return root


def message(root: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(root)
    return str(caught.value)


def held(root: Path) -> list[int]:
    val = open_source(root).val
    assert [Path(val.name(i)).name for i in range(4)] == FILES
    return [val.label(i) for i in range(4)]


def by_wnid(root: Path) -> None:
    text = "".join(f"{name} {CLASSES[label]}\n" for name, label in zip(FILES, LABELS, strict=True))
    (root / "val" / "val_map.txt").write_text(text)


def by_position(root: Path) -> None:
    lines = [f"{name} {label}" for name, label in zip(FILES, LABELS, strict=True)]
    (root / "val.txt").write_text("\n".join(lines[::-1]))


def by_csv(root: Path) -> None:
    rows = [f"{n.removesuffix('.JPEG')},{CLASSES[k]} 1 2 3 4 " for n, k in zip(FILES, LABELS, strict=True)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(rows))


def by_truth(root: Path) -> None:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in TRUTH))


def by_text(root: Path) -> None:
    by_truth(root)
    (root / "map_clsloc.txt").write_text("".join(f"{w} {i} some_name\n" for i, w in enumerate(WNIDS, 1)))


def by_mat(root: Path) -> None:
    import numpy as np

    by_truth(root)
    table = np.zeros(4, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    for i, wnid in enumerate((*WNIDS, "n00001740")):
        table[i] = (float(i + 1), wnid, 0.0)
    savemat(root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", {"synsets": table.reshape(-1, 1)})


@pytest.mark.parametrize("label", [by_wnid, by_position, by_csv, by_text, by_mat])
def test_every_list_of_labels_gives_the_same_classes(tmp_path: Path, label: object) -> None:
    label(imagenet(tmp_path))  # type: ignore[operator]
    split = open_source(tmp_path)
    assert split.classes == split.train.classes == split.val.classes == tuple(CLASSES)
    assert held(tmp_path) == LABELS
    assert [split.train.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [Path(split.train.name(i)).parent.name for i in range(0, 6, 2)] == CLASSES
    assert split.train.image(0).size == (4, 4)
    assert [open_labeled(tmp_path).label(i) for i in range(4)] == LABELS


def test_val_in_class_folders_and_other_layouts_are_as_before(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for wnid in WNIDS:
            (tmp_path / part / wnid).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / wnid / "a.JPEG")
    split = open_source(tmp_path)
    assert (split.classes, len(split.train), len(split.val)) == (tuple(CLASSES), 3, 3)


def test_a_flat_test_folder_without_labels_is_no_validation_part(tmp_path: Path) -> None:
    imagenet(tmp_path, val="test")
    split = open_source(tmp_path)
    assert (len(split.train), len(split.val)) == (3, 3)


def test_errors_of_the_layout(tmp_path: Path) -> None:
    val = imagenet(tmp_path) / "val"
    assert message(tmp_path) == (
        f"{val} holds 4 images and no class folders. Allowed: a label file (val.txt, val_map.txt, "
        "LOC_val_solution.csv, "
        "ILSVRC2012_validation_ground_truth.txt) next to train/ or in val/, or val/ in class folders like train/. "
        "Fix: add val.txt."
    )
    by_truth(tmp_path)
    truth = tmp_path / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    assert message(tmp_path) == (
        f"{truth} holds numbers that only the devkit explains. Allowed: map_clsloc.txt or meta.mat next to it. "
        "Fix: copy meta.mat from ILSVRC2012_devkit_t12/data."
    )
    truth.write_text("1\n2\n")
    assert message(tmp_path) == (
        f"{truth} has 2 labels for 4 images in {val}. Allowed: one for each, in the order of their names. "
        "Fix: unpack the archive of validation images again."
    )
    (tmp_path / "val.txt").write_text(f"{FILES[0]} 1\n")
    assert message(tmp_path) == (
        f"{tmp_path / 'val.txt'} has no label for {FILES[1]!r} of {val}. Allowed: one for each. Fix: complete it."
    )
    for spec in ("3", "-1", "n99999999"):
        (tmp_path / "val.txt").write_text("".join(f"{name} {spec}\n" for name in FILES))
        assert message(tmp_path) == (
            f"{tmp_path / 'val.txt'} gives {FILES[0]!r} the class {spec!r}. Allowed: a class folder of "
            f"{tmp_path / 'train'}, or its index from 0 to 2. Fix: use the list of this data set."
        )


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    by_wnid(imagenet(tmp_path))
    (tmp_path / "train" / "n00000001").mkdir()
    assert message(tmp_path) == (
        f"the class folder {tmp_path / 'train' / 'n00000001'} holds no images. Allowed: two classes or more, with "
        "images in each. Fix: unpack the archives again."
    )


def test_without_scipy_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_mat(imagenet(tmp_path))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'meta\.mat needs scipy, .* pip install "normfree\[imagenet\]"\.$'
    ):
        open_source(tmp_path)
