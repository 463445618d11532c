"""Read and write files with the parameter trees of DeepMind's released code.

Files of two formats have the suffix .npz. The released files are pickles, which `haiku_pickle` reads as data: names in
the file select one of eight rules, and nothing is imported or called. `write_haiku` writes a true npz file: an
uncompressed zip with one `.npy` member `module/name` for each array (`NFNet/~/stem_conv0/w.npy`). The name of the
parameter follows the last slash, as parameter names contain none.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from normfree.files import atomic_write, read_bytes
from normfree.suggest import problem
from normfree.weights.haiku_pickle import (
    DTYPES,
    MAX_ARRAYS,
    MODULE,
    NAME,
    SLACK,
    HaikuFileError,
    PickledArrays,
    check_names,
    checked_shape,
)
from normfree.weights.names import HaikuTree

# Largest zip directory that is read, in bytes; it is read at once. That of NFNet-F6 has 100 kB.
MAX_READ = 4 << 20
# Largest pickle that is read, in bytes. That of NFNet-F6, the largest released network, has 1.8 GB.
_BYTES = 4 << 30


def read_haiku(path: str | Path) -> HaikuTree:
    """Read the parameter tree from a released file (a pickle) or from one that `write_haiku` wrote (an npz).

    Reading takes memory for twice the file.

    Returns:
        `{module: {name: array}}` as in the file: convolution weights H W I O, linear weights I O. Arrays are writable.

    Raises:
        ValueError: the file is broken, or contains anything except arrays of numbers in mappings.

    Source: reference code, `utils.load_haiku_file`, whose files are dill pickles of Haiku FlatMappings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(problem(f"{str(path)!r} does not exist", fix="give a released .npz file"))
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        tree = _read_npz(path) if is_zip else PickledArrays(read_bytes(path, limit=_BYTES)).tree()
    except HaikuFileError as error:
        fix = "get the file from its publisher again"
        raise ValueError(
            problem(f"{path}: {error}", allowed="arrays of numbers in mappings", fix=fix)
        ) from None
    return tree


def write_haiku(path: str | Path, tree: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write a tree to a true npz file, which `read_haiku` reads back exactly and `numpy.load` opens too.

    The file appears complete or not at all. Equal trees give equal bytes.

    Args:
        path: the file, with the suffix .npz.
        tree: `{module: {name: array}}`.

    Raises:
        ValueError: a name is not a valid name of a module or parameter, or an array does not contain numbers.
    """
    members = {}
    for module, arrays in tree.items():
        for name, array in arrays.items():
            if not MODULE.fullmatch(module) or not NAME.fullmatch(name):
                raise ValueError(
                    problem(
                        f"{module!r}, {name!r} cannot be written",
                        allowed="a module of letters, digits, _ and ~ with / between its parts, and a parameter of "
                        "letters, digits and _",
                        fix="use names such as 'NFNet/~/linear' and 'w'",
                    )
                )
            if array.dtype.str[1:] not in DTYPES:
                raise ValueError(
                    problem(f"{module}/{name} has dtype {array.dtype}", allowed=", ".join(sorted(DTYPES)))
                )
            members[f"{module}/{name}"] = array

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **members)  # type: ignore[arg-type]  # names are arrays, none is `allow_pickle`
            file.flush()
            os.fsync(file.fileno())

    atomic_write(Path(path), write)


# --- npz ---------------------------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file that returns at most `MAX_READ` bytes per read, so that a larger zip directory is refused unparsed."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = -1 if size is None else size
        data = super().read(MAX_READ + 1 if wanted < 0 else min(wanted, MAX_READ + 1)) or b""
        if len(data) > MAX_READ:
            raise HaikuFileError("its zip directory is larger than that of any released network")
        return data


def _read_npz(path: Path) -> HaikuTree:
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            announced = sum(m.file_size for m in members)
            if announced > 2 * path.stat().st_size + SLACK or len(members) > MAX_ARRAYS:
                raise HaikuFileError(f"it announces {len(members):,} members of {announced:,} bytes in all")
            tree: HaikuTree = {}
            for member in members:
                module, _, name = member.filename.removesuffix(".npy").rpartition("/")
                check_names(module, name)
                if name in tree.get(module, {}) or not member.filename.endswith(".npy"):
                    raise HaikuFileError(f"it has a duplicate or unexpected member {member.filename[:60]!a}")
                tree.setdefault(module, {})[name] = _read_member(archive, member)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        UnicodeError,
        OverflowError,
    ) as error:
        raise HaikuFileError(f"it is a broken npz ({str(error)[:100]!a})") from None
    # zipfile raises these for encrypted members and for newer zip features.
    except (RuntimeError, NotImplementedError):
        raise HaikuFileError("it is a zip of another kind than numpy writes") from None
    if not tree:
        raise HaikuFileError("it is empty")
    return tree


_HEADER = re.compile(
    rb"\{'descr': '([<>|=])(\w\d)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Read one array. Its header is matched, not evaluated, and must announce exactly the bytes that follow."""
    what = ascii(member.filename[-60:])
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise HaikuFileError(f"its member {what} is compressed in another way than numpy does")
    with archive.open(member) as stream:
        start = stream.read(8)
        # The version of the format: in 1.0 the length of the header has two bytes, later four.
        width, form = (2, "<H") if start[6:] == b"\1\0" else (4, "<I")
        if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
            raise HaikuFileError(f"its member {what} is not an array")
        (length,) = struct.unpack(form, stream.read(width))
        match = _HEADER.fullmatch(stream.read(length) if length <= 10_000 else b"")  # 10,000 is numpy's bound
        if match is None or match[2].decode() not in DTYPES:
            raise HaikuFileError(f"its member {what} is not an array of numbers")
        dtype = np.dtype((match[1] + match[2]).decode())
        sizes = [size.strip() for size in match[4].decode().split(",")]
        shape = checked_shape(
            tuple(int(n) for n in sizes if n.isdecimal() and len(n) < 16), dtype.itemsize, member.file_size
        )
        if math.prod(shape) * dtype.itemsize != member.file_size - 8 - width - length:
            raise HaikuFileError(
                f"its member {what} announces the shape {shape}, which does not match its size"
            )
        array = np.empty(math.prod(shape), dtype)
        view, at = array.view(np.uint8).data, 0
        while at < len(view):
            got = stream.read(min(1 << 20, len(view) - at))
            if not got:
                raise HaikuFileError(f"its member {what} ends early")
            view[at : at + len(got)] = got
            at += len(got)
        if stream.read(1):
            raise HaikuFileError(f"its member {what} is longer than announced")
    shaped = array.reshape(shape, order="F" if match[3] == b"True" else "C")
    return np.asarray(shaped, dtype.newbyteorder("="), order="C")
