"""Safetensors files: reading within limits, and writing with the errors of the system."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from normfree.files import UnreadableFileError

# Largest header that is parsed, in bytes. 2,000 tensors take 250 kB; the library itself allows 100 MB.
MAX_HEADER = 8 << 20


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        UnreadableFileError: the file is missing, no regular file, or damaged, or its header is too large.
    """
    from safetensors.torch import load_file

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableFileError(f"{str(path)!r} is not a regular file.")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise UnreadableFileError(
                f"{path} is not a readable safetensors file: a header of {header:,} bytes."
            )
        return load_file(path)
    except UnreadableFileError:
        raise
    except Exception as error:  # SafetensorError, OSError, and KeyError for types that torch does not have
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UnreadableFileError(f"{path} is not a readable safetensors file: {reason}.") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written. The library's own error, which hides the cause in its text, is translated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        # For example: I/O error: No space left on device (os error 28)
        reason = re.sub(r"^.*error: | \(os error \d+\)$", "", str(error))
        raise OSError(f"{path.name} cannot be written: {reason}") from None
