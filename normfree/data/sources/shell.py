"""Shards that a shell command writes: run once into a local file, which then is a shard like every other.

A command in a data word can do what its author can do, so it runs only when the caller says so (`run=True`): for a
word that the user has just typed, never for one that was read from a file. A word whose files are here already needs
no command, so a run can go on from its own config.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

from normfree.data.sources.storage import StoredFile, braces
from normfree.data.sources.tar_index import cache_folder, index_tar

PREFIX = "pipe:"
_TAIL = 2000  # characters of a command's complaints that are looked at


def fetched(command: str, *, run: bool, folder: Path | None = None) -> StoredFile:
    """The local file of what `command` writes to its standard output, a plain tar.

    It lies in `folder` (default: normfree/pipes in the user's cache folder) and is named after the command; while it
    is there, the command does not run again, whatever has changed behind it. With `run`, a missing file is made: by
    the shell, and kept only if the command succeeds and its output is a whole tar. Raises `ValueError` if it is not,
    and for a missing file without `run`.
    """
    folder = folder or cache_folder().parent / "pipes"
    name = hashlib.blake2b(command.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = folder / f"{name}.tar"
    place = StoredFile(str(path), label=_label(command, name))
    if path.is_file():
        return place
    if not run:
        raise ValueError(
            f"'{PREFIX}{command}' is a shell command, and was not typed here. Allowed: commands that the user types; "
            "those of a config run only where their files were fetched before. "
            f"Fix: read the command, then say it yourself: --data '{PREFIX}...'"
        )
    folder.mkdir(parents=True, exist_ok=True)
    handle, work = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            done = subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=file,
                                  stderr=subprocess.PIPE, check=False)  # fmt: skip
        if done.returncode:
            lines = done.stderr[-_TAIL:].decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise ValueError(
                f"'{PREFIX}{command}' failed with code {done.returncode}: {lines[-1]}. Allowed: a command that writes "
                "a tar to its standard output. Fix: try it in a shell"
            )
        with open(work, "rb") as tar:  # a pipe of several commands may fail in the middle and say nothing
            index_tar(tar, name=place.shown, size=os.path.getsize(work))
        os.replace(work, path)
    finally:
        if os.path.exists(work):
            os.unlink(work)
    return place


def commands(word: str) -> list[str]:
    """The commands of "pipe:COMMAND", with {000..127} and {a,b} written out. Raises `ValueError` for one that comes
    twice, for other braces and for none."""
    command = word.removeprefix(PREFIX).strip()
    found = braces(command, word)
    if not command or len(set(found)) != len(found):
        raise ValueError(
            f"{word!r} names {'a command twice' if command else 'no command'}. Allowed: {PREFIX}COMMAND. "
            f"Fix: {PREFIX}'curl -s https://host/train-{{000..127}}.tar'"
        )
    return found


def _label(command: str, name: str) -> str:
    # What a command reads is its last word with .tar in it, without a query, which may hold secrets.
    words = re.findall(r"([^\s/'\"?=]+\.tar)\b", command)
    return str(words[-1]) if words else f"{name[:8]}.tar"
