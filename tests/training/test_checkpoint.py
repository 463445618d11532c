"""Checkpoints are complete or absent; any damage is noticed, and the previous checkpoint is used."""

import json
import os
from pathlib import Path

import pytest
import torch

from normfree.training import checkpoint


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 2), float(step)), "s": torch.tensor(1.5)},
        "optim": {"w": torch.ones(2)},
    }


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, tensors=tensors(step), state={"step": step}, keep=keep)


def test_round_trip(tmp_path):
    got = checkpoint.read(save(tmp_path, 7))
    assert (got.step, got.state) == (7, {"step": 7})
    assert got.tensors.keys() == {"model", "optim"}
    assert torch.equal(got.tensors["model"]["w"], torch.full((3, 2), 7.0))
    assert got.tensors["model"]["s"].shape == ()
    assert (tmp_path / "last").read_text() == "step-00000007\n"


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_noticed_and_the_previous_checkpoint_is_used(tmp_path, name, damage):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1 if name != "MANIFEST.json" else 0xFF
        file.write_bytes(data)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.step == 1
    assert len(passed_over) == 1
    assert "step-00000002" in passed_over[0]


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
        if step == 2:
            checkpoint.point(tmp_path, "best", "step-00000002")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]


class Killed(Exception):
    pass


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Fail at the n-th flush, rename or replace of a save, for every n."""
    real = {"fsync": os.fsync, "rename": Path.rename, "replace": Path.replace}
    outcomes = set()
    for fatal in range(1, 40):
        folder = tmp_path / str(fatal)
        save(folder, 1)
        count = 0

        def counted(operation, fatal=fatal):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == fatal:
                    raise Killed
                return operation(*args, **kwargs)

            return call

        monkeypatch.setattr(os, "fsync", counted(real["fsync"]))
        monkeypatch.setattr(Path, "rename", counted(real["rename"]))
        monkeypatch.setattr(Path, "replace", counted(real["replace"]))
        survived = True
        try:
            save(folder, 2)
        except Killed:
            survived = False
        monkeypatch.undo()
        found, passed_over = checkpoint.newest(folder)
        assert passed_over == []
        assert torch.equal(found.tensors["model"]["w"], tensors(found.step)["model"]["w"])
        outcomes.add((survived, found.step))
        save(folder, 3)
        assert not list(folder.glob(".*"))  # temporary files of the failed save are deleted
        if survived:
            break
    assert outcomes == {(False, 1), (False, 2), (True, 2)}


def test_the_files_of_a_checkpoint_are_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else a power failure could leave a checkpoint with empty files in it."""
    done, real_fsync, real_replace = [], os.fsync, Path.replace

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real_fsync(handle)

    def replace(path, target):
        done.append(f"-> {Path(target).name}")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    saved = save(tmp_path, 1)
    flushed = set(done[: done.index(f"-> {saved.name}")])
    assert {path.name for path in saved.iterdir()} < flushed
    assert f".{saved.name}.{os.getpid()}.partial" in flushed  # the folder itself
    assert done.index(tmp_path.name) > done.index(f"-> {saved.name}")


def test_a_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_a_flipped_bit_of_the_manifest_never_changes_the_result(tmp_path):
    """Flip a bit of each byte in turn: it is noticed, or the byte is whitespace and the result is the same."""
    path = save(tmp_path, 2)
    sound, noticed = (path / "MANIFEST.json").read_bytes(), 0
    for position in range(len(sound)):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        (path / "MANIFEST.json").write_bytes(damaged)
        got, passed_over = checkpoint.newest(tmp_path)
        noticed += len(passed_over)
        if got is None:
            assert passed_over[0].startswith(f"{path}: ")
        else:
            assert sound[position : position + 1].isspace()
            assert (got.step, got.state, got.tensors.keys()) == (2, {"step": 2}, {"model", "optim"})
    assert noticed > 0.8 * len(sound)


def test_no_flipped_bit_of_the_tensors_goes_unnoticed(tmp_path):
    file = save(tmp_path, 2) / "model.safetensors"
    sound = file.read_bytes()
    for position in range(0, len(sound), 3):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is missing or damaged\."):
            checkpoint.read(file.parent)


def test_damaged_later_checkpoints_do_not_displace_the_sound_one(tmp_path):
    for step in (1, 5, 9):
        save(tmp_path, step, keep=3)
    for step in (5, 9):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    save(tmp_path, 3)  # the run continued from step 1
    assert checkpoint.newest(tmp_path)[0].step == 3
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ""])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    path = save(tmp_path, 2)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = manifest["files"]["optim.safetensors"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"does not list the files|is missing or damaged"):
        checkpoint.read(path)


def test_a_renamed_checkpoint_is_not_read_as_another_step(tmp_path):
    save(tmp_path, 2).rename(tmp_path / "step-00000007")
    found, passed_over = checkpoint.newest(tmp_path)
    assert found is None
    assert passed_over == [f"{tmp_path}/step-00000007: MANIFEST.json is of step 2."]
