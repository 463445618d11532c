"""Checkpoints that survive a kill at any instant: whole or absent, checksummed, free of pickle.

    checkpoints/step-00001200/   model.safetensors  ema.safetensors  optim.safetensors  state.json  MANIFEST.json
    checkpoints/last, best       text files naming a step folder

A folder is written under a temporary name, every file flushed to disk, the manifest (size and sha256 of each
file) last, then renamed; only then are old ones deleted. What is not verified is passed over, aloud.
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

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """One that verified: tensors by file and name, and the JSON state."""

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
    """Writes the checkpoint of `step` under `folder`, points `last` at it, and removes all but the `keep` newest
    and the one that `best` names. Later steps were passed over as damaged, and go as well. Returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / name_of(step)
    work = folder / f".{final.name}.tmp-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
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
    shutil.rmtree(
        final, ignore_errors=True
    )  # the same step saved before, for example by a run that was killed
    work.rename(final)
    _flush(folder)
    point(folder, "last", final.name)
    _remove_old(folder, keep, newest_step=step)
    return final


def name_of(step: int) -> str:
    """The name of the folder that holds the checkpoint of `step`."""
    return f"step-{step:08d}"


def point(folder: Path, name: str, target: str) -> None:
    """Makes the pointer file `name` ("last", "best") hold `target`, atomically."""
    work = folder / f".{name}.tmp-{os.getpid()}"
    work.write_text(target + "\n", encoding="utf-8")
    _flush(work)
    work.replace(folder / name)
    _flush(folder)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that did not."""
    passed_over: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return read(path), passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def read(path: Path) -> Checkpoint:
    """The checkpoint in one step folder.

    Raises:
        ValueError: a file is missing, short, or differs from its checksum.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step = int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no readable {MANIFEST} ({type(error).__name__}).") from None
    if path.name != name_of(step):  # nothing else vouches for the manifest's own number
        raise ValueError(f"{path}: {MANIFEST} says step {step}.")
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
    best = folder / "best"
    spared = {best.read_text(encoding="utf-8").strip()} if best.is_file() else set()
    found = sorted(folder.glob("step-*"), reverse=True)
    # A damaged later one must not push a sound one out of the `keep` newest.
    later = [path for path in found if path.name > name_of(newest_step)]
    old = [path for path in found[len(later) :][keep:] if path.name not in spared]
    for path in later + old:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.tmp-*"):  # left by a process that was killed
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file's or folder's content is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
