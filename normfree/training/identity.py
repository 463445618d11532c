"""What a run must keep when it continues: the config keys that decide its numbers, and its data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfree.data.source import Source, Split
from normfree.suggest import printable, problem, some_names
from normfree.training.config import Config

# Keys that may change: they decide speed, messages and files, or agree up to rounding. `data` may be in another folder,
# and `length` may grow; both are compared in other ways. All other keys are decisive.
FREE = frozenset(
    (
        "compile", "data", "device", "input.bad_images", "input.workers", "length", "log.checkpoint_every", "log.every",
        "log.keep", "log.to", "on_divergence",
    )
)  # fmt: skip


def identity_of(config: Config, split: Split) -> dict[str, Any]:
    """Return the entries of a checkpoint's state that a run compares when it continues."""
    return {"config": decisive(config), "data": data_of(split), "length": config.length}


def decisive(config: Config) -> dict[str, Any]:
    """Return the config keys that decide the numbers of a run, with their values."""
    values: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        section = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        values |= {k: v for k, v in section.items() if k not in FREE}
    # "replicated" and "sharded" agree up to rounding, so a run may switch between them; "exact" promises bits.
    values["parallel"] = values["parallel"] == "exact"
    return values


def with_free_keys(before: Config, now: Config) -> Config:
    """Return the config of a run with those keys of another config that may change when the run continues."""
    top = {key: getattr(now, key) for key in (*FREE, "parallel") if hasattr(now, key)}
    for section in ("input", "log"):
        changed = {k: getattr(getattr(now, section), k) for s, _, k in (key.partition(".") for key in FREE)
                   if s == section and hasattr(getattr(now, section), k)}  # fmt: skip
        top[section] = getattr(before, section).model_copy(update=changed)
    return before.model_copy(update=top)


def require_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run continues with the same decisive keys. Keys that only one version has are not compared.

    Raises:
        ValueError: values differ; the message names the keys.
    """
    changed = [key for key in now if key in before and before[key] != now[key]]
    if changed:
        given = f"{out} was started with another {', '.join(changed)}"
        raise ValueError(problem(given, fix="drop the change, or start another run with --out"))


def data_of(split: Split) -> dict[str, Any]:
    """Return what a run must find again in its data: the classes, and number and digest of the samples."""
    return {
        "classes": list(split.classes),
        **{name: _samples(source) for name, source in (("train", split.train), ("val", split.val))},
    }


def require_same_data(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that a run continues on the same samples, with the same labels in the same order.

    Raises:
        ValueError: classes or samples differ.
    """
    fix = "restore the data, or start another run with --out"
    if list(before["classes"]) != now["classes"]:
        gone = [printable(c) for c in before["classes"] if c not in now["classes"]]
        new = [printable(c) for c in now["classes"] if c not in before["classes"]]
        given = f"the classes of the data of {out} have changed since it was started"
        given += f"; missing: {some_names(gone)}" if gone else ""
        given += f"; new: {some_names(new)}" if new else ""
        raise ValueError(problem(given, fix=fix))
    for name, kind in (("train", "training"), ("val", "validation")):
        if before[name] != now[name]:
            counts = f"{before[name]['samples']:,} before, {now[name]['samples']:,} now"
            given = f"the {kind} images of {out} have changed since it was started ({counts})"
            raise ValueError(problem(given, fix=fix))


def _samples(source: Source) -> dict[str, Any]:
    """Return the number of samples, and the SHA-256 of their labels and their names in order.

    The folders that all names share are left out, so that a folder of images may move.
    """
    names = [source.name(i) for i in range(len(source))]
    first, last = (min(names), max(names)) if names else ("", "")
    same = [a == b for a, b in zip(first, last, strict=False)]
    shared = first.rfind("/", 0, same.index(False) if False in same else len(same)) + 1
    digest = hashlib.sha256()
    for index, name in enumerate(names):
        digest.update(f"{source.label(index)} {name[shared:]}\n".encode("utf-8", "surrogateescape"))
    return {"samples": len(names), "sha256": digest.hexdigest()}
