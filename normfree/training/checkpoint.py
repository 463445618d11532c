"""Checkpoints that survive a kill at any instant: complete or absent, checksummed, without pickle.

    checkpoints/step-00001200/   model.safetensors  ema.safetensors  optim.safetensors  state.json  MANIFEST.json
    checkpoints/last, best       text files that hold the name of a step folder

A folder is written under a temporary name. The last file is the manifest, with the size and SHA-256 of each other file.
All files are flushed to disk, then the folder is renamed, and only then are old checkpoints deleted. Reading skips
checkpoints that fail verification and reports each of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from normfree.files import atomic_write

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: tensors by file and name, and the JSON state."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, point the file `last` at it, and delete old checkpoints.

    The `keep` newest stay, and the one that the file `best` names. Checkpoints of later steps are deleted too: they
    failed verification when the run was resumed.

    Args:
        folder: the run's `checkpoints` folder.
        tensors: by file and name.
        state: anything that JSON holds.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / name_of(step)

    def write(work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process with the same id
        work.mkdir()
        for name, values in tensors.items():
            plain = {k: v.detach().cpu().contiguous() for k, v in values.items()}
            save_file(plain, work / f"{name}.safetensors")
        (work / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(work.iterdir())}
        (work / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        for path in work.iterdir():
            _flush(path)
        _flush(work)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved before the run was killed

    atomic_write(final, write)
    _flush(folder)
    point(folder, "last", final.name)
    _remove_old(folder, keep, newest_step=step)
    return final


def name_of(step: int) -> str:
    """Return the name of the folder of the checkpoint of `step`."""
    return f"step-{step:08d}"


def point(folder: Path, name: str, target: str) -> None:
    """Write `target`, the name of a step folder, to the file `name` ("last" or "best"), atomically."""

    def write(work: Path) -> None:
        work.write_text(target + "\n", encoding="utf-8")
        _flush(work)

    atomic_write(folder / name, write)
    _flush(folder)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that passes verification, or None, and a message for each newer one that failed."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path), passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def read(path: Path) -> Checkpoint:
    """Read and verify the checkpoint in one step folder.

    Raises:
        ValueError: a file is missing, truncated, or does not match its checksum.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no readable {MANIFEST} ({type(error).__name__}).") from None
    if path.name != name_of(step):  # the manifest has no checksum of its own
        raise ValueError(f"{path}: {MANIFEST} is of step {step}.")
    if "state.json" not in listed or any(name != Path(name).name for name in listed):
        raise ValueError(f"{path}: {MANIFEST} does not list the files of a checkpoint.")
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or _sha256(file) != digest:
            raise ValueError(f"{path}: {name} is missing or damaged.")
    tensors = {Path(n).stem: load_file(path / n) for n in listed if n.endswith(".safetensors")}
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(step, tensors, state)


def _remove_old(folder: Path, keep: int, *, newest_step: int) -> None:
    """Delete all checkpoints except the `keep` newest up to `newest_step` and the best one, and temporary files."""
    best = folder / "best"
    spared = {best.read_text(encoding="utf-8").strip()} if best.is_file() else set()
    found = sorted(folder.glob("step-*"), reverse=True)
    # Later ones are damaged and must not count among the `keep` newest.
    later = [path for path in found if path.name > name_of(newest_step)]
    old = [path for path in found[len(later) :][keep:] if path.name not in spared]
    for path in later + old:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.partial"):  # left by a process that was killed
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until the content of a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
