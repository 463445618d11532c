"""The samples of a run: written when it starts, compared when it continues or when its model is evaluated."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from normfree.data.audit import digest_of
from normfree.data.source import Source, Split
from normfree.data.subset import AUDIT_LIMIT, encoded_bytes, shared_folder
from normfree.data.transforms.decode import ImageError
from normfree.files import atomic_write_text, csv_text, read_csv
from normfree.suggest import problem

SAMPLES_FILE = "samples.csv"
_COLUMNS = ("part", "class", "name", "digest")
_BYTES = 200_000_000  # of a samples.csv; `AUDIT_LIMIT` samples with names of 60 characters take 60 MB


@dataclass(frozen=True)
class SampleRecord:
    """One sample of a run.

    Attributes:
        part: "train", "val" or "test".
        label: Name of its class.
        name: Its name without the folder that all samples share, so that data may be moved.
        digest: Hash of its bytes (`digest_of`), "" if it was not computed.
    """

    part: str
    label: str
    name: str
    digest: str = ""


def records_of(split: Split, digests: Mapping[str, Sequence[str]] | None = None) -> list[SampleRecord]:
    """Return the samples of a split, or nothing if there are more than `AUDIT_LIMIT`.

    Args:
        split: The split.
        digests: Hashes by part, as an audit computes them.
    """
    parts = split.parts()
    if sum(map(len, parts.values())) > AUDIT_LIMIT:
        return []
    names = {part: [source.name(i) for i in range(len(source))] for part, source in parts.items()}
    shared = len(shared_folder([name for part in names.values() for name in part]))
    found = []
    for part, source in parts.items():
        own = (digests or {}).get(part) or [""] * len(source)
        for index, name in enumerate(names[part]):
            label = split.classes[source.label(index)]
            found.append(SampleRecord(part, label, name[shared:].replace(os.sep, "/"), own[index]))
    return found


def write_records(records: Sequence[SampleRecord], path: Path) -> None:
    """Write samples.csv."""
    rows = [_COLUMNS]
    for sample in records:
        # The name of a file need not be valid UTF-8.
        name = sample.name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        rows.append((sample.part, sample.label, name, sample.digest))
    atomic_write_text(path, csv_text(rows))


def read_records(path: Path) -> list[SampleRecord] | None:
    """Return the samples in a samples.csv; None if there is no such file.

    Raises:
        ValueError: The file cannot be read, or is damaged.
    """
    if not path.exists():
        return None
    rows = read_csv(path, limit=_BYTES)
    if not rows or tuple(rows[0]) != _COLUMNS or any(len(row) != len(_COLUMNS) for row in rows):
        raise ValueError(
            problem(f"{path} is damaged", fix="delete it; the data of the run are then not compared")
        )
    return [SampleRecord(*row) for row in rows[1:]]


def check_same(before: Sequence[SampleRecord], now: Sequence[SampleRecord], *, data: str, out: Path) -> None:
    """Check that a run continues with the samples that it started with.

    Raises:
        ValueError: Samples are gone, new, changed, or in another part.
    """
    old, new = ({(s.part, s.label, s.name): s.digest for s in samples} for samples in (before, now))
    gone, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    changed = sorted(k for k in old.keys() & new.keys() if old[k] and new[k] and old[k] != new[k])
    if not gone and not added and not changed:
        return
    what = [
        f"{len(samples)} {kind}, such as {samples[0][0]}: {samples[0][2]}"
        for kind, samples in (("are gone", gone), ("are new", added), ("have changed", changed))
        if samples
    ]
    given = f"the images of {data} are not those that {out} was started with ({'; '.join(what)})"
    fix = f"restore them, or train on the new data from this run: normfree train finetune --weights {out} --data {data}"
    raise ValueError(problem(given, allowed="the same images in the same parts, in any folder", fix=fix))


def trained_on(source: Source, records: Sequence[SampleRecord]) -> list[int]:
    """Return the indices of the samples of a source that a run was trained on, by the hash of their bytes."""
    known = {sample.digest for sample in records if sample.part == "train" and sample.digest}
    found = []
    for index in range(len(source)) if known else ():
        try:
            data = encoded_bytes(source, index)
        except ImageError:  # the evaluation names it
            continue
        if data is not None and digest_of(data) in known:
            found.append(index)
    return found
