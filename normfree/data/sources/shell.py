"""Shards written by a shell command: it runs once, and its output is kept as a local file and used like any shard.

A command in a data specification has the permissions of the user, so it runs only if the caller allows it (`run=True`):
for text that the user just typed, never for text that was read from a file. If the output is already in the cache, no
command runs, so a run can resume from its own config.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from pathlib import Path

from normfree.data.sources.storage import StoredFile, braces
from normfree.data.sources.tar_index import cache_folder, index_tar
from normfree.files import atomic_write
from normfree.suggest import problem

PREFIX = "pipe:"
_TAIL = 2000  # bytes of a command's standard error that are kept


def fetch(command: str, *, run: bool, folder: Path | None = None) -> StoredFile:
    """Return the local file with the standard output of `command`, a plain tar.

    The file is named after the command. While it exists, the command does not run again, even if its result would
    differ now.

    Args:
        command: Shell command.
        run: Run the command if the file is missing. The file is kept only if the command succeeds and its output is a
            complete tar.
        folder: Folder of the file, by default normfree/pipes in the user's cache folder.

    Raises:
        ValueError: The file is missing and `run` is False, or the command failed, or its output is no tar.
    """
    folder = folder or cache_folder().parent / "pipes"
    name = hashlib.blake2b(command.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    path = folder / f"{name}.tar"
    stored = StoredFile(str(path), label=_label(command, name))
    if path.is_file():
        return stored
    if not run:
        raise ValueError(
            problem(
                f"'{PREFIX}{command}' is a shell command, and was not typed here",
                allowed="commands that the user types; those of a config only if their files were fetched before",
                fix=f"read the command, then type it yourself: --data '{PREFIX}...'",
            )
        )

    def write(work: Path) -> None:
        with work.open("wb") as file:
            done = subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=file,
                                  stderr=subprocess.PIPE, check=False)  # fmt: skip
        if done.returncode:
            lines = done.stderr[-_TAIL:].decode("utf-8", "replace").strip().splitlines() or ["no message"]
            raise ValueError(
                problem(
                    f"'{PREFIX}{command}' failed with code {done.returncode}: {lines[-1]}",
                    allowed="a command that writes a tar to its standard output",
                    fix="try it in a shell",
                )
            )
        with work.open("rb") as tar:  # a pipeline may fail in the middle without an exit code
            index_tar(tar, name=stored.shown, size=os.path.getsize(work))

    atomic_write(path, write)
    return stored


def pipe_commands(spec: str) -> list[str]:
    """Return the commands of "pipe:COMMAND", with {000..127} and {a,b} expanded.

    Raises:
        ValueError: There is no command, a command occurs twice, or the braces are malformed.
    """
    command = spec.removeprefix(PREFIX).strip()
    found = braces(command, spec)
    if not command or len(set(found)) != len(found):
        raise ValueError(
            problem(
                f"{spec!r} names {'a command twice' if command else 'no command'}",
                allowed=f"{PREFIX}COMMAND",
                fix=f"{PREFIX}'curl -s https://host/train-{{000..127}}.tar'",
            )
        )
    return found


def _label(command: str, name: str) -> str:
    """Return the file name that a command reads, without a query, which may hold secrets: its last *.tar."""
    files = re.findall(r"([^\s/'\"?=]+\.tar)\b", command)
    return str(files[-1]) if files else f"{name[:8]}.tar"
