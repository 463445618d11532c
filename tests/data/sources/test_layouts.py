"""Layouts of data as people have them: archives, three parts, tables, lists, litter, links."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from normfree.data.source import Split
from normfree.data.sources.folders import part_of
from normfree.data.sources.listed import read_lines
from normfree.data.sources.open import image_limits, open_labeled, open_source
from normfree.data.subset import Joined, Relabeled, Subset
from normfree.data.walk import find_images, left_out, walk_images


def image(path: Path, red: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (red, 0, 0)).save(path)


def fill(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            image(root / name / f"{i:03}.png", i)
    return root


def message(data: str | Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        open_source(data)
    return str(caught.value)


def sizes(split: Split) -> tuple[int, int, int]:
    return len(split.train), len(split.val), 0 if split.test is None else len(split.test)


def names(split: Split, part: str) -> set[str]:
    source = split.parts()[part]
    return {source.name(i) for i in range(len(source))}


# --- parts of folders


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("train", "test"),
        ("seg_train", "seg_test"),
        ("train-images", "test-images"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_training_and_test_folders_of_archives(tmp_path: Path, train: str, test: str, nested: bool) -> None:
    for name, count in ((train, 10), (test, 3)):
        fill(tmp_path / "set" / name / (name if nested else ""), cat=count, dog=count)
    fill(tmp_path / "set", prediction=2)  # another folder
    split = open_source(tmp_path / "set")
    assert sizes(split) == (18, 2, 6)  # validation comes from the training part, never from the test
    assert split.classes == ("cat", "dog")
    assert f"the test part is {test}/" in split.notes
    assert "prediction/ was not used" in split.notes
    assert all(f"/{test}/" in name for name in names(split, "test"))
    assert len(open_labeled(tmp_path / "set", part="test")) == 6


def test_the_name_of_a_part_must_state_one_part() -> None:
    assert [part_of(name) for name in ("training_data", "validation", "TEST", "dev")] == [
        ("train", 1),
        ("val", 1),
        ("test", 0),
        ("val", 3),
    ]
    assert [part_of(name) for name in ("train_val", "trains", "testimony", "pred", "")] == [None] * 5


def test_the_test_part_is_never_advised_for_training(tmp_path: Path) -> None:
    for part in ("holdout", "pred"):
        fill(tmp_path / part, x=1)
    text = message(tmp_path)
    assert "Did you mean" not in text
    assert "give the folder that holds the class folders to train on" in text


def test_three_fractions_are_disjoint_and_the_validation_does_not_depend_on_the_test(tmp_path: Path) -> None:
    fill(tmp_path, a=20, b=10, c=3, d=2, e=1)
    two = open_source(tmp_path, val_fraction=0.2)
    three = open_source(tmp_path, val_fraction=0.2, test_fraction=0.1)
    assert names(two, "val") == names(three, "val")
    parts = [names(three, part) for part in three.parts()]
    assert sum(map(len, parts)) == 36
    assert set.union(*parts) == names(two, "train") | names(two, "val")
    counts = Counter(three.classes[three.test.label(i)] for i in range(len(three.test)))
    assert counts == {"a": 2, "b": 1, "c": 1}  # a class of two keeps one and validates with the other


def test_a_test_fraction_is_taken_from_train_if_only_val_exists(tmp_path: Path) -> None:
    fill(tmp_path / "train", a=10, b=10)
    fill(tmp_path / "val", a=2, b=2)
    split = open_source(tmp_path, test_fraction=0.2)
    assert sizes(split) == (16, 4, 4)
    assert all("/train/" in name for name in names(split, "test"))


@pytest.mark.parametrize("data", ["synthetic:classes=3,size=8,train=9,val=12", "emoji"])
def test_named_sets_give_half_of_their_validation(data: str) -> None:
    plain, split = open_source(data), open_source(data, test_fraction=0.1)
    assert plain.test is None
    assert names(split, "train") == names(plain, "train")
    assert names(split, "val") | names(split, "test") == names(plain, "val")
    assert abs(len(split.val) - len(split.test)) <= len(split.classes)


@pytest.mark.parametrize("fraction", [-0.1, 0.9, 1.0])
def test_a_test_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"together below 1\. Fix: test_fraction=0\.1"):
        open_source(fill(tmp_path, a=9, b=9), test_fraction=fraction)


# --- the one walk


def litter(root: Path) -> None:
    for name in (
        "a/._000.png",
        "a/.ipynb_checkpoints/000.png",
        "__MACOSX/a/x.png",
        ".Trash/y.png",
        "@eaDir/000.png",
    ):
        image(root / name)
    (root / "a" / "Thumbs.db").touch()


def test_training_and_prediction_see_the_same_images(tmp_path: Path) -> None:
    fill(tmp_path / "data", a=3, b=3)
    litter(tmp_path / "data")
    (tmp_path / "far").mkdir()
    image(tmp_path / "far" / "linked.png")
    (tmp_path / "data" / "b" / "far").symlink_to(tmp_path / "far" / "linked.png")  # no suffix
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "far")
    split = open_source(tmp_path / "data")
    trained = names(split, "train") | names(split, "val")
    found, others = walk_images(tmp_path / "data")
    assert {str(path) for path in found} == trained
    assert find_images([tmp_path / "data"]) == found
    assert others == {"without a suffix": 1}


def test_files_that_are_left_out_are_named_by_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.data.walk.suffixes", lambda: frozenset([".png"]))
    fill(tmp_path, a=2, b=2)
    for name in ("a/1.HEIC", "a/2.heic", "b/notes.txt", "b/x"):
        (tmp_path / name).touch()
    note = open_source(tmp_path).notes[-1]
    needs = 'images; reading them needs pip install "normfree[heic]"'
    assert note == f"4 files were left out: 2 .heic ({needs}), 1 .txt, 1 without a suffix"
    assert left_out(Counter()) == ()
    (tmp_path / "phone" / "a").mkdir(parents=True)
    (tmp_path / "phone" / "a" / "1.heic").touch()
    (tmp_path / "phone" / "b").mkdir()
    assert 'Fix: pip install "normfree[heic]" reads the other images' in message(tmp_path / "phone")
    with pytest.raises(ValueError, match=r"contains no images.*normfree\[heic\]"):
        find_images([tmp_path / "phone"])


def test_limits_of_the_images_are_options_of_the_data(tmp_path: Path) -> None:
    fill(tmp_path, a=3, b=3)
    assert image_limits(str(tmp_path)).pixel_range == 65535
    limits = image_limits(f"folder:{tmp_path},range=4095,max_pixels=9")
    assert (limits.pixel_range, limits.max_pixels) == (4095, 9)
    with pytest.raises(ValueError, match="too large: 4 x 4 pixels, the limit is 9"):
        open_source(f"folder:{tmp_path},max_pixels=9").train.image(0)
    assert message(f"folder:{tmp_path},range=0").startswith(
        "range=0. Allowed: a whole number from 1 to 65535."
    )


# --- tables and lists


def table(root: Path, text: str, name: str = "labels.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_a_table_of_paths_and_labels(tmp_path: Path) -> None:
    for i in range(8):
        image(tmp_path / "images" / f"{i}.png")
    lines = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'},x{i}\n" for i in range(8))
    path = table(tmp_path, f"file,label,comment\n{lines}")
    split = open_source(path)
    assert split.classes == ("cat", "dog")
    assert sizes(split) == (6, 2, 0)
    assert split.files
    assert split.train.image(0).size == (4, 4)
    assert len(open_labeled(path)) == 8
    # Other names of columns, semicolons, no suffixes, another folder.
    lines = "".join(f"{i};{'cat' if i % 2 else 'dog'}\n" for i in range(8))
    path = table(tmp_path, f"nr;animal\n{lines}", "b.csv")
    assert "none is known as that of the paths of images" in message(path)
    spec = f"csv:{path},image=nr,label=animal,root={tmp_path / 'images'}"
    assert sizes(open_source(spec)) == (6, 2, 0)
    assert "has no column 'animl'. Allowed: 'nr', 'animal'. Did you mean 'animal'?" in message(
        f"csv:{path},image=nr,label=animl"
    )


def test_a_column_of_parts_and_columns_of_zeros_and_ones(tmp_path: Path) -> None:
    for i in range(6):
        image(tmp_path / f"{i}.png")
    parts = ["train", "train", "train", "valid", "test", "test"]
    lines = "".join(f"{i}.png,{part},{i % 2},{1 - i % 2}\n" for i, part in enumerate(parts))
    split = open_source(table(tmp_path, f"filename,split,odd,even\n{lines}"))
    assert sizes(split) == (3, 1, 2)
    assert [split.classes[split.test.label(i)] for i in range(2)] == ["even", "odd"]


def test_an_export_of_roboflow_for_classification(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("valid", 2), ("test", 2)):
        for i in range(count):
            image(tmp_path / part / f"{i}.jpg")
        lines = "".join(f"{i}.jpg, {i % 2}, {1 - i % 2}\n" for i in range(count))
        table(tmp_path / part, f"filename, odd, even\n{lines}", "_classes.csv")
    split = open_source(tmp_path)
    assert (sizes(split), split.classes) == ((6, 2, 2), ("even", "odd"))
    assert len(open_labeled(tmp_path, part="test")) == 2


def test_lists_of_files(tmp_path: Path) -> None:
    for i in range(8):
        image(tmp_path / ("ab"[i % 2]) / f"my {i}.png")
    with_class = table(
        tmp_path, "".join(f"{'ab'[i % 2]}/my {i}.png {'ab'[i % 2]}\n" for i in range(8)), "train.txt"
    )
    without = table(tmp_path, "".join(f"{'ab'[i % 2]}/my {i}.png\n" for i in range(8)), "all.txt")
    assert read_lines(with_class) == read_lines(without)
    assert sizes(open_source(without)) == (6, 2, 0)
    val = table(tmp_path, "a/my 0.png a\nb/my 1.png b\n", "val.txt")
    assert sizes(open_source(f"csv:{with_class},val={val},test={val}")) == (8, 2, 2)
    assert "has the line 'x.png', without a class" in message(table(tmp_path, "x.png\n", "bad.txt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n0.png,a\n1.png,a\n", "has 1 class."),
        ("path,label\n0.png,a\n1.png,b,c\n", "line 3 of"),
        ("path,label\nno.png,a\n1.png,b\n", "lists 'no.png', which is not in"),
        ("path,x,y\n0.png,3,4\n1.png,3,4\n", "none is known as that of the classes"),
        ("path\n", "has 1 line."),
    ],
)
def test_mistakes_in_tables(tmp_path: Path, text: str, said: str) -> None:
    for i in range(2):
        image(tmp_path / f"{i}.png")
    assert said in message(table(tmp_path, text))


def test_a_flat_folder_next_to_a_table_is_sent_to_the_table(tmp_path: Path) -> None:
    image(tmp_path / "flat" / "0.png")
    path = table(tmp_path, "path,label\n0.png,a\n")
    assert f"Did you mean the table of labels, {str(path)!r}?" in message(tmp_path / "flat")
    (tmp_path / "answers.csv").touch()  # comes first by name
    own = path.rename(tmp_path / "flat.csv")
    assert f"Did you mean the table of labels, {str(own)!r}?" in message(tmp_path / "flat")


# --- parts of sources


def test_relabeled_and_joined_sources_keep_their_samples(tmp_path: Path) -> None:
    source = open_labeled(fill(tmp_path, a=2, c=2))
    other = Relabeled(source, ("a", "b", "c"))
    assert [other.label(i) for i in range(4)] == [0, 0, 2, 2]
    both = Joined([Subset(other, [3]), other])
    assert len(both) == 5
    assert [both.name(i) for i in range(5)] == [source.name(i) for i in (3, 0, 1, 2, 3)]
    assert [both.label(i) for i in range(5)] == [2, 0, 0, 2, 2]
    assert both.image(0).tobytes() == source.image(3).tobytes()
