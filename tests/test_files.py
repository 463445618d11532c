"""Atomic writes: the target is complete or unchanged, and a failure leaves nothing behind."""

import doctest
from pathlib import Path

import pytest

from normfree import files
from normfree.files import atomic_write, atomic_write_text


def test_the_examples_run() -> None:
    assert doctest.testmod(files).failed == 0


def test_a_file_is_written_with_its_parent_folders(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.txt"
    assert atomic_write_text(target, "snö") == target
    assert target.read_bytes() == "snö".encode()
    assert list(target.parent.iterdir()) == [target]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write(path: Path) -> None:
        assert path.parent == tmp_path  # the same file system, so the rename is atomic
        assert target.read_text() == "old"
        path.write_text("new")

    atomic_write(target, write)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_the_target_as_it_was(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")

    def write(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(target, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("a.txt", "old")] if existing else [])


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "b.txt").write_text("new")


@pytest.mark.parametrize("existing", [True, False])
def test_a_folder_is_created_or_replaces_an_empty_one(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "folder"
    if existing:
        target.mkdir()
    atomic_write(target, make_folder)
    assert (target / "b.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_not_empty_stays(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(OSError):  # noqa: PT011  the text depends on the system
        atomic_write(target, make_folder)
    assert list(tmp_path.iterdir()) == [target]
    assert [p.name for p in target.iterdir()] == ["old.txt"]


def test_a_failed_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        make_folder(path)
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        atomic_write(tmp_path / "folder", write)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_creates_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "a.txt", lambda path: None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError):  # noqa: PT011  the text depends on the system
        atomic_write_text(target, "text")
    assert list(tmp_path.iterdir()) == [target]
