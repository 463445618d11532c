"""Hostile files, by the reader that gets them. Nothing here does harm: code that ran would touch a file in `outside`.

Each payload is a function from a `Site` to nothing; it writes `site.target`.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HUGE = 40_000_000_000  # bytes of sparse files, which take no space


@dataclass(frozen=True)
class Site:
    """Where a payload is written.

    Attributes:
        target: the file that the reader is given, or a file of the folder that it is given.
        outside: a folder that no reader may touch; `secret` in it is a file that links and paths lead to.
    """

    target: Path
    outside: Path

    @property
    def command(self) -> str:
        """A shell command that makes a file."""
        return f"touch {self.outside / 'ran'}"

    @property
    def code(self) -> str:
        """An expression of Python that makes a file."""
        return f"__import__('os').system({self.command!r})"


Payload = Callable[[Site], object]


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


# --- pickles --------------------------------------------------------------------------------------------------

# Ways to run code by calling one function: module, name, arguments.
CALLS: dict[str, tuple[str, str, Callable[[Site], tuple[Any, ...]]]] = {
    "os.system": ("os", "system", lambda site: (site.command,)),
    "os.popen": ("os", "popen", lambda site: (site.command,)),
    "os.mkdir": ("os", "mkdir", lambda site: (str(site.outside / "ran"),)),
    "eval": ("builtins", "eval", lambda site: (site.code,)),
    "exec": ("builtins", "exec", lambda site: (site.code,)),
    "open": ("builtins", "open", lambda site: (str(site.outside / "secret"),)),
    "import": ("builtins", "__import__", lambda site: ("this",)),
    "getattr": ("builtins", "getattr", lambda site: ("x", "__class__")),
    "subprocess.Popen": ("subprocess", "Popen", lambda site: (["/bin/sh", "-c", site.command],)),
    "subprocess.getoutput": ("subprocess", "getoutput", lambda site: (site.command,)),
    "pty.spawn": ("pty", "spawn", lambda site: (["/bin/sh", "-c", site.command],)),
    "runpy": ("runpy", "run_path", lambda site: (str(site.outside / "secret"),)),
    "ctypes.CDLL": ("ctypes", "CDLL", lambda site: (str(site.outside / "secret"),)),
    "importlib": ("importlib", "import_module", lambda site: ("this",)),
    "code": ("code", "interact", lambda site: ()),
    "timeit": ("timeit", "timeit", lambda site: (site.code, "pass", time.perf_counter, 1)),
    "operator": ("operator", "methodcaller", lambda site: ("system", site.command)),
    "shutil.rmtree": ("shutil", "rmtree", lambda site: (str(site.outside),)),
    "torch.load": ("torch", "load", lambda site: (str(site.outside / "secret"),)),
    "numpy.load": ("numpy", "load", lambda site: (str(site.outside / "secret"),)),
    "numpy.fromfile": ("numpy", "fromfile", lambda site: (str(site.outside / "secret"),)),
    "numpy.memmap": ("numpy", "memmap", lambda site: (str(site.outside / "secret"),)),
    "webbrowser": ("webbrowser", "open", lambda site: ("http://127.0.0.1:9/",)),
    "socket": ("socket", "create_connection", lambda site: (("127.0.0.1", 9),)),
}  # fmt: skip


def pickled(name: str, protocol: int, site: Site) -> bytes:
    """Return a pickle that makes a call."""
    module, function, arguments = CALLS[name]
    found = getattr(importlib.import_module(module), function)
    return pickle.dumps({"state_dict": Call(found, *arguments(site))}, protocol)


def raw_pickle(name: str, protocol: int) -> Payload:
    """Return a payload: the pickle alone."""
    return lambda site: site.target.write_bytes(pickled(name, protocol, site))


def torch_zip(name: str, protocol: int) -> Payload:
    """Return a payload: a file of torch.save with that pickle."""

    def write(site: Site) -> None:
        with zipfile.ZipFile(site.target, "w") as archive:
            archive.writestr("archive/data.pkl", pickled(name, protocol, site))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")

    return write


def object_array(name: str) -> Payload:
    """Return a payload: an npz with an array of objects."""

    def write(site: Site) -> None:
        module, function, arguments = CALLS[name]
        found = getattr(importlib.import_module(module), function)
        array = np.array([Call(found, *arguments(site))], dtype=object)
        with site.target.open("wb") as file:
            np.savez(file, **{"NFNet/~/linear/w": array})  # type: ignore[arg-type]

    return write


# --- any file ---------------------------------------------------------------------------------------------------


def written(data: bytes) -> Payload:
    """Return a payload of fixed content."""
    return lambda site: site.target.write_bytes(data)


def link(target: str) -> Payload:
    """Return a payload: a symbolic link; {} is the folder outside."""
    return lambda site: site.target.symlink_to(target.format(site.outside))


def sparse(start: bytes = b"") -> Payload:
    """Return a payload: a file of 40 GB that takes no space."""

    def write(site: Site) -> None:
        site.target.write_bytes(start)
        os.truncate(site.target, HUGE)

    return write


ANY: dict[str, Payload] = {
    "empty": written(b""),
    "zero bytes": written(bytes(100)),
    "not UTF-8": written(b"\xff\xfe\x80"),
    "pipe": lambda site: os.mkfifo(site.target),
    "folder": lambda site: site.target.mkdir(),
    "link to itself": lambda site: site.target.symlink_to(site.target.name),
    "link to a device": link("/dev/zero"),
    "sparse, 40 GB": sparse(),
}

# --- text formats -----------------------------------------------------------------------------------------------

JSON: dict[str, Payload] = ANY | {
    "deep objects": written(b'{"a":' * 200_000),
    "deep lists": written(b"[" * 500_000),
    "a list": written(b"[1, 2]"),
    "a number": written(b"7"),
    "null": written(b"null"),
    "many digits": written(b'{"a": ' + b"9" * 100_000 + b"}"),
    "NaN": written(b'{"a": NaN, "files": Infinity}'),
    "cut": written(b'{"a": "b'),
    "duplicate keys": written(b'{"files": {}, "files": 1}'),
    "escape code": written(b'{"\\u001b[31m": "\\ud800"}'),
    "wrong types": written(
        b'{"files": 3, "step": "x", "architecture": [], "num_classes": {}, "pretrained_cfg": 1}'
    ),
    "large": written(b'{"a": "' + b"x" * 30_000_000 + b'"}'),
}
TOML: dict[str, Payload] = ANY | {
    "deep keys": written(b"a" + b".a" * 60_000 + b"=1"),
    "deep tables": written(b"[a" + b".a" * 60_000 + b"]"),
    "deep lists": written(b"a=" + b"[" * 100_000),
    "a million deep": written(b"a" + b".a" * 1_000_000 + b"=1"),
    "many digits": written(b"seed = " + b"9" * 100_000),
    "many workers": written(b"[input]\nworkers = 100000\n"),
    "huge batch": written(b"[input]\nbatch_size = 1000000000\n"),
    "huge image": written(b"[input]\nimage_size = '900000000x900000000'\n"),
    "endless length": written(b"length = '" + b"9" * 400 + b"ep'\n"),
    "code": written(b"objective = '__import__(\"os\")'\n"),
    "unknown key": written(b"[optim]\n__class__ = 1\n"),
    "not a number": written(b"[optim]\nlr = nan\n"),
    "dates": written(b"seed = 1979-05-27T07:32:00Z\n"),
}
CSV: dict[str, Payload] = {
    name: payload for name, payload in ANY.items() if name != "zero bytes"
} | {
    "one cell of 10 MB": written(b"image,label\n" + b"x" * 10_000_000 + b".png,a\n"),
    "quotes": written(b'image,label\n"' * 1000),
    "zero bytes in cells": written(b"image,label\na\0.png,b\n"),
    "missing cells": written(b"image,label\na.png\n"),
    "escape code": written(b"image,label\n\x1b[31m.png,a\nb.png,b\n"),
    "path of a device": written(b"image,label\n/dev/zero.png,a\nb.png,b\n"),
}  # fmt: skip

# --- safetensors ------------------------------------------------------------------------------------------------


def safetensors(header: bytes, data: bytes = b"", *, length: int | None = None) -> Payload:
    """Return a payload: a header, with any stated length, and data."""
    return written(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(name: str, dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> bytes:
    """Return a header of one tensor."""
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
TENSORS: dict[str, Payload] = ANY | {
    "header of 4 EB": safetensors(b"{}", length=1 << 62),
    "header of 90 MB": safetensors(b"{" * 100, length=90_000_000),
    "deep header": safetensors(b'{"a":' * 1_000_000),
    "header is a list": safetensors(b"[]"),
    "header is no JSON": safetensors(b"{'a': 1}"),
    "header is cut": safetensors(b'{"a": {"dtype": "F32"', length=4000),
    "negative shape": safetensors(entry("w", shape=[-2]), bytes(8)),
    "huge shape": safetensors(entry("w", shape=[1 << 62, 1 << 62]), bytes(8)),
    "huge shape of nothing": safetensors(entry("w", shape=[0, 1 << 62], offsets=[0, 0])),
    "offsets outside": safetensors(entry("w", offsets=[0, 1 << 60]), bytes(8)),
    "offsets backward": safetensors(entry("w", offsets=[8, 0]), bytes(8)),
    "overlap": safetensors(json.dumps({name: TWO for name in "ab"}).encode(), bytes(8)),
    "unknown type": safetensors(entry("w", dtype="X99"), bytes(8)),
    "wrong size": safetensors(entry("w", shape=[3]), bytes(8)),
    "bytes after the end": safetensors(entry("w"), bytes(8000)),
    "metadata is no object": safetensors(b'{"__metadata__": 3}'),
    "name with escape code": safetensors(entry("\x1b[31m\n")),
    "many tensors": safetensors(json.dumps({str(i): NOTHING for i in range(200_000)}).encode()),
    "pickle": raw_pickle("os.system", 2),
    "a valid file of another network": safetensors(entry("w"), bytes(8)),
    "not finite": safetensors(entry("head.bias"), struct.pack("<ff", float("nan"), float("inf"))),
}  # fmt: skip

# --- archives ---------------------------------------------------------------------------------------------------


def tape(*members: tuple[str, bytes | None, dict[str, Any]]) -> Payload:
    """Return a payload: a tar of members (name, content or None, fields of TarInfo); {} is the folder outside."""

    def write(site: Site) -> None:
        with tarfile.open(site.target, "w", format=tarfile.PAX_FORMAT) as archive:
            for name, content, fields in members:
                about = tarfile.TarInfo(name.format(site.outside))
                about.size = len(content or b"")
                for key, value in fields.items():
                    setattr(about, key, value.format(site.outside) if isinstance(value, str) else value)
                archive.addfile(about, None if content is None else io.BytesIO(content))

    return write


@functools.cache
def dot() -> bytes:
    """Return a valid image."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(out, "PNG")
    return out.getvalue()


