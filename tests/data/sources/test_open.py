from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normfree.data.sources.open import open_labeled, open_source
from normfree.data.transforms.decode import suffixes

LAYOUT = "one folder of images per class, or train/ and val/ with one such folder per class"
SUFFIXES = " ".join(sorted(suffixes()))
NAMES = (
    "emoji, cifar10, cifar100, fashion_mnist, synthetic, folder:..., csv:..., shards:..., packed:..., nested:..., "
    "hf:..."
)


def fill(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(root / name / f"{i:03}.png")
    return root


def message(data: str | Path, **options: object) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(data, **options)  # type: ignore[arg-type]
    return str(caught.value)


def names(split: object, part: str, root: Path) -> list[str]:
    source = getattr(split, part)
    return [str(Path(source.name(i)).relative_to(root)) for i in range(len(source))]


def test_a_folder_with_train_and_val(tmp_path: Path) -> None:
    fill(tmp_path / "train", dog=3, cat=2)
    fill(tmp_path / "val", cat=1, dog=1)
    split = open_source(tmp_path)
    assert split.classes == split.train.classes == split.val.classes == ("cat", "dog")
    assert [split.train.label(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert names(split, "train", tmp_path)[:3] == [
        "train/cat/000.png",
        "train/cat/001.png",
        "train/dog/000.png",
    ]
    assert names(split, "val", tmp_path) == ["val/cat/000.png", "val/dog/000.png"]
    assert split.train.image(3).getpixel((0, 0)) == (1, 0, 0)
    assert split.files
    assert split.notes == (
        f"{tmp_path}: 5 images to train on, 2 to validate, 2 classes",
        "validation is val/",
    )


@pytest.mark.parametrize("name", ["val", "validation", "valid", "Valid", "dev", "val_images"])
def test_other_names_of_the_validation_part(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "train", a=1, b=1)
    fill(tmp_path / name, a=1, b=1)
    assert open_source(tmp_path).notes[1] == f"validation is {name}/"


def test_val_chooses_and_test_is_the_third_part(tmp_path: Path) -> None:
    for part in ("train", "test", "val"):
        fill(tmp_path / part, a=1, b=1)
    split = open_source(tmp_path)
    assert split.notes[1:] == ("validation is val/", "the test part is test/")
    assert names(split, "test", tmp_path) == ["test/a/000.png", "test/b/000.png"]
    assert split.notes[0].endswith("2 images to train on, 2 to validate, 2 to test, 2 classes")


def test_the_split_of_one_folder_is_even_complete_and_repeatable(tmp_path: Path) -> None:
    fill(tmp_path, a=20, b=7, c=2, d=1)
    split = open_source(tmp_path, val_fraction=0.2, seed=3)
    train, val = names(split, "train", tmp_path), names(split, "val", tmp_path)
    assert sorted(train + val) == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*.png"))
    assert [sum(n.startswith(c) for n in val) for c in "abcd"] == [4, 1, 1, 0]
    assert [split.classes[split.val.label(i)] for i in range(len(val))] == [n[0] for n in val]
    again = open_source(tmp_path, val_fraction=0.2, seed=3)
    assert names(again, "val", tmp_path) == val
    assert names(open_source(tmp_path, val_fraction=0.2, seed=4), "val", tmp_path) != val
    almost = open_source(tmp_path, val_fraction=0.99)
    assert [sum(n.startswith(c) for n in names(almost, "train", tmp_path)) for c in "abcd"] == [1, 1, 1, 1]


def test_new_files_leave_old_ones_where_they_were(tmp_path: Path) -> None:
    fill(tmp_path, a=100, b=100)
    before = set(names(open_source(tmp_path), "val", tmp_path))
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "new.png")
    after = set(names(open_source(tmp_path), "val", tmp_path))
    assert len(before - after) <= 1


def test_train_without_val_is_split(tmp_path: Path) -> None:
    fill(tmp_path / "train", a=10, b=10)
    split = open_source(tmp_path)
    assert (len(split.train), len(split.val)) == (18, 2)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, car=2, train=2, val=2)
    assert open_source(tmp_path).classes == ("car", "train", "val")


def test_litter_is_skipped_and_other_files_are_counted(tmp_path: Path) -> None:
    fill(tmp_path, a=2, b=2)
    for name in (".hidden.png", "a/.x.png", "a/Thumbs.db", "b/desktop.ini"):
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / ".git").mkdir()
    assert len(open_source(tmp_path).notes) == 2
    for name in ("readme.txt", "a/labels.csv", "loose.png"):
        (tmp_path / name).touch()
    split = open_source(tmp_path)
    assert len(split.train) + len(split.val) == 4
    assert split.notes[2] == "3 files were left out: 1 .csv, 1 .txt, 1 image outside the class folders"


