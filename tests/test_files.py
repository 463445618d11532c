"""Atomic writes: the target is complete or unchanged, and a failure leaves nothing behind."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normfree import files
from normfree.diagnose.metrics_file import read_metrics
from normfree.files import atomic_write, atomic_write_text, read_json, read_toml, remove_leftovers
from normfree.training import checkpoint
from normfree.training.config_io import load_config
from normfree.weights.tensor_file import read_tensors


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


# --- reading ------------------------------------------------------------------------------------------------


def hostile(folder: Path) -> dict[str, Path]:
    """Return files that no reader may wait for, or read to the end."""
    (folder / "large").write_bytes(b"")
    os.truncate(folder / "large", 40_000_000_000)  # takes no space
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "folder").mkdir()
    (folder / "list").write_text("[1]")
    (folder / "deep").write_text('{"a":' * 100_000)
    (folder / "digits").write_text('{"a": ' + "9" * 10_000 + "}")
    (folder / "latin").write_bytes(b'{"a": "\xe4"}')
    return {path.name: path for path in folder.iterdir()} | {"none": folder / "none"}


READERS = {
    "json": lambda path: read_json(path, limit=1_000_000),
    "toml": read_toml,
    "config.toml": load_config,
    "metrics": read_metrics,
    "tensors": read_tensors,
    "checkpoint": lambda path: checkpoint.read(Path(str(path))),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_hostile_files_at_once_in_one_line(tmp_path: Path, reader: str) -> None:
    for name, path in hostile(tmp_path).items():
        if reader == "metrics" and name in ("list", "deep", "digits", "latin"):  # damaged lines are skipped
            assert read_metrics(path) == []
            continue
        if reader == "toml" and name == "list":  # it is a table named 1
            continue
        with pytest.raises(ValueError) as error:  # noqa: PT011  each reader has its own text
            READERS[reader](path)
        assert "\n" not in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize(
    "text", ["a" + ".a" * 30_000 + "=1", "[" + "a" + ".a" * 30_000 + "]", "a=" + "[" * 60_000]
)
def test_toml_that_is_nested_deeply_is_refused_at_once(tmp_path: Path, text: str) -> None:
    """`tomllib` takes a minute and 3 GB for the first one."""
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(
        ValueError, match=r"a\.toml' (is nested too deeply|has a line with more than 200 dots)\.$"
    ):
        read_toml(tmp_path / "a.toml")


def test_a_safetensors_header_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((10**10).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="a header of 10,000,000,000 bytes"):
        read_tensors(tmp_path / "a")


def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process in (dead.pid, os.getppid()):
        (tmp_path / f".a.txt.{process}.partial").write_text("half")
    (tmp_path / ".notes.partial").write_text("mine")
    assert remove_leftovers(tmp_path) == [f".a.txt.{dead.pid}.partial"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("existing", [True, False])
def test_a_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    """Else a power failure could leave an empty file."""
    done = []
    replace, fsync = Path.replace, os.fsync
    monkeypatch.setattr(
        Path, "replace", lambda path, target: (done.append("replace"), replace(path, target))[1]
    )
    monkeypatch.setattr(files.os, "fsync", lambda handle: (done.append("fsync"), fsync(handle))[1])
    if existing:
        (tmp_path / "a").write_text("old")
    atomic_write_text(tmp_path / "a", "new")
    assert done == ["fsync", "replace", "fsync"]