def damaged_tape(change: Callable[[bytes], bytes]) -> Payload:
    """Return a payload: a valid tar, changed."""

    def write(site: Site) -> None:
        tape(("a.png", dot(), {}), ("a.cls", b"0", {}))(site)
        site.target.write_bytes(change(site.target.read_bytes()))

    return write


LABEL = ("a.cls", b"0", {})
TAR: dict[str, Payload] = ANY | {
    "symbolic link": tape(("a.png", None, {"type": tarfile.SYMTYPE, "linkname": "{}/secret"}), LABEL),
    "hard link": tape(("a.png", None, {"type": tarfile.LNKTYPE, "linkname": "{}/secret"}), LABEL),
    "device": tape(("a.png", None, {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}), LABEL),
    "pipe as a member": tape(("a.png", None, {"type": tarfile.FIFOTYPE}), LABEL),
    "label without an image": tape(("../../a.cls", b"0", {})),
    "two images": tape(("a.png", b"1", {}), ("a.jpg", b"2", {}), LABEL),
    "label of many digits": tape(("a.png", b"1", {}), ("a.cls", b"9" * 5000, {})),
    "negative label": tape(("a.png", b"1", {}), ("a.cls", b"-1", {})),
    "huge label": tape(("a.png", b"1", {}), ("a.cls", b"0" * 2_000_000, {})),
    "deep label": tape(("a.png", b"1", {}), ("a.json", b'{"label":' * 100_000, {})),
    "label is code": tape(("a.png", b"1", {}), ("a.cls", b"__import__('os')", {})),
    "pickled label": tape(("a.png", b"1", {}), ("a.json", pickle.dumps({"label": 0}), {})),
    "huge header": tape(("a.png", b"1", {"pax_headers": {"comment": "x" * 5_000_000}}), LABEL),
    "size that lies": damaged_tape(lambda data: data[:124] + b"77777777777\0" + data[136:]),
    "negative size": damaged_tape(lambda data: data[:124] + b"\xff" * 12 + data[136:]),
    "wrong checksum": damaged_tape(lambda data: data[:10] + b"x" + data[11:]),
    "cut": damaged_tape(lambda data: data[:700]),
    "goes on": damaged_tape(lambda data: data + data),
    "gzip": damaged_tape(lambda data: b"\x1f\x8b" + data),
    "no images": tape(("a.txt", b"1", {})),
    "image of 40 GB": lambda site: _sparse_tape(site),
}


