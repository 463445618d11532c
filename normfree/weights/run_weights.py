"""Find the weights and the description of a model: in a model folder, a finished run, or a run that was stopped."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normfree.files import UnreadableFileError, read_json, read_text, sha256_of
from normfree.suggest import problem

MODEL_FILE = "model.safetensors"
EXPORTED = (".onnx", ".xml", ".pt2")  # files that `normfree export` writes
_CONFIG = "config.json"
# The list of files of a checkpoint with their hashes, and how many bytes of it are read.
MANIFEST, MANIFEST_BYTES = "MANIFEST.json", 100_000
_AVERAGE = "ema.safetensors"  # the averaged weights in a checkpoint
_STEP = re.compile(r"step-[0-9]{8,18}")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is.

    Attributes:
        folder: the folder with its `config.json`.
        weights: the safetensors file.
        note: for a run that is not finished, a sentence that states the step of the weights, else "".
    """

    folder: Path
    weights: Path
    note: str = ""


def model_folder(path: Path) -> Path:
    """Return `path` if it is a model folder, or the model folder `path/model` of a finished run.

    Raises:
        ValueError: neither contains both `config.json` and `model.safetensors`.
    """
    found = _complete(path)
    if found is None:
        raise ValueError(_no_model(path))
    return found


def model_files(path: Path) -> ModelFiles:
    """Return the files of a model folder or a run folder.

    A run that was stopped has the averaged weights of its best checkpoint so far, or of its newest one.

    Raises:
        ValueError: there is no model, and no checkpoint that is complete.
    """
    found = _complete(path)
    if found is not None:
        return ModelFiles(found, found / MODEL_FILE)
    if (path / "model" / _CONFIG).is_file():
        for folder, kind in _checkpoints(path / "checkpoints"):
            if _intact(folder):
                which = f"the averaged weights of {kind} checkpoint, step {_step_in(folder)}"
                note = f"{path} is not finished; these are {which}"
                return ModelFiles(path / "model", folder / _AVERAGE, note)
    raise ValueError(_no_model(path))


def _complete(path: Path) -> Path | None:
    """Return the model folder that `path` is or contains, or None."""
    for folder in (path, path / "model"):
        if (folder / _CONFIG).is_file() and (folder / MODEL_FILE).is_file():
            return folder
    return None


def _checkpoints(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the checkpoints of a run, the best one first and then the newest, with their description."""
    with contextlib.suppress(UnreadableFileError):
        best = read_text(folder / "best", limit=100).strip()
        if _STEP.fullmatch(best):  # nothing outside of the folder
            yield folder / best, "its best"
    for path in newest_first(folder):
        yield path, "its newest intact"


def newest_first(folder: Path) -> list[Path]:
    """Return the step folders in the `checkpoints` folder of a run, the one of the largest step first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_step_in, reverse=True)


def _step_in(path: Path) -> int:
    """Return the step of a step folder. Names order as steps do only up to eight digits."""
    return int(path.name.removeprefix("step-"))


def _intact(folder: Path) -> bool:
    """Return True if the averaged weights of a checkpoint are as they were written."""
    try:
        listed = read_json(folder / MANIFEST, limit=MANIFEST_BYTES)["files"][_AVERAGE]
        return bool(sha256_of(folder / _AVERAGE) == listed["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def exported_file(path: Path) -> str:
    """Return the error message for an exported file where weights are needed."""
    given = f"{str(path)!r} is an exported file, whose weights are part of its graph"
    return problem(given, fix="use the run or model folder that it was exported from")


def _no_model(path: Path) -> str:
    """Return the error message for a path without a model."""
    if (path / "config.toml").is_file():
        given = f"the run {str(path)!r} has no weights yet"
        fix = f"continue it with `normfree train {path}`; it saves weights at its first checkpoint"
        return problem(given, allowed="a run with a checkpoint or a model", fix=fix)
    if (path / "folds.json").is_file():
        given = f"{str(path)!r} holds the runs of a cross-validation"
        return problem(given, allowed=f"one of them, for example {path / 'fold-1'}")
    fix = "give the folder of a run, or one that save_pretrained wrote"
    if path.suffix in EXPORTED:
        return exported_file(path)
    if path.is_file():
        fix = f"convert the file first: normfree convert {path} FOLDER"
    return problem(
        f"{str(path)!r} is not a model folder",
        allowed=f"a folder with {_CONFIG} and {MODEL_FILE}, or a run folder",
        fix=fix,
    )
