"""Checkpoints that survive a kill at any instant: complete or absent, checksummed, without pickle.

    checkpoints/step-00001200/   model.safetensors  ema.safetensors  optim.safetensors  state.json  MANIFEST.json
    checkpoints/last, best       text files that hold the name of a step folder

A folder is written under a temporary name. The last file is the manifest, with the size and SHA-256 of each other file.
All files are flushed to disk, then the folder is renamed, and only then are old checkpoints deleted. Reading skips
checkpoints that fail verification and reports each of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.files import (
    UnreadableFileError,
    atomic_write,
    atomic_write_text,
    flush,
    read_json,
    read_text,
    sha256_of,
    write_text,
)
from normfree.suggest import some_names
from normfree.weights.run_weights import MANIFEST, MANIFEST_BYTES, newest_first
from normfree.weights.tensor_file import read_tensors, write_tensors

# Bytes that are read of state.json, which holds the names of all classes and the losses since the last line of
# metrics.jsonl.
_STATE_BYTES = 16_000_000
_NAME = re.compile(r"step-\d{8,}")


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
    best: int | None = None,
) -> Path:
    """Write the checkpoint of `step`, point the file `last` at it, and delete old checkpoints.

    The `keep` newest stay, the one of step `best`, and the one that the file `best` names. Checkpoints of later steps
    are deleted too: they failed verification when the run was resumed.

    Args:
        folder: the run's `checkpoints` folder.
        tensors: by file and name.
        state: anything that JSON holds.
        keep: number of newest checkpoints to keep.
        best: step of the best score so far; None if there is none.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: it cannot be written. Older checkpoints are unchanged.
    """
    final = folder / name_of(step)

    def write(work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)  # left by a killed process with the same id
        work.mkdir()
        for name, values in tensors.items():
            plain = {k: v.detach().cpu().contiguous() for k, v in values.items()}
            write_tensors(work / f"{name}.safetensors", plain)
        write_text(work / "state.json", json.dumps(dict(state), indent=1))
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(work.iterdir())}
        write_text(work / MANIFEST, json.dumps({"step": step, "files": files}, indent=1))
        for path in work.iterdir():
            flush(path)
        flush(work)
        shutil.rmtree(final, ignore_errors=True)  # the same step, saved before the run was killed

    atomic_write(final, write)
    point(folder, "last", final.name)
    remove_old(folder, keep, newest_step=step, best=best, later=True)
    return final


def name_of(step: int) -> str:
    """Return the name of the folder of the checkpoint of `step`."""
    return f"step-{step:08d}"


def point(folder: Path, name: str, target: str) -> None:
    """Write `target`, the name of a step folder, to the file `name` ("last" or "best"), atomically."""

    atomic_write_text(folder / name, target + "\n")


def pointed(folder: Path, name: str) -> str:
    """Return what the file `name` ("last" or "best") names: a step folder that exists, or ""."""
    try:
        target = read_text(folder / name, limit=100).strip()
    except UnreadableFileError:
        return ""
    return target if _NAME.fullmatch(target) and (folder / target).is_dir() else ""


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that passes verification, or None, and a message for each newer one that failed."""
    passed_over: list[str] = []
    for path in newest_first(folder):
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
        manifest = read_json(path / MANIFEST, limit=MANIFEST_BYTES)
        listed = {str(name): (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: no readable {MANIFEST} ({type(error).__name__}).") from None
    if path.name != name_of(step):  # the manifest has no checksum of its own
        raise ValueError(f"{path}: {MANIFEST} is of step {step}.")
    if "state.json" not in listed or any(name != Path(name).name for name in listed):
        raise ValueError(f"{path}: {MANIFEST} does not list the files of a checkpoint.")
    for name, (size, digest) in listed.items():
        file = path / name
        try:
            sound = file.is_file() and file.stat().st_size == size and sha256_of(file) == digest
        except OSError:
            sound = False
        if not sound:
            raise ValueError(f"{path}: {name} is missing or damaged.")
    tensors = {Path(n).stem: read_tensors(path / n) for n in listed if n.endswith(".safetensors")}
    if wrong := not_finite(tensors):
        raise ValueError(f"{path}: values are not finite: {some_names(wrong)}.")
    return Checkpoint(step, tensors, read_state(path))


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON state of the checkpoint in a step folder, without comparing its checksum.

    Raises:
        ValueError: it cannot be read.
    """
    return read_json(path / "state.json", limit=_STATE_BYTES)


def not_finite(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return `file:name` of each tensor with a value that is not finite."""
    return [
        f"{file}:{name}"
        for file, values in tensors.items()
        for name, value in values.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]


def remove_old(folder: Path, keep: int, *, newest_step: int, best: int | None, later: bool = False) -> None:
    """Delete all checkpoints except the `keep` newest up to `newest_step` and the best one, and temporary files.

    The run must be locked.

    Args:
        later: delete also those of steps after `newest_step`, which are damaged; they do not count among the newest.
    """
    # The file may be damaged, or older than `best` if the process was killed before it was written.
    spared = {pointed(folder, "best"), "" if best is None else name_of(best)}
    found = newest_first(folder)
    first = found.index(folder / name_of(newest_step))
    old = [path for path in found[first + keep :] if path.name not in spared]
    for path in (found[:first] if later else []) + old:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