def _sparse_tape(site: Site) -> None:
    """Write a tar whose only image has 40 GB."""
    about = tarfile.TarInfo("a.png")
    about.size = HUGE
    label = tarfile.TarInfo("a.cls")
    label.size = 1
    with site.target.open("wb") as file:
        file.write(about.tobuf(tarfile.GNU_FORMAT))
        file.seek(HUGE, 1)
        file.write(label.tobuf(tarfile.GNU_FORMAT) + b"0" + bytes(511) + bytes(1024))


def npz(*members: tuple[str, bytes], kind: int = zipfile.ZIP_STORED) -> Payload:
    """Return a payload: a zip of members."""

    def write(site: Site) -> None:
        with zipfile.ZipFile(site.target, "w", kind) as archive:
            for name, content in members:
                archive.writestr(name, content)

    return write


def npy(descr: str, shape: str, data: bytes = bytes(8)) -> bytes:
    """Return an array in the format of NumPy, with any header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


NPZ: dict[str, Payload] = ANY | {
    "path outside": npz(("../../outside/ran.npy", npy("'<f4'", "(2,)"))),
    "absolute path": npz(("/tmp/ran.npy", npy("'<f4'", "(2,)"))),
    "objects": npz(("a/w.npy", npy("'|O'", "(2,)"))),
    "huge shape": npz(("a/w.npy", npy("'<f4'", "(4000000000, 4000000000)"))),
    "negative shape": npz(("a/w.npy", npy("'<f4'", "(-2,)"))),
    "code in the header": npz(("a/w.npy", npy("__import__('os').system('x')", "(2,)"))),
    "bomb": npz(("a/w.npy", npy("'<f4'", "(50000000,)", bytes(200_000_000))), kind=zipfile.ZIP_DEFLATED),
    "another compression": npz(("a/w.npy", npy("'<f4'", "(2,)")), kind=zipfile.ZIP_BZIP2),
    "many members": npz(*((f"a/{i}.npy", b"") for i in range(30_000))),
    "not an array": npz(("a/w.npy", b"\x80\x04N.")),
    **{f"array of objects, {name}": object_array(name) for name in ("os.system", "eval", "subprocess.Popen")},
    **{f"pickle, {name}": raw_pickle(name, 4) for name in CALLS},
    **{f"pickle of protocol {p}": raw_pickle("os.system", p) for p in range(6)},
}  # fmt: skip
TORCH: dict[str, Payload] = ANY | {
    **{f"{name}": torch_zip(name, 2) for name in CALLS},
    **{f"protocol {p}": torch_zip("os.system", p) for p in range(6)},
    **{f"older format, {name}": raw_pickle(name, 2) for name in ("os.system", "eval", "getattr", "torch.load")},
    **{f"older format, protocol {p}": raw_pickle("os.system", p) for p in range(6)},
    "path outside": npz(("../../outside/ran", b"1"), ("archive/data.pkl", b"\x80\x02}.")),
    "compressed": npz(("archive/data.pkl", b"\x80\x02}."), kind=zipfile.ZIP_DEFLATED),
    "large pickle": npz(("archive/data.pkl", bytes(9_000_000))),
    "endless pickle": written(b"\x80\x02" + b"(" * 3_000_000),
    "deep pickle": written(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "safetensors": safetensors(entry("w"), bytes(8)),
}  # fmt: skip
