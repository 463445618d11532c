"""Parameter trees of DeepMind's released code on disk: `read_haiku`, `write_haiku`.

Two containers carry the suffix .npz. The released files are pickles, which are read as data (`pickled`): names in the
file select one of eight rebuilding rules, nothing is imported or called. The other container, the one that is written,
is a true npz: an uncompressed zip with a `.npy` member `module/name` for each array (`NFNet/~/stem_conv0/w.npy`); what
follows the last slash is the parameter, as parameter names have none.
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

from normfree.weights.haiku_pickle import (
    DTYPES,
    MAX_ARRAYS,
    MODULE,
    NAME,
    SLACK,
    PickledArrays,
    Refused,
    check_names,
    checked_shape,
)
from normfree.weights.names import HaikuTree

#: A zip directory is read at once; that of F6 takes 100 kB.
MAX_READ = 4 << 20


def read_haiku(path: str | Path) -> HaikuTree:
    """The parameter tree of a released file (a pickle) or of one that `write_haiku` wrote (an npz).

    Returns `{module: {name: array}}` as the file has it: kernels H W I O, linear weights I O, arrays writable. Takes
    memory for twice the file. Source: reference code, `utils.load_haiku_file`, whose files are dill pickles of Haiku
    FlatMappings.

    Raises:
        ValueError: the file is broken or holds anything but arrays of numbers in mappings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist. Give a released .npz file.")
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        tree = _read_npz(path) if is_zip else PickledArrays(path.read_bytes()).tree()
    except Refused as reason:
        raise ValueError(
            f"{path}: {reason}. Allowed: arrays of numbers in mappings. Fix: get the file from its publisher again."
        ) from None
    return tree


def write_haiku(path: str | Path, tree: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes a tree as a true npz, which `read_haiku` reads back exactly and `numpy.load` opens too.

    The file appears whole or not at all; equal trees give equal bytes.

    Raises:
        ValueError: a name or an array has no place in that layout.
    """
    path, members = Path(path), {}
    for module, arrays in tree.items():
        for name, array in arrays.items():
            if not MODULE.fullmatch(module) or not NAME.fullmatch(name):
                raise ValueError(
                    f"{module!r}, {name!r}: expected words with / between them, then one. Fix: 'NFNet/~/linear', 'w'."
                )
            if array.dtype.str[1:] not in DTYPES:
                raise ValueError(
                    f"{module}/{name} holds {array.dtype}. Allowed: {', '.join(sorted(DTYPES))}."
                )
            members[f"{module}/{name}"] = array
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **members)  # type: ignore[arg-type]  # names are arrays, none is `allow_pickle`
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- npz ---------------------------------------------------------------------------------------------


class _BoundedFile(io.FileIO):
    """A file that gives at most `MAX_READ` bytes at a time: a zip directory beyond that is refused before it is
    parsed."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = -1 if size is None else size
        data = super().read(MAX_READ + 1 if wanted < 0 else min(wanted, MAX_READ + 1)) or b""
        if len(data) > MAX_READ:
            raise Refused("its zip directory is larger than that of any released network")
        return data


def _read_npz(path: Path) -> HaikuTree:
    try:
        with _BoundedFile(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            announced = sum(m.file_size for m in members)
            if announced > 2 * path.stat().st_size + SLACK or len(members) > MAX_ARRAYS:
                raise Refused(f"it announces {len(members):,} members of {announced:,} bytes in all")
            tree: HaikuTree = {}
            for member in members:
                module, _, name = member.filename.removesuffix(".npy").rpartition("/")
                check_names(module, name)
                if name in tree.get(module, {}) or not member.filename.endswith(".npy"):
                    raise Refused(f"it has a second or foreign member {member.filename[:60]!a}")
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
        raise Refused(f"it is a broken npz ({str(error)[:100]!a})") from None
    except (RuntimeError, NotImplementedError):  # zipfile's words for encrypted and for newer zip features
        raise Refused("it is a zip of another kind than numpy writes") from None
    if not tree:
        raise Refused("it is empty")
    return tree


_HEADER = re.compile(
    rb"\{'descr': '([<>|=])(\w\d)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array. Its header is matched, not evaluated, and must announce exactly the bytes that follow."""
    what = ascii(member.filename[-60:])
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Refused(f"its member {what} is compressed in another way than numpy does")
    with archive.open(member) as stream:
        start = stream.read(8)
        # the format's version: up to 1.0 the header's length has two bytes, later four
        width, form = (2, "<H") if start[6:] == b"\1\0" else (4, "<I")
        if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\1\0", b"\2\0", b"\3\0"):
            raise Refused(f"its member {what} is no array")
        (length,) = struct.unpack(form, stream.read(width))
        match = _HEADER.fullmatch(stream.read(length) if length <= 10_000 else b"")  # numpy's own bound
        if match is None or match[2].decode() not in DTYPES:
            raise Refused(f"its member {what} is no array of numbers")
        dtype = np.dtype((match[1] + match[2]).decode())
        words = [w.strip() for w in match[4].decode().split(",")]
        shape = checked_shape(
            tuple(int(w) for w in words if w.isdecimal() and len(w) < 16), dtype.itemsize, member.file_size
        )
        if math.prod(shape) * dtype.itemsize != member.file_size - 8 - width - length:
            raise Refused(f"its member {what} announces {shape}, which is not what it holds")
        array = np.empty(math.prod(shape), dtype)
        view, at = array.view(np.uint8).data, 0
        while at < len(view):
            got = stream.read(min(1 << 20, len(view) - at))
            if not got:
                raise Refused(f"its member {what} ends early")
            view[at : at + len(got)] = got
            at += len(got)
        if stream.read(1):
            raise Refused(f"its member {what} is longer than it says")
    shaped = array.reshape(shape, order="F" if match[3] == b"True" else "C")
    return np.asarray(shaped, dtype.newbyteorder("="), order="C")
