# ruff: noqa: E501  # payloads are easier to compare on one line each
"""Tests with malicious and damaged weight files: each is refused with a one-line error, and none runs code."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from normfree.pretrained import from_pretrained
from normfree.weights.haiku import read_haiku, write_haiku
from normfree.weights.haiku_pickle import MAX_INSTRUCTIONS
from normfree.weights.load import read_weights

# --- the files ---------------------------------------------------------------------------------------


class Call:
    """An object whose pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def string(text: str) -> bytes:
    """Return the instruction that pushes a short string."""
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    """Return the instructions that push an object by its module and name."""
    return string(module) + string(name) + b"\x93"


F4 = (
    named("numpy", "dtype")
    + string("f4")
    + b"\x89\x88\x87R(K\x03"
    + string("<")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
BLANK = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"


def leaf(value: bytes) -> bytes:
    """Return a pickle of a tree with one module `a` and one entry `w`, built by the instructions `value`."""
    return b"\x80\x04}" + string("a") + b"}" + string("w") + value + b"ss."


def array(
    shape: bytes = b"K\x02\x85", dtype: bytes = F4, raw: bytes = b"C\x08" + bytes(8), blank: bytes = BLANK
) -> bytes:
    """Return the instructions that build an array."""
    return blank + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


def laughs(depth: int) -> bytes:
    """Return instructions for nested tuples in which each level has the one below twice: 2 ** depth leaves."""
    return b")" + b"".join(
        b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86" for i in range(depth)
    )


def pickles(sentinel: Path) -> dict[str, bytes]:
    """Return pickles by what they try. Those that run code create the file `sentinel`."""
    import builtins
    import importlib
    import operator

    touch = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w').close()"
    objects = np.empty(1, object)
    objects[0] = Call(os.system, touch)
    calls = {
        "os.system": Call(os.system, touch),
        "subprocess": Call(subprocess.Popen, ["touch", str(sentinel)]),
        "eval": Call(builtins.eval, code),
        "exec": Call(builtins.exec, code),
        "getattr": Call(builtins.getattr, Call(importlib.import_module, "os"), "system"),
        "importlib": Call(importlib.import_module, "antigravity"),
        "attrgetter": Call(operator.attrgetter, "system"),
        "open": Call(io.open, str(sentinel), "w"),
        "nested pickle": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "numpy.load": Call(np.load, str(sentinel) + ".npy", None, True),
        "numpy fromfile": Call(np.fromfile, "/etc/passwd", "u1"),
        "torch.load": Call(torch.load, str(sentinel)),
        "torch rebuild": torch.zeros(3),
        "bytearray": Call(bytearray, 1 << 40),
        "object array": objects,
        "record dtype": np.zeros(3, [("a", "f4"), ("b", "O")]),
        "dates": np.zeros(3, "M8[s]"),
        "text array": np.array(["abc"]),
        "complex": np.zeros(3, np.complex64),
        "subclass": np.zeros(2, np.float32).view(np.recarray),
        "list": [1.0, 2.0],
        "dtype with metadata": np.zeros(3, np.dtype("f4", metadata={"a": 1})),
    }  # fmt: skip
    files = {name: pickle.dumps({"a": {"w": value}}, 4) for name, value in calls.items()}
    files |= {f"os.system, protocol {p}": pickle.dumps({"a": {"w": calls["os.system"]}}, p) for p in range(6)}
    files |= {f"object array, protocol {p}": pickle.dumps({"a": {"w": objects}}, p) for p in (0, 2, 5)}
    big = 1 << 40
    return files | {
        "dotted name": leaf(named("numpy", "ndarray.tofile") + b")R"),
        "module of an allowed name": leaf(named("os", "_reconstruct") + b")R"),
        "encode with another codec": leaf(array(raw=named("_codecs", "encode") + string("abc") + string("rot13") + b"\x86R")),
        "encode as an array": leaf(named("_codecs", "encode") + string("abc") + string("latin1") + b"\x86R"),
        "encode beyond latin": leaf(array(raw=named("_codecs", "encode") + b"\x8c\x02\xd0\xb0" + string("latin1") + b"\x86R")),
        "ndarray itself": leaf(named("numpy", "ndarray") + b"J\xff\xff\xff\x7f\x85\x85R"),
        "ndarray by NEWOBJ": leaf(named("numpy", "ndarray") + b"K\x02\x85\x85\x81"),
        "NEWOBJ_EX": leaf(named("numpy", "ndarray") + b")}\x92"),
        "reconstruct of a subclass": leaf(named("numpy._core.multiarray", "_reconstruct") + named("numpy", "dtype") + b"K\x00\x85C\x01b\x87R"),
        "reconstruct with a shape": leaf(BLANK.replace(b"K\x00\x85", b"J\xff\xff\xff\x7f\x85")),
        "array without a state": leaf(BLANK),
        "state given twice": leaf(array() + b"(K\x01K\x02\x85" + F4 + b"\x89C\x08" + bytes(8) + b"tb"),
        "state as attributes": leaf(BLANK + b"}" + string("dtype") + string("O") + b"sb"),
        "state of a mapping": leaf(named("collections", "OrderedDict") + b")R}" + string("a") + b"Nsb"),
        "state of a function": leaf(named("_codecs", "encode") + b"}b"),
        "dtype O": leaf(array(dtype=named("numpy", "dtype") + string("O") + b"\x89\x88\x87R")),
        "dtype with fields": leaf(array(dtype=named("numpy", "dtype") + string("f4,O") + b"\x89\x88\x87R")),
        "dtype of 2 GB items": leaf(array(dtype=named("numpy", "dtype") + string("V2147483647") + b"\x89\x88\x87R")),
        "dtype with itemsize": leaf(array(dtype=F4.replace(b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", 1))),
        "EXT1": leaf(b"\x82\x01"), "EXT2": leaf(b"\x83\x01\x00"), "EXT4": leaf(b"\x84\x01\x00\x00\x00"),
        "PERSID": leaf(b"Pabc\n"), "BINPERSID": leaf(string("abc") + b"Q"),
        "INST": leaf(b"(" + string(touch) + b"ios\nsystem\n"), "OBJ": leaf(b"(cos\nsystem\n" + string(touch) + b"o"),
        "STRING": leaf(b"S'abc'\n"), "BINFLOAT": leaf(b"G" + bytes(8)), "NEXT_BUFFER": leaf(b"\x97"),
        "POP": leaf(b"N0"), "LONG4": leaf(array(shape=b"\x8b\xff\xff\xff\x7f\x85")), "long number": leaf(b"I" + b"9" * 150 + b"\n"),
        "laughs as a value": leaf(laughs(200)), "laughs as a shape": leaf(array(shape=laughs(200))),
        "laughs as a key": b"\x80\x04}" + laughs(200) + b"Ns.", "laughs as arguments": leaf(named("numpy", "dtype") + laughs(200) + b"R"),
        "laughs as a whole": b"\x80\x04" + laughs(2000) + b".",
        "one array a hundred thousand times": b"\x80\x04" + array(b"M\x00\x10\x85", raw=b"B\x00\x40\x00\x00" + bytes(16384)).join([b"}" + string("a") + b"}(" + string("w"), b"\x94"])
        + b"".join(string(f"w{i}") + b"h\x00" for i in range(100_000)) + b"us.",
        "modules that share": b"\x80\x04}(" + string("m") + b"}(" + string("w") + array() + b"\x94" + b"".join(string(f"w{i}") + b"h\x00" for i in range(2000)) + b"u\x94"
        + b"".join(string(f"m{i}") + b"h\x01" for i in range(2000)) + b"u.",
        "mapping in itself": b"\x80\x04}\x94" + string("a") + b"h\x00s.", "mapping in itself, deeper": b"\x80\x04}" + string("a") + b"}\x94" + string("w") + b"h\x00ss.",
        "deep tuples": leaf(b")" + b"\x85" * 200_000), "deep mappings": b"\x80\x04" + (b"}" + string("a")) * 90_000 + b"N" + b"s" * 90_000 + b".",
        "many instructions": b"\x80\x04" + b"N\x85" * MAX_INSTRUCTIONS, "many marks": b"\x80\x04" + b"(" * (MAX_INSTRUCTIONS + 9),
        "huge shape": leaf(array(shape=b"\x86".join([b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f", b""]))), "huge count": leaf(array(shape=b"J\xff\xff\xff\x7f\x85")),
        "negative shape": leaf(array(shape=b"J\xff\xff\xff\xff\x85")), "no shape": leaf(array(shape=b"N")), "bool shape": leaf(array(shape=b"\x88K\x02\x86")),
        "empty shape": leaf(array(shape=b"K\x00\x85", raw=b"C\x00")), "nine dimensions": leaf(array(shape=b"(" + b"K\x01" * 8 + b"K\x02t")),
        "too few bytes": leaf(array(raw=b"C\x07" + bytes(7))), "too many bytes": leaf(array(raw=b"C\x09" + bytes(9))),
        "announced bytes": leaf(array(raw=b"\x8e" + struct.pack("<Q", big) + bytes(8))), "announced text": leaf(b"\x8d" + struct.pack("<Q", big)),
        "memo far away": leaf(b"Nr\xff\xff\xff\xff"), "memo that is not there": leaf(b"h\x07"), "mark as a value": b"\x80\x04(\x94.",
        "wrong axes": leaf(named("numpy._core.numeric", "_frombuffer") + b"(C\x08" + bytes(8) + F4 + b"K\x01K\x02\x86" + string("K") + b"K\x00K\x05\x86tR"),
        "name that climbs": b"\x80\x04}" + string("../../a") + b"}" + string("w") + array() + b"ss.", "name with a line": b"\x80\x04}" + string("a\nb\x1b[31m") + b"}" + string("w") + array() + b"ss.",
        "name with slashes": leaf(array()).replace(string("w"), string("w/../w")), "number as a name": b"\x80\x04}" + string("a") + b"}K\x01" + array() + b"ss.",
        "one name twice": b"\x80\x04}" + string("a") + b"}" + string("w") + array() + b"s" + string("w") + array() + b"ss.",
        "empty mapping": b"\x80\x04}.", "module without arrays": b"\x80\x04}" + string("a") + b"}s.", "no mapping": b"\x80\x04N.", "one level": b"\x80\x04}" + string("a") + array() + b"s.",
        "trailing bytes": leaf(array()) + b"x", "left on the stack": leaf(array()).replace(b"\x80\x04", b"\x80\x04N"), "cut in two": leaf(array())[:90], "without its end": leaf(array())[:-1],
        "protocol 9": b"\x80\x09}.", "text": b"hello, world\n", "html": b"<!DOCTYPE html><html></html>", "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"", "zeros": bytes(1000), "one byte": b"\x80",
    }  # fmt: skip


def npy(header: str, body: bytes = bytes(8), magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode() + b"\n"
    return magic + struct.pack("<H", len(text)) + text + body


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return out.getvalue()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def archives(sentinel: Path) -> dict[str, bytes]:
    """Return npz files by what they try. Those that run code create the file `sentinel`."""
    out = io.BytesIO()
    np.savez(out, **{"a/w": np.array([Call(os.system, f"touch {sentinel}")], object)})
    valid = zipped([("a/w.npy", npy(GOOD))])
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped([("a/w.npy", npy(GOOD)), ("a/w.npy", npy(GOOD))])
    encrypted = bytearray(valid)
    encrypted[6] |= 1
    encrypted[valid.index(b"PK\x01\x02") + 8] |= 1
    lying = bytearray(valid)  # the directory says that the member is 1 GB
    struct.pack_into("<I", lying, valid.index(b"PK\x01\x02") + 24, 1 << 30)
    return {
        "zip: object array": out.getvalue(),
        "zip: climbing name": zipped([("../../etc/w.npy", npy(GOOD))]),
        "zip: absolute name": zipped([("/etc/w.npy", npy(GOOD))]),
        "zip: windows name": zipped([("C:\\a\\w.npy", npy(GOOD))]),
        "zip: no array": zipped([("a/w.npy", b"\x80\x04N.")]),
        "zip: other member": zipped([("a/w.txt", npy(GOOD))]),
        "zip: bomb": zipped([("a/w.npy", npy(GOOD.replace("2,", "16000000,"), bytes(64_000_000)))], zipfile.ZIP_DEFLATED),
        "zip: bomb in parts": zipped([(f"a/w{i}.npy", npy(GOOD.replace("2,", "500000,"), bytes(2_000_000))) for i in range(20)], zipfile.ZIP_DEFLATED),
        "zip: lzma": zipped([("a/w.npy", npy(GOOD))], zipfile.ZIP_LZMA),
        "zip: huge shape": zipped([("a/w.npy", npy(GOOD.replace("2,", "99999999999, 99999999999")))]),
        "zip: endless shape": zipped([("a/w.npy", npy(GOOD.replace("2,", "9" * 5000)))]),
        "zip: negative shape": zipped([("a/w.npy", npy(GOOD.replace("2,", "-1,")))]),
        "zip: short": zipped([("a/w.npy", npy(GOOD, bytes(7)))]),
        "zip: long": zipped([("a/w.npy", npy(GOOD, bytes(9)))]),
        "zip: code in the header": zipped([("a/w.npy", npy(f"open({str(sentinel)!r}, 'w')"))]),
        "zip: code in the shape": zipped([("a/w.npy", npy(GOOD.replace("2,", f"open({str(sentinel)!r}, 'w'),")))]),
        "zip: deep header": zipped([("a/w.npy", npy("(" * 9000))]),
        "zip: objects": zipped([("a/w.npy", npy(GOOD.replace("<f4", "|O8")))]),
        "zip: records": zipped([("a/w.npy", npy(GOOD.replace("'<f4'", "[('a', '<f4')]")))]),
        "zip: long header": zipped([("a/w.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{")]),
        "zip: later format": zipped([("a/w.npy", npy(GOOD, magic=b"\x93NUMPY\x09\x00"))]),
        "zip: twice": twice,
        "zip: encrypted": bytes(encrypted),
        "zip: lying size": bytes(lying),
        "zip: flipped bit": valid.replace(bytes(8), b"\x01" + bytes(7), 1),
        "zip: cut": valid[:-30],
        "zip: no end": valid[:60],
        "zip: empty": zipped([]),
        "zip: large directory": zipped([(f"a/{'x' * 60}{i}.npy", b"") for i in range(45_000)]),
        "zip: only the letters": b"PK",
    }  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The path of the file that no payload may create, and all payloads by name."""
    sentinel = tmp_path_factory.mktemp("hostile") / "ran"
    return sentinel, {**pickles(sentinel), **archives(sentinel)}


def test_every_hostile_file_is_refused_with_one_line_and_does_nothing(
    hostile: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    sentinel, files = hostile
    assert len(files) >= 100
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        traced = len(data) < 20_000  # tracing is slow; the long files have a test of their own below
        if traced:
            tracemalloc.start()
        with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
            read_haiku(path)
        if traced:
            assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + (6 << 20), name
            tracemalloc.stop()
        text = str(error.value)
        assert type(error.value) is ValueError, name
        assert text.startswith(f"{path}: it"), (name, text)
        assert text.endswith(
            "Allowed: arrays of numbers in mappings. Fix: get the file from its publisher again."
        )
        assert text.isprintable(), (name, text)
        assert len(text) < 400 + len(str(path)), (name, text)
        assert not sentinel.exists(), name
        path.unlink()


def test_the_payloads_run_when_they_are_unpickled(hostile):
    """Without this, the test above could pass because the payloads are broken."""
    sentinel, files = hostile
    for name in ("os.system", "eval", "exec", "nested pickle", "object array", "os.system, protocol 0"):
        pickle.loads(files[name])
        assert sentinel.exists(), name
        sentinel.unlink()
    assert pickle.loads(leaf(array()))["a"]["w"].tolist() == [
        0,
        0,
    ]  # the instructions for arrays are valid too


@pytest.mark.parametrize(("name", "reason"), [
    ("os.system", "it asks for 'posix.system'"),
    ("dotted name", "it asks for 'numpy.ndarray.tofile'"),
    ("EXT1", "it uses the pickle instruction EXT1"),
    ("INST", "it uses the pickle instruction INST"),
    ("object array", "it calls the rule 'dtype' with wrong arguments"),
    ("laughs as a key", "it has a mapping with a key that is not text or is a duplicate"),
    ("huge count", "it announces an array larger than the file"),
    ("one array a hundred thousand times", "its arrays are larger than the file"),
    ("many marks", "it has more than 500,000 instructions"),
    ("text", "it is not a pickle"),
    ("empty", "it is empty"),
    ("cut in two", "it ends early"),
])  # fmt: skip
def test_the_error_has_the_reason(hostile, tmp_path, name, reason):
    path = tmp_path / "bad.npz"
    path.write_bytes(hostile[1][name])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_haiku(path)
    assert str(error.value) == (
        f"{path}: {reason}. Allowed: arrays of numbers in mappings. Fix: get the file from its publisher again."
    )


@pytest.mark.parametrize(
    "name",
    [
        "one array a hundred thousand times",
        "modules that share",
        "deep tuples",
        "many marks",
        "zip: bomb",
        "zip: large directory",
    ],
)
def test_bombs_take_little_memory(hostile, tmp_path, name):
    path = tmp_path / "bad.npz"
    path.write_bytes(hostile[1][name])
    tracemalloc.start()
    with pytest.raises(ValueError, match="Allowed: arrays of numbers"):
        read_haiku(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + 100e6


@pytest.mark.parametrize("kind", ["pickle 0", "pickle 4", "npz"])
def test_damaged_files_are_read_or_refused_but_cause_no_other_error(tmp_path, small_tree, kind):
    path, draw = tmp_path / "a.npz", random.Random(0)
    if kind == "npz":
        write_haiku(path, small_tree)
    else:
        path.write_bytes(pickle.dumps(small_tree, int(kind[-1])))
    valid, refused = path.read_bytes(), 0
    for _ in range(400):
        data = bytearray(valid)
        for _ in range(draw.choice((1, 1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        reason = ""
        try:
            tree = read_haiku(path)
            assert sum(a.nbytes for arrays in tree.values() for a in arrays.values()) < 2 * len(valid)
        except ValueError as error:
            reason = str(error)
        assert "\n" not in reason
        refused += bool(reason)
    assert refused > 100


def test_pickles_and_large_headers_are_not_read(tmp_path):
    for suffix in ("pth", "pt", "bin", "ckpt", "pkl"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}")))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_weights(path)
        assert str(error.value) == (
            f"{path} is a pickle, which may run code. Allowed: .safetensors, .npz or a model folder. "
            f"Fix: convert it first with normfree convert {path} FOLDER."
        )
    bomb = tmp_path / "a.safetensors"
    for header in (1 << 62, 9 << 20, 90_000_000):
        bomb.write_bytes(struct.pack("<Q", header) + b"{" * 100)
        with pytest.raises(
            ValueError, match=rf"is not a readable safetensors file: a header of {header:,} bytes\."
        ):
            read_weights(bomb)
    bomb.write_bytes(struct.pack("<Q", 8 << 20) + b'{"a":' * ((8 << 20) // 5))
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        read_weights(bomb)
    with pytest.raises(ValueError, match=r"does not exist\. Fix: give a released \.npz file\."):
        read_haiku(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("config", [
    {"architecture": "__import__('os').system('x')"},
    {"architecture": "../../nfnet_f0"},
    {"architecture": {"_target_": "os.system"}},
    {"architecture": "nfnet_l0", "model_args": {"norm_layer": "os.system"}},
    {"architecture": "nfnet_l0", "model_args": "os.system"},
    {"normfree": {"row": "nfnet_f0", "in_channels": 3, "model_args": {"__class__": "x"}, "preprocessing": {}}},
    {"normfree": {"row": "nfnet_f0", "in_channels": 3, "model_args": {}, "preprocessing": {"__init__": 1}}},
    {"architecture": "nfnet_l0", "auto_map": {"AutoModel": "code.py"}, "pretrained_cfg": {"crop_mode": "eval"}},
])  # fmt: skip
def test_a_config_with_code_in_it_is_refused_with_one_line(tmp_path, config):
    whole = {"architecture": "nfnet_l0", "num_classes": 3, "pretrained_cfg": {}, **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
