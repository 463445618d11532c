"""Goal 5: single-bit flips and cuts in checkpoints, model folders and run folders: noticed, or harmless by proof."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from reliability.children import call
from reliability.goals import Case, Result
from reliability.operations import SHORT
from reliability.runs import differences, train, uninterrupted

FLIPS = 50  # in each case of checkpoints and model folders
# Damage that a resumed run must notice or survive, since the run goes on from these files.
RUN_FILES = ("config.toml", "metrics.jsonl", "checkpoints/last", "checkpoints/best", "environment.txt")
PARTS = ("checkpoint", "model folder")
_CHECKS = {
    "checkpoint": "a flip or cut in a checkpoint: noticed, an older checkpoint or none is used",
    "model folder": "a flip or cut in a model folder: noticed, or the model is the same bit by bit",
    "run folder": "a flip or cut in another file of a run: resuming says so, or ends identical",
}


def cases(count: int) -> Iterator[Case]:
    """Return `count` cases of each kind of folder; those of checkpoints and model folders damage FLIPS files each."""
    for seed in range(count):
        for part in PARTS:
            yield Case(_CHECKS[part], f"{part} {seed}", partial(damaged_folder, part, seed))
        for file in RUN_FILES:
            yield Case(_CHECKS["run folder"], f"{file} {seed}", partial(damaged_run, file, seed))


def damage(path: Path, rng: random.Random) -> str:
    """Flip one bit of a file, or cut it, and return what was done."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.2:
        path.write_bytes(data[:at])
        return f"{path.name} cut to {at} bytes"
    bit = rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {at}"


# --- checkpoints and model folders ------------------------------------------------------------------------------


def damaged_folder(part: str, seed: int, flips: int = FLIPS) -> Result:
    """Damage a folder `flips` times, each time by one bit or cut, and read it."""
    whole, _ = uninterrupted(SHORT)
    folder = whole / "model" if part == "model folder" else max((whole / "checkpoints").glob("step-*"))
    read: Callable[..., Any] = read_model if part == "model folder" else read_checkpoint
    outcome = call(try_flips, read, folder, seed, flips, patience=600.0)
    if outcome.error:
        return Result(flips, 0, f"{outcome.error}: {outcome.text[:300]}")
    return Result(flips, flips - len(outcome.value), "; ".join(outcome.value[:5]))


def try_flips(read: Callable[[Path], Any], folder: Path, seed: int, flips: int) -> list[str]:
    """Return the damages that were not noticed and changed what is read."""
    rng, missed, expected = random.Random(f"{folder.name} {seed}"), [], read(folder)
    # Large files, in which most flips would be, and small ones alike.
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        shutil.copytree(folder, copy)
        for _ in range(flips):
            path = copy / rng.choice(files).name
            before = path.read_bytes()
            done = damage(path, rng)
            try:
                if read(copy) != expected:
                    missed.append(done)
            except ValueError:
                pass
            path.write_bytes(before)
    return missed


def read_checkpoint(folder: Path) -> Any:
    """Return everything that a run takes from a checkpoint."""
    from normfree.training.checkpoint import read

    found = read(folder)
    tensors = {f"{file}:{n}": _bits(t) for file, part in found.tensors.items() for n, t in part.items()}
    return found.step, tensors, found.state


def read_model(folder: Path) -> Any:
    """Return everything that predictions take from a model folder."""
    from dataclasses import asdict

    from normfree.pretrained import from_pretrained

    found = from_pretrained(folder)
    tensors = {name: _bits(tensor) for name, tensor in found.net.state_dict().items()}
    return tensors, found.classes, asdict(found.preprocessing), found.sigmoid, asdict(found.net.variant)


def _bits(tensor: Any) -> tuple[str, bytes]:
    return str(tensor.dtype), tensor.contiguous().numpy().tobytes()


# --- run folders ------------------------------------------------------------------------------------------------


def damaged_run(file: str, seed: int) -> Result:
    """Damage a file of a run that was stopped in its middle, and resume it."""
    whole, _ = uninterrupted(SHORT)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        shutil.copytree(whole, out)
        newest = max((out / "checkpoints").glob("step-*"))
        shutil.rmtree(newest)  # as if the run had been killed before its last checkpoint
        done = damage(out / file, random.Random(f"{file} {seed}"))
        job = train(out)
        code, printed = job.wait()[0], job.printed()
        wrong = complaints(code, printed, whole, out, file)
    return Result(1, int(not wrong), f"{done}: {'; '.join(wrong)}" if wrong else "")


def complaints(code: int, printed: str, whole: Path, out: Path, file: str) -> list[str]:
    """Return what is wrong with the end of a run that was resumed with a damaged file."""
    errors = [line for line in printed.splitlines() if line.startswith("normfree: ")]
    if "Traceback" in printed:
        return [f"a traceback: {printed[-300:]}"]
    if code == 2:
        return [] if errors else ["exit code 2 without a line"]
    if code:
        return [f"exit code {code}"]
    found = differences(whole, out)
    if file == "config.toml":  # keys that may change decide no weights; a longer run is announced
        decisive = ("model/model.safetensors", "results.json")
        return [] if "lengthened from" in printed else [text for text in found if text.startswith(decisive)]
    others = [text for text in found if not text.startswith(f"{file}:")]
    if file == "metrics.jsonl" and found != others and "was changed or damaged since" not in printed:
        others.append("lines were lost in silence")
    return others
