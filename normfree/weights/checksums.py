"""The file SHA256SUMS of a model folder, by which damage of its config and weights is noticed.

It has the format of the program of that name: `sha256sum -c SHA256SUMS` checks the folder too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from normfree.files import atomic_write_text, read_text, sha256_of
from normfree.suggest import problem

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")
# Hugging Face's cache names the blobs of large files by their SHA-256.
_BLOB = re.compile(r"[0-9a-f]{64}")


def write_checksums(folder: Path, names: Sequence[str]) -> None:
    """Write SHA256SUMS for files of a folder."""
    atomic_write_text(folder / SUMS_FILE, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names))


def verify(folder: Path, name: str) -> None:
    """Check that a file of a model folder is the one that was saved, if the folder or the hub's cache has its SHA-256.

    Raises:
        ValueError: the file differs, or SHA256SUMS is damaged.
    """
    file, sums = folder / name, folder / SUMS_FILE
    blob = file.resolve()
    if blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name) and sha256_of(blob) != blob.name:
        raise ValueError(problem(f"{file} was damaged after the download", fix=f"delete {blob}"))
    if not sums.exists():
        return
    lines = read_text(sums, limit=100_000).splitlines()
    if not lines:
        raise ValueError(
            problem(f"{sums} is empty", allowed="a SHA-256 and a file name in each line",
                    fix=f"restore the folder, or delete {SUMS_FILE} to accept its files as they are")
        )  # fmt: skip
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(
                problem(f"{sums} has the line {line[:80]!r}", allowed="a SHA-256 and a file name",
                        fix=f"restore the folder, or delete {SUMS_FILE} to accept its files as they are")
            )  # fmt: skip
        if match[2] == name and match[1] != sha256_of(file):
            raise ValueError(
                problem(f"{file} is not the file that was saved: its SHA-256 differs from {SUMS_FILE}",
                        fix=f"restore it, or, to accept your own edit, delete its line in {sums}")
            )  # fmt: skip
