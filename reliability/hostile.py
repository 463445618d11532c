"""Goal 4: hostile files for every reader. Nothing runs, nothing else is touched, and the answer is one line, soon."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from normfree.suggest import printable
from reliability import hostile_readers as readers
from reliability.children import Outcome, call, watched
from reliability.goals import Case, Result, spread
from reliability.onnx_payloads import ONNX
from reliability.payloads import ANY, CSV, JSON, NPZ, TAR, TENSORS, TOML, TORCH, Payload, Site, raw_pickle

SECONDS, MEMORY = 5.0, 1_000_000_000


class Reader(NamedTuple):
    """What reads hostile files.

    Attributes:
        read: a function of `hostile_readers`, which is called with the folder.
        file: path of the hostile file in the folder.
        payloads: by name.
        sound: names of payloads that may be read, because the reader has nothing against them.
        prepare: makes the folder.
        forge: called with the folder after the file was written, to make checksums fit.
    """

    read: Callable[[Path], Any]
    file: str
    payloads: dict[str, Payload]
    sound: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = lambda folder: None
    forge: Callable[[Path], object] = lambda folder: None


# --- folders --------------------------------------------------------------------------------------------------


@functools.cache
def _template(what: str) -> Path:
    """Return a folder that is copied for each payload; it is made in a process that has torch."""
    _temporary.append(tempfile.TemporaryDirectory(prefix="normfree-hostile-"))
    folder = Path(_temporary[-1].name) / "template"
    folder.mkdir()
    outcome = call(getattr(readers, f"make_{what}"), folder)
    assert not outcome.error, outcome.text
    return folder


_temporary: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def copied(what: str) -> Callable[[Path], object]:
    """Return a function that copies a template into a folder."""
    return lambda folder: shutil.copytree(_template(what), folder, dirs_exist_ok=True)


def forge(folder: Path) -> None:
    """Let the manifest of a checkpoint state what its files are."""
    step = folder / "step-00000001"
    manifest = json.loads((step / "MANIFEST.json").read_text(encoding="utf-8"))
    for name, stated in manifest["files"].items():
        path = step / name
        if path.is_file() and path.stat().st_size < 100_000_000:
            stated |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (step / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")


PICKLES = {f"pickle, {name}": raw_pickle(name, 2) for name in ("os.system", "eval", "torch.load")}
VALID = ("a valid file of another network", "huge shape of nothing", "name with escape code")
ODD = ("NaN", "duplicate keys", "escape code")  # valid, though strange
READERS = {
    "weights": Reader(readers.weights, "a.safetensors", TENSORS,
                      (*VALID, "not finite")),
    "npz": Reader(readers.weights, "a.npz", NPZ, prepare=lambda folder: None),
    "torch file": Reader(readers.torch_file, "a.pth", TORCH),
    "weights of a model folder": Reader(readers.model, "model.safetensors", TENSORS, prepare=copied("model")),
    "config of a model folder": Reader(readers.model, "config.json", JSON, prepare=copied("model")),
    "checksums of a model folder": Reader(readers.model, "SHA256SUMS", ANY, ("empty", "link to itself"),
                                          copied("model")),
    "config of a model of the hub": Reader(readers.hub, "config.json", JSON, prepare=copied("model")),
    "weights of a model of the hub": Reader(readers.hub, "model.safetensors", TENSORS, prepare=copied("model")),
    "tensors of a checkpoint": Reader(readers.checkpoint, "step-00000001/ema.safetensors", TENSORS,
                                      VALID, copied("checkpoint"), forge),
    "state of a checkpoint": Reader(readers.checkpoint, "step-00000001/state.json", JSON, (*ODD, "wrong types"),
                                    copied("checkpoint"), forge),
    "manifest of a checkpoint": Reader(readers.checkpoint, "step-00000001/MANIFEST.json", JSON,
                                       prepare=copied("checkpoint")),
    "pointer to the last checkpoint": Reader(readers.pointer, "last", ANY, tuple(ANY)),
    "config.toml": Reader(readers.config, "config.toml", TOML, ("empty",)),
    "metrics": Reader(readers.metrics, "metrics.jsonl", JSON, tuple(JSON)),
    "samples of a run": Reader(readers.samples, "samples.csv", CSV, ("link to itself",)),
    "environment of a run": Reader(readers.environment, "environment.txt", ANY, tuple(ANY)),
    "table of images": Reader(readers.table, "a.csv", CSV),
    "list of images": Reader(readers.listed, "a.txt", CSV),
    "shard": Reader(readers.shards, "a.tar", TAR),
    "class names of shards": Reader(readers.shards, "classes.json", JSON,
                                    ("folder", "pipe", "link to itself", "link to a device"), copied("shard")),
    "packed images": Reader(readers.packed, "a.packed", TENSORS),
    "ONNX": Reader(readers.onnx, "a.onnx", ANY | ONNX),
    ".pt2": Reader(readers.program, "a.pt2", ANY | PICKLES, prepare=lambda folder: None),
    "folder of torch.distributed.checkpoint": Reader(readers.model, ".metadata", ANY | PICKLES),
}  # fmt: skip


def cases(count: int) -> Iterator[Case]:
    """Return `count` of the payloads of each reader."""
    for name, reader in READERS.items():
        for index in spread(len(reader.payloads), count):
            payload = list(reader.payloads)[index]
            yield Case(f"hostile files for: {name}", f"{name}: {payload}", partial(refused, name, payload))


def refused(name: str, payload: str) -> Result:
    """Give one hostile file to a reader, in a process of its own."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        outside, folder = Path(temporary) / "outside", Path(temporary) / "inside"
        outside.mkdir()
        folder.mkdir()
        (outside / "secret").write_bytes(b"secret")
        reader.prepare(folder)
        target = folder / reader.file
        if target.is_file():
            target.unlink()
        reader.payloads[payload](Site(target, outside))
        reader.forge(folder)
        with watched(outside) as events:
            outcome = call(reader.read, folder)
    wrong = complaints(outcome, events, sound=payload in reader.sound)
    return Result(1, int(not wrong), "; ".join(wrong))


def complaints(outcome: Outcome, events: list[str], *, sound: bool) -> list[str]:
    """Return what is wrong with the way in which a reader took a hostile file."""
    wrong = [f"touched {name!r} outside" for name in events]
    if outcome.error == "" and not sound:
        wrong.append(f"was read: {str(outcome.value)[:100]!r}")
    if outcome.error not in ("", "ValueError"):
        wrong.append(f"{outcome.error}: {outcome.text[:200]!r}")
    if "\n" in printable(outcome.text):
        wrong.append(f"several lines: {outcome.text[:200]!r}")
    if outcome.seconds > SECONDS or outcome.memory > MEMORY:
        wrong.append(f"{outcome.seconds:.1f} s, {outcome.memory / 1e6:.0f} MB")
    return wrong