def test_links_to_folders_are_followed_and_broken_links_kept(tmp_path: Path) -> None:
    fill(tmp_path / "store", x=3)
    fill(tmp_path / "data", a=2)
    (tmp_path / "data" / "b").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "data" / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    split = open_source(tmp_path / "data")
    found = names(split, "train", tmp_path / "data") + names(split, "val", tmp_path / "data")
    assert len(found) == 6
    assert "a/gone.png" in found


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").touch()
    where = str(tmp_path / "nowhere")
    allowed = f"Allowed: a folder of images, or one of {NAMES}"
    assert (
        message(where)
        == f"{where!r} is neither a folder nor a known data set. {allowed} Fix: check the path."
    )
    assert message("cifar-10") == (
        f"'cifar-10' is neither a folder nor a known data set. {allowed} Did you mean 'cifar10'?"
    )
    assert message("emojis").endswith("Did you mean 'emoji'?")
    assert message("shard:a.tar").endswith("Did you mean 'shards:a.tar'?")
    assert message("pack:a").endswith("Did you mean 'packed:a'?")
    assert message(tmp_path / "photos.zip") == (
        f"{str(tmp_path / 'photos.zip')!r} is a file. {allowed} "
        "Fix: name the folder of images; an archive must be unpacked first."
    )


def test_folders_without_images(tmp_path: Path) -> None:
    text = f"{tmp_path} holds no images ({SUFFIXES}). Allowed: {LAYOUT}. Fix: check the path."
    assert message(tmp_path) == text
    fill(tmp_path, a=0, b=0)
    assert message(tmp_path) == text


def test_a_folder_that_holds_only_the_folder_of_the_data_is_entered(tmp_path: Path) -> None:
    fill(tmp_path / "photos" / "photos", a=5, b=5)
    split = open_source(tmp_path)
    assert split.classes == ("a", "b")
    assert f"{tmp_path} holds one folder, photos/photos/, which was taken for the data" in split.notes


def test_images_one_level_higher(tmp_path: Path) -> None:
    fill(tmp_path, a=3)
    assert message(tmp_path / "a") == (
        f"{tmp_path / 'a'} holds 3 images and no class folders. Allowed: {LAYOUT}. "
        f"Fix: put the images into {tmp_path / 'a' / '<class>'}, or give a CSV file of labels."
    )
    fill(tmp_path, b=1)
    assert message(tmp_path / "a") == (
        f"{tmp_path / 'a'} holds 3 images and no class folders. Allowed: {LAYOUT}. "
        f"Did you mean the parent folder, {str(tmp_path)!r}?"
    )


def test_images_below_a_class_folder(tmp_path: Path) -> None:
    fill(tmp_path, a=1, b=1)
    fill(tmp_path / "a", monday=1)
    assert message(tmp_path) == (
        f"the class folder {tmp_path / 'a'} has images in folders of its own (monday). "
        "Allowed: images directly in the class folder. Fix: move them up, or out."
    )


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    fill(tmp_path, a=1, b=0, c=2)
    (tmp_path / "b" / "notes.txt").touch()
    assert message(tmp_path) == (
        f"the class folder {tmp_path / 'b'} holds no images (1 other file). "
        f"Allowed: one image or more ({SUFFIXES}). Fix: add images, or delete the folder."
    )


def test_one_class_only(tmp_path: Path) -> None:
    fill(tmp_path, cat=5)
    assert message(tmp_path) == (
        f"{tmp_path} holds one class, 'cat'. Allowed: two classes or more. "
        f"Fix: add a folder with images of something else, or, to train without labels, pass {tmp_path / 'cat'}."
    )


def test_a_flat_folder_has_the_parts_that_the_fractions_ask_for(tmp_path: Path) -> None:
    fill(tmp_path, cat=20)
    flat = tmp_path / "cat"
    split = open_source(flat, val_fraction=0.2, test_fraction=0.1, labels=False)
    assert split.test is not None
    assert (len(split.train), len(split.val), len(split.test), split.held_out) == (14, 4, 2, True)
    assert split.notes[0] == f"{flat}: 14 images without labels to train on, 4 to validate, 2 to test"
    split = open_source(flat, val_fraction=0.0, labels=False)
    assert (len(split.train), len(split.val), split.held_out) == (20, 2, False)


