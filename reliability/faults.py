"""Faults of a disk at any file operation of a run, by a library that replaces the calls of the C library (faults.c)."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import os
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
KILL, VANISH = -1, -2  # as in faults.c
ERRORS = {"fails": errno.EIO, "disk full": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT,
          "too many open files": errno.EMFILE, "is killed": KILL, "folder vanishes": VANISH}  # fmt: skip


@functools.cache
def library() -> Path | None:
    """Return the compiled library; None if there is no C compiler."""
    name = f"normfree-faults-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}-{os.getuid()}.so"
    path = Path(tempfile.gettempdir()) / name
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(partial), str(SOURCE), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        partial.replace(path)
    return path


@dataclass(frozen=True)
class Fault:
    """A fault in one folder; called in the process that will have it. The library must be loaded.

    Attributes:
        folder: absolute path.
        counter: file that counts the operations, also when the process is killed; see `counted`.
        at: index of the operation; -1: none, only count.
        what: key of ERRORS.
        lasting: all later operations fail too.
    """

    folder: Path
    counter: Path
    at: int = -1
    what: str = "fails"
    lasting: bool = False

    def __call__(self) -> None:
        loaded = ctypes.CDLL(None)
        arguments = [ctypes.c_char_p(os.fsencode(path)) for path in (self.folder, self.counter)]
        number = ERRORS[self.what]
        opens = int(number == errno.EMFILE)
        loaded.fault_arm(*arguments, ctypes.c_long(self.at), number, 2 if self.lasting else 1, opens)


def new_counter(folder: Path) -> Path:
    """Return a counter file of 0 operations in `folder`."""
    path = folder / "operations"
    path.write_bytes(struct.pack("l", 0))
    return path


def counted(counter: Path) -> int:
    """Return the number of operations that were counted."""
    return int(struct.unpack("l", counter.read_bytes())[0])
