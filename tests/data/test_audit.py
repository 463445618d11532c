from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normfree.data.audit import (
    SHOWN,
    AuditReport,
    BadImage,
    audit,
    duplicates,
    range_notes,
    require_clean,
    without_bad,
)
from normfree.data.sources.folders import FolderSource
from normfree.data.sources.open import open_source
from normfree.data.transforms.decode import formats


def source(root: Path, *, good: int, bad: int) -> FolderSource:
    for i in range(good):
        Image.new("RGB", (4, 4)).save(root / f"good{i:03}.png")
    for i in range(bad):
        (root / f"good{i * 30:03}_bad.png").write_bytes(b"nonsense" * (i % 2))
    samples = [(path.name, 0) for path in sorted(root.iterdir())]
    return FolderSource(root, samples, classes=("a",))


@pytest.mark.parametrize("workers", [1, 4])
def test_every_bad_file_is_found_once_and_in_order(tmp_path: Path, workers: int) -> None:
    steps: list[tuple[int, int]] = []
    report = audit(
        source(tmp_path, good=70, bad=3),
        workers=workers,
        progress=lambda done, total: steps.append((done, total)),
    )
    kinds = ", ".join(formats())
    assert report == AuditReport(
        checked=73,
        bad=(
            BadImage(str(tmp_path / "good000_bad.png"), "the file is empty"),
            BadImage(str(tmp_path / "good030_bad.png"), f"not an image, or not one of {kinds}"),
            BadImage(str(tmp_path / "good060_bad.png"), "the file is empty"),
        ),
    )
    assert steps == [(32, 73), (64, 73), (73, 73)]


FIX = "Fix: repair these files or delete them, or go on without them with --input.bad_images skip."


def test_a_clean_report_passes_and_all_parts_are_named_in_one_message(tmp_path: Path) -> None:
    require_clean(audit(source(tmp_path, good=3, bad=0)))
    bad = tuple(BadImage(f"{i}.png", "the file is empty") for i in range(15))
    with pytest.raises(ValueError, match="cannot be used") as caught:
        require_clean(AuditReport(checked=50, bad=bad[:10]), AuditReport(checked=20, bad=bad[10:]))
    lines = "".join(f"  {i}.png: the file is empty\n" for i in range(15))
    assert str(caught.value) == (
        f"15 of 70 images cannot be used:\n{lines}Allowed: images that open completely. {FIX}"
    )


def test_a_file_lists_bad_images_if_they_are_too_many_for_a_message(tmp_path: Path) -> None:
    bad = tuple(BadImage(f"{i}.png", "the file is empty") for i in range(SHOWN + 2))
    with pytest.raises(ValueError, match=rf"and 2 more; {tmp_path}/all\.txt lists all"):
        require_clean(AuditReport(checked=50, bad=bad), list_file=tmp_path / "all.txt")
    assert (tmp_path / "all.txt").read_text().splitlines() == [image.name for image in bad]


def noise(root: Path, part: str, label: str, number: int) -> Path:
    path = root / part / label / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([len(part), ord(label), number]).integers(
        0, 256, (6, 6, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).save(path)
    return path


def test_copies_across_parts_and_classes_are_named(tmp_path: Path) -> None:
    paths = [noise(tmp_path, part, label, i) for part in ("train", "val") for label in "ab" for i in range(2)]
    split = open_source(tmp_path)
    reports = {part: audit(s) for part, s in split.parts().items()}
    assert duplicates(split, reports) == ()
    shutil.copy(paths[0], tmp_path / "val" / "a" / "copy.png")
    shutil.copy(paths[1], tmp_path / "train" / "b" / "other.png")
    split = open_source(tmp_path)
    across, labels = duplicates(split, {part: audit(s) for part, s in split.parts().items()})
    assert across == (
        "WARNING: 1 image is in two parts, so their scores tell nothing about new images: "
        f"{tmp_path}/val/a/copy.png (val) is {paths[0]} (train)"
    )
    assert labels == f"WARNING: 1 image is in two classes: {tmp_path}/train/b/other.png is {paths[1]}"


def test_bad_images_are_left_out_unless_a_class_has_no_others(tmp_path: Path) -> None:
    paths = [noise(tmp_path, part, label, i) for part in ("train", "val") for label in "ab" for i in range(2)]
    split = open_source(tmp_path)
    bad = BadImage(str(paths[0]), "the file is empty")
    left = without_bad(split, [bad])
    assert (len(left.train), len(left.val)) == (3, 4)
    assert left.left_out == (f"{paths[0]}: the file is empty",)
    assert str(paths[0]) not in [left.train.name(i) for i in range(3)]
    with pytest.raises(ValueError, match=r"no image of the class 'a' can be read"):
        without_bad(split, [bad, BadImage(str(paths[1]), "")])


@pytest.mark.parametrize(("bits", "warned"), [(8, True), (12, True), (14, True), (15, False), (16, False)])
def test_sixteen_bit_images_of_a_small_range_are_warned_of(tmp_path: Path, bits: int, warned: bool) -> None:
    Image.fromarray(np.full((4, 4), 2**bits - 1, dtype=np.uint16)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), "white").save(tmp_path / "b.png")  # eight bits: no part of the range
    report = audit(FolderSource(tmp_path, [("a.png", 0), ("b.png", 0)], classes=("a",)))
    assert report.peaks == (2**bits - 1,)
    notes = range_notes({"train": report})
    assert bool(notes) == warned
    if warned:
        assert f"largest value is {2**bits - 1:,}," in notes[0]
        assert notes[0].endswith(f"give the range: --data folder:PATH,range={2**bits - 1}")