def test_one_image_per_class(tmp_path: Path) -> None:
    fill(tmp_path, a=1, b=1)
    assert message(tmp_path) == (
        f"{tmp_path} has one sample per class, which leaves none for validation. "
        "Allowed: two or more in at least one class. Fix: add images, or a val/ folder next to train/."
    )


def test_classes_of_val_that_train_does_not_have_are_listed(tmp_path: Path) -> None:
    fill(tmp_path / "train", ant=1, bee=1, cat=1)
    fill(tmp_path / "val", ant=1, bee=1, dog=1, emu=1)
    assert message(tmp_path) == (
        f"{tmp_path / 'val'} has classes that {tmp_path / 'train'} does not have: dog, emu. Allowed: class folders "
        "with the names of those in train/; some may be missing. Fix: rename or remove the others."
    )


def test_a_class_without_images_in_val_or_test_is_noted_and_labels_do_not_shift(tmp_path: Path) -> None:
    fill(tmp_path / "train", ant=1, bee=1, cat=1)
    fill(tmp_path / "val", cat=1, ant=1)
    fill(tmp_path / "test", cat=2, bee=0, ant=0)
    split = open_source(tmp_path)
    assert [split.classes[split.val.label(i)] for i in range(2)] == ["ant", "cat"]
    assert [split.classes[split.test.label(i)] for i in range(2)] == ["cat", "cat"]
    assert {"val/ has no images of bee", "test/ has no images of ant, bee"} <= set(split.notes)
    assert open_labeled(tmp_path, part="test").classes == ("ant", "bee", "cat")


@pytest.mark.parametrize("fraction", [1.0, -0.1])
def test_a_fraction_that_leaves_nothing(tmp_path: Path, fraction: float) -> None:
    text = f"val_fraction={fraction}. Allowed: 0 to below 1. Fix: val_fraction=0.1."
    assert message(fill(tmp_path, a=2, b=2), val_fraction=fraction) == text


# --- synthetic


def test_synthetic_images_are_functions_of_their_number() -> None:
    split = open_source("synthetic:classes=4,size=24,train=40,val=8")
    assert split.classes == ("disk", "ring", "square", "frame")
    assert (len(split.train), len(split.val), split.image_size) == (40, 8, 24)
    assert [split.train.label(i) for i in range(5)] == [0, 1, 2, 3, 0]
    more = open_source("synthetic:classes=4,size=24,train=60,val=8", seed=9)
    for i in range(40):
        assert split.train.image(i).tobytes() == more.train.image(i).tobytes()
    images = {source.image(i).tobytes() for source in (split.train, split.val) for i in range(len(source))}
    assert len(images) == 48


def test_synthetic_classes_can_be_told_apart() -> None:
    # The area of the shape, found by its color, is enough to distinguish bars from squares far above chance.
    split = open_source("synthetic:size=32,train=400,val=10")
    sizes: dict[str, list[float]] = {name: [] for name in split.classes}
    for i in range(400):
        image = np.asarray(split.train.image(i)).astype(float)
        background = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
        mask = np.abs(image - background).min(axis=2) > 35
        rows, columns = mask.sum(1).max(), mask.sum(0).max()
        sizes[split.classes[split.train.label(i)]].append(float(columns / max(rows, 1)))
    assert np.median(sizes["bar"]) < 0.5 < np.median(sizes["square"]) < 2 < np.median(sizes["pillar"])


def test_errors_of_synthetic() -> None:
    specs = "classes, size, train, val, each as option=number, separated by commas"
    assert (
        message("synthetic:klasses=3")
        == f"'synthetic:klasses=3' has an unknown option 'klasses'. Allowed: {specs}. Fix: classes=10."
    )
    assert message("synthetic:classes=1") == (
        "'synthetic:classes=1' gives classes=1. Allowed: a whole number from 2 to 10. Fix: classes=10."
    )
    assert message("synthetic:size=big") == (
        "'synthetic:size=big' gives size=big. Allowed: a whole number from 8 to 1024. Fix: size=32."
    )


# --- torchvision's data sets, from tiny copies in the published layouts


def fake_cifar10(root: Path) -> np.ndarray:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8)  # six files of two images: R, G, B planes
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        (folder / name).write_bytes(pickle.dumps({"data": planes[k], "labels": [k, 9 - k]}))
    labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": labels}))
    return planes


def test_cifar10_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planes = fake_cifar10(tmp_path)
    text = (
        f"'cifar10' in {tmp_path / 'cifar-10-batches-py'} is incomplete or damaged. "
        "Allowed: the files as they were published. Fix: delete that folder, then cifar10:download=yes."
    )
    assert message("cifar10", root=tmp_path) == text  # the MD5 sums of the copy are not the published ones
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    split = open_source("cifar10", root=tmp_path)
    assert (len(split.train), len(split.val), split.image_size) == (10, 2, 32)
    assert split.classes[:2] == ("airplane", "automobile")
    assert [split.train.label(i) for i in range(4)] == [0, 9, 1, 8]
    assert split.val.name(1) == "cifar10/test/1"
    image = np.asarray(split.val.image(1))
    assert np.array_equal(image.transpose(2, 0, 1).reshape(-1), planes[5, 1])


def test_gray_sets_become_rgb(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):  # the IDX format: magic number, sizes, bytes
        header = np.array([2051, 3, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, 3], dtype=">i4").tobytes() + bytes([4, 0, 9])
        )
    split = open_source("fashion_mnist", root=tmp_path)
    assert [split.classes[split.train.label(i)] for i in range(3)] == ["Coat", "T-shirt/top", "Ankle boot"]
    for channel in range(3):
        assert np.array_equal(np.asarray(split.train.image(2))[..., channel], pixels[2])


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_nothing_is_downloaded_unless_told(tmp_path: Path, name: str, folder: str) -> None:
    assert message(name, root=tmp_path) == (
        f"{name!r} is not in {tmp_path / folder}. Allowed: a copy in that folder, or a download "
        f"on request. Fix: {name}:download=yes."
    )
    assert message(f"{name}:root={tmp_path},download=no", root="elsewhere", download=True) == (
        f"{name!r} is not in {tmp_path / folder}. Allowed: a copy in that folder, or a download "
        f"on request. Fix: {name}:root={tmp_path},download=yes."
    )
    assert list(tmp_path.iterdir()) == []


def test_the_spec_says_where_a_set_lies_and_whether_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets
    from torchvision.datasets import cifar

    fake_cifar10(tmp_path / "a, b")  # a comma belongs to the path, unless option= follows
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    asked = []

    class Recorded(datasets.CIFAR10):
        def __init__(self, root: str, *, train: bool, download: bool) -> None:
            asked.append((root, download))
            super().__init__(root, train=train)

    monkeypatch.setattr(datasets, "CIFAR10", Recorded)
    for spec in (f"cifar10:root={tmp_path}/a, b", f"cifar10:download=yes,root={tmp_path}/a, b"):
        assert len(open_source(spec).train) == 10
        assert len(open_labeled(spec)) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").rename("data")
    open_source("cifar10:download=yes")
    here = [(f"{tmp_path}/a, b", False)] * 4 + [(f"{tmp_path}/a, b", True)] * 4
    assert asked == [*here, ("data", True), ("data", True)]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("download=true", "download=true. Allowed: yes or no. Fix: download=yes."),
        ("download=never", "download=never. Allowed: yes or no. Fix: download=no."),
        (
            "rot=x",
            "'cifar10:rot=x' has an unknown option 'rot'. Allowed: root=..., download=... Did you mean 'root'?",
        ),
        (
            "root=x,root=y",
            "'cifar10:root=x,root=y' has a second option 'root'. Allowed: root=..., download=... Did you mean 'root'?",
        ),
        (
            "download",
            "'cifar10:download' has an empty option 'download'. Allowed: root=..., download=... "
            "Did you mean 'download'?",
        ),
    ],
)
def test_errors_of_the_options_of_a_set(spec: str, text: str) -> None:
    assert message(f"cifar10:{spec}") == text


def test_a_torchvision_that_does_not_fit_names_both_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from normfree.data import torchvision_import

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision_import, "import_module", broken)
    with pytest.raises(ImportError) as caught:
        torchvision_import.torchvision_module("datasets")
    assert re.fullmatch(
        r"torchvision cannot be imported: torch \d\S+, torchvision \d\S+\. "
        r"They must be a pair that was built together\. "
        r"Fix: pip install --upgrade torch torchvision \(both in one command, from the same index\).",
        str(caught.value),
    )
