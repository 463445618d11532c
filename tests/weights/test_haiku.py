# ruff: noqa: E501  # payloads, one beside the other
"""Released weight files: read exactly, written back exactly; anything else in them is refused and does nothing."""

import io
import json
import os
import pickle
import random
import struct
import subprocess
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from normfree.models.zoo import create_model
from normfree.pretrained import from_pretrained
from normfree.weights.haiku import read_haiku, write_haiku
from normfree.weights.haiku_pickle import MAX_INSTRUCTIONS
from normfree.weights.load import load_weights, read_weights
from normfree.weights.names import haiku_from_state_dict

REFERENCE = Path(__file__).parent.parent / "reference"
TINY = {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8, "num_classes": 10}


def small_tree() -> dict:
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal((3, 3, 2, 40), dtype=np.float32)
    return {
        "NFNet/~/stem_conv0": {"w": kernel, "gain": np.ones(40, np.float32), "bias": np.zeros(40, ">f8")},
        "NFNet/~/nf_block_3": {
            "skip_gain": np.array(0.25, np.float32),
            "count": np.array([[1, -2]], np.int16),
        },
        "NFNet/~/linear": {
            "w": np.asfortranarray(draw.standard_normal((7, 5))),
            "b": kernel.transpose(3, 0, 2, 1),
        },
    }


def assert_same(got: dict, expected: dict) -> None:
    assert [(m, list(a)) for m, a in got.items()] == [(m, list(a)) for m, a in expected.items()]
    for module, arrays in expected.items():
        for name, array in arrays.items():
            ours = got[module][name]
            assert ours.shape == np.shape(array), (module, name)
            assert ours.dtype == np.asarray(array).dtype.newbyteorder("="), (module, name)
            assert np.array_equal(ours, array), (module, name)
            assert ours.flags.writeable


# --- what honest files hold --------------------------------------------------------------------------


def test_the_released_container_gives_the_reference_logits():
    data = np.load(REFERENCE / "nfnet_tiny.npz")
    net = create_model("nfnet_f0", **TINY).eval()
    load_weights(net, REFERENCE / "tiny_haiku.npz")
    with torch.no_grad():
        logits = net(torch.from_numpy(np.ascontiguousarray(data["input"].transpose(0, 3, 1, 2)))).numpy()
    assert np.linalg.norm(logits - data["logits"]) / np.linalg.norm(data["logits"]) < 1e-6
    tree = read_haiku(REFERENCE / "tiny_haiku.npz")
    expected = {k[6:]: data[k] for k in data if k.startswith("param|")}
    assert {f"{m}|{n}" for m, arrays in tree.items() for n in arrays} == expected.keys()
    assert all(
        np.array_equal(a, expected[f"{m}|{n}"]) for m, arrays in tree.items() for n, a in arrays.items()
    )


def test_written_files_read_back_exactly_and_open_in_numpy(tmp_path):
    for name, tree in (("tiny", read_haiku(REFERENCE / "tiny_haiku.npz")), ("small", small_tree())):
        path = tmp_path / f"{name}.npz"
        write_haiku(path, tree)
        assert_same(read_haiku(path), tree)
        with np.load(path, allow_pickle=False) as data:
            assert sorted(data) == sorted(f"{m}/{n}" for m, arrays in tree.items() for n in arrays)
        first = path.read_bytes()
        write_haiku(path, tree)
        assert path.read_bytes() == first
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.npz", "small.npz"}


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_reads_back(tmp_path, protocol):
    tree = small_tree()
    tree["NFNet/~/nf_block_3"]["scalar"] = np.float32(1.5)
    ordered = OrderedDict((m, OrderedDict(a)) for m, a in tree.items())
    for i, kind in enumerate((tree, ordered)):
        (tmp_path / f"{i}.npz").write_bytes(pickle.dumps(kind, protocol))
        assert_same(read_haiku(tmp_path / f"{i}.npz"), tree)


@pytest.mark.parametrize("words", [
    (b"numpy.core.multiarray", b"haiku._src.data_structures", b"frozendict", b"jax._src.array", b"_reconstruct_array"),
    (b"numpy._core.multiarray", b"haiku.data_structures", b"FlatMap", b"jax._src.device_array", b"reconstruct_device_array"),
    (b"numpy.core.multiarray", b"haiku._src.data_structures", b"FlatMapping", b"dill.dill", b"_create_array"),
])  # fmt: skip
def test_spellings_of_other_versions(tmp_path, words):
    """Written by hand, as those versions write them: array and mapping names, and a remark after the state."""
    numpy_, haiku, mapping, module, rebuild = words
    array = b"c%b\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01bt" % numpy_
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K\x02\x85%b\x89C\x08%bt" % (dtype, np.array([1.5, -2], "<f4").tobytes())
    # rebuild(function, its arguments, state, remark)
    leaf = b"c%b\n%b\n(%b%b}t" % (module, rebuild, array, state)
    data = b"\x80\x03c%b\n%b\n}X\x01\x00\x00\x00ac%b\n%b\n}X\x01\x00\x00\x00w%bRs\x85Rs\x85R." % (
        haiku, mapping, haiku, mapping, leaf)  # fmt: skip
    (tmp_path / "a.npz").write_bytes(data)
    assert_same(read_haiku(tmp_path / "a.npz"), {"a": {"w": np.array([1.5, -2], np.float32)}})


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_memory_stays_within_twice_the_file(tmp_path, protocol):
    draw = np.random.default_rng(0)
    tree = {
        f"a/~/b_{i}": {"w": draw.standard_normal((128, 1024), dtype=np.float32)} for i in range(16)
    }  # 8 MiB
    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(tree, protocol))
    tracemalloc.start()
    read_haiku(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + (4 << 20)


# --- what hostile files try --------------------------------------------------------------------------


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def word(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def named(module: str, name: str) -> bytes:
    return word(module) + word(name) + b"\x93"


F4 = (
    named("numpy", "dtype")
    + word("f4")
    + b"\x89\x88\x87R(K\x03"
    + word("<")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
BLANK = named("numpy._core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"


def leaf(value: bytes) -> bytes:
    """A tree of one module with one entry, which is `value`."""
    return b"\x80\x04}" + word("a") + b"}" + word("w") + value + b"ss."


def array(
    shape: bytes = b"K\x02\x85", dtype: bytes = F4, raw: bytes = b"C\x08" + bytes(8), blank: bytes = BLANK
) -> bytes:
    return blank + b"(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


def laughs(depth: int) -> bytes:
    """A tuple of two of the tuple before, `depth` times: 2 ** depth leaves in a few bytes."""
    return b")" + b"".join(
        b"r" + struct.pack("<I", i) + b"j" + struct.pack("<I", i) + b"\x86" for i in range(depth)
    )


def pickles(sentinel: Path) -> dict[str, bytes]:
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
        "encode with another codec": leaf(array(raw=named("_codecs", "encode") + word("abc") + word("rot13") + b"\x86R")),
        "encode as an array": leaf(named("_codecs", "encode") + word("abc") + word("latin1") + b"\x86R"),
        "encode beyond latin": leaf(array(raw=named("_codecs", "encode") + b"\x8c\x02\xd0\xb0" + word("latin1") + b"\x86R")),
        "ndarray itself": leaf(named("numpy", "ndarray") + b"J\xff\xff\xff\x7f\x85\x85R"),
        "ndarray by NEWOBJ": leaf(named("numpy", "ndarray") + b"K\x02\x85\x85\x81"),
        "NEWOBJ_EX": leaf(named("numpy", "ndarray") + b")}\x92"),
        "reconstruct of a subclass": leaf(named("numpy._core.multiarray", "_reconstruct") + named("numpy", "dtype") + b"K\x00\x85C\x01b\x87R"),
        "reconstruct with a shape": leaf(BLANK.replace(b"K\x00\x85", b"J\xff\xff\xff\x7f\x85")),
        "array without a state": leaf(BLANK),
        "state given twice": leaf(array() + b"(K\x01K\x02\x85" + F4 + b"\x89C\x08" + bytes(8) + b"tb"),
        "state as attributes": leaf(BLANK + b"}" + word("dtype") + word("O") + b"sb"),
        "state of a mapping": leaf(named("collections", "OrderedDict") + b")R}" + word("a") + b"Nsb"),
        "state of a function": leaf(named("_codecs", "encode") + b"}b"),
        "dtype O": leaf(array(dtype=named("numpy", "dtype") + word("O") + b"\x89\x88\x87R")),
        "dtype with fields": leaf(array(dtype=named("numpy", "dtype") + word("f4,O") + b"\x89\x88\x87R")),
        "dtype of 2 GB items": leaf(array(dtype=named("numpy", "dtype") + word("V2147483647") + b"\x89\x88\x87R")),
        "dtype with itemsize": leaf(array(dtype=F4.replace(b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", 1))),
        "EXT1": leaf(b"\x82\x01"), "EXT2": leaf(b"\x83\x01\x00"), "EXT4": leaf(b"\x84\x01\x00\x00\x00"),
        "PERSID": leaf(b"Pabc\n"), "BINPERSID": leaf(word("abc") + b"Q"),
        "INST": leaf(b"(" + word(touch) + b"ios\nsystem\n"), "OBJ": leaf(b"(cos\nsystem\n" + word(touch) + b"o"),
        "STRING": leaf(b"S'abc'\n"), "BINFLOAT": leaf(b"G" + bytes(8)), "NEXT_BUFFER": leaf(b"\x97"),
        "POP": leaf(b"N0"), "LONG4": leaf(array(shape=b"\x8b\xff\xff\xff\x7f\x85")), "long number": leaf(b"I" + b"9" * 150 + b"\n"),
        "laughs as a value": leaf(laughs(200)), "laughs as a shape": leaf(array(shape=laughs(200))),
        "laughs as a key": b"\x80\x04}" + laughs(200) + b"Ns.", "laughs as arguments": leaf(named("numpy", "dtype") + laughs(200) + b"R"),
        "laughs as a whole": b"\x80\x04" + laughs(2000) + b".",
        "one array a hundred thousand times": b"\x80\x04" + array(b"M\x00\x10\x85", raw=b"B\x00\x40\x00\x00" + bytes(16384)).join([b"}" + word("a") + b"}(" + word("w"), b"\x94"])
        + b"".join(word(f"w{i}") + b"h\x00" for i in range(100_000)) + b"us.",
        "modules that share": b"\x80\x04}(" + word("m") + b"}(" + word("w") + array() + b"\x94" + b"".join(word(f"w{i}") + b"h\x00" for i in range(2000)) + b"u\x94"
        + b"".join(word(f"m{i}") + b"h\x01" for i in range(2000)) + b"u.",
        "mapping in itself": b"\x80\x04}\x94" + word("a") + b"h\x00s.", "mapping in itself, deeper": b"\x80\x04}" + word("a") + b"}\x94" + word("w") + b"h\x00ss.",
        "deep tuples": leaf(b")" + b"\x85" * 200_000), "deep mappings": b"\x80\x04" + (b"}" + word("a")) * 90_000 + b"N" + b"s" * 90_000 + b".",
        "many instructions": b"\x80\x04" + b"N\x85" * MAX_INSTRUCTIONS, "many marks": b"\x80\x04" + b"(" * (MAX_INSTRUCTIONS + 9),
        "huge shape": leaf(array(shape=b"\x86".join([b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f", b""]))), "huge count": leaf(array(shape=b"J\xff\xff\xff\x7f\x85")),
        "negative shape": leaf(array(shape=b"J\xff\xff\xff\xff\x85")), "no shape": leaf(array(shape=b"N")), "bool shape": leaf(array(shape=b"\x88K\x02\x86")),
        "empty shape": leaf(array(shape=b"K\x00\x85", raw=b"C\x00")), "nine dimensions": leaf(array(shape=b"(" + b"K\x01" * 8 + b"K\x02t")),
        "too few bytes": leaf(array(raw=b"C\x07" + bytes(7))), "too many bytes": leaf(array(raw=b"C\x09" + bytes(9))),
        "announced bytes": leaf(array(raw=b"\x8e" + struct.pack("<Q", big) + bytes(8))), "announced text": leaf(b"\x8d" + struct.pack("<Q", big)),
        "memo far away": leaf(b"Nr\xff\xff\xff\xff"), "memo that is not there": leaf(b"h\x07"), "mark as a value": b"\x80\x04(\x94.",
        "wrong axes": leaf(named("numpy._core.numeric", "_frombuffer") + b"(C\x08" + bytes(8) + F4 + b"K\x01K\x02\x86" + word("K") + b"K\x00K\x05\x86tR"),
        "name that climbs": b"\x80\x04}" + word("../../a") + b"}" + word("w") + array() + b"ss.", "name with a line": b"\x80\x04}" + word("a\nb\x1b[31m") + b"}" + word("w") + array() + b"ss.",
        "name with slashes": leaf(array()).replace(word("w"), word("w/../w")), "number as a name": b"\x80\x04}" + word("a") + b"}K\x01" + array() + b"ss.",
        "one name twice": b"\x80\x04}" + word("a") + b"}" + word("w") + array() + b"s" + word("w") + array() + b"ss.",
        "empty mapping": b"\x80\x04}.", "module without arrays": b"\x80\x04}" + word("a") + b"}s.", "no mapping": b"\x80\x04N.", "one level": b"\x80\x04}" + word("a") + array() + b"s.",
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
    out = io.BytesIO()
    np.savez(out, **{"a/w": np.array([Call(os.system, f"touch {sentinel}")], object)})
    honest = zipped([("a/w.npy", npy(GOOD))])
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped([("a/w.npy", npy(GOOD)), ("a/w.npy", npy(GOOD))])
    encrypted = bytearray(honest)
    encrypted[6] |= 1
    encrypted[honest.index(b"PK\x01\x02") + 8] |= 1
    lying = bytearray(honest)  # the directory says that the member is 1 GB
    struct.pack_into("<I", lying, honest.index(b"PK\x01\x02") + 24, 1 << 30)
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
        "zip: flipped bit": honest.replace(bytes(8), b"\x01" + bytes(7), 1),
        "zip: cut": honest[:-30],
        "zip: no end": honest[:60],
        "zip: empty": zipped([]),
        "zip: large directory": zipped([(f"a/{'x' * 60}{i}.npy", b"") for i in range(45_000)]),
        "zip: only the letters": b"PK",
    }  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The file that none of them may make, and all of them."""
    sentinel = tmp_path_factory.mktemp("hostile") / "ran"
    return sentinel, {**pickles(sentinel), **archives(sentinel)}


def test_every_hostile_file_is_refused_with_one_line_and_does_nothing(hostile, tmp_path):
    sentinel, files = hostile
    assert len(files) >= 100
    for number, (name, data) in enumerate(files.items()):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(data)
        watched = len(data) < 20_000  # watching costs time; the long ones are watched below
        start = time.monotonic()
        if watched:
            tracemalloc.start()
        with pytest.raises(ValueError) as error:  # noqa: PT011  # judged below
            read_haiku(path)
        if watched:
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
        assert time.monotonic() - start < 30, name
        assert not sentinel.exists(), name
        path.unlink()


def test_the_payloads_are_live(hostile):
    """What the test above refuses would run where pickles are loaded: otherwise it could not fail."""
    sentinel, files = hostile
    for name in ("os.system", "eval", "exec", "nested pickle", "object array", "os.system, protocol 0"):
        pickle.loads(files[name])
        assert sentinel.exists(), name
        sentinel.unlink()
    assert pickle.loads(leaf(array()))["a"]["w"].tolist() == [
        0,
        0,
    ]  # and the parts they are made of are sound


@pytest.mark.parametrize(("name", "says"), [
    ("os.system", "it asks for 'posix.system'"),
    ("dotted name", "it asks for 'numpy.ndarray.tofile'"),
    ("EXT1", "it uses the pickle instruction EXT1"),
    ("INST", "it uses the pickle instruction INST"),
    ("object array", "it misuses the rule 'dtype' of arrays"),
    ("laughs as a key", "it has a mapping with a key that is no name, or comes twice"),
    ("huge count", "it announces an array larger than the file"),
    ("one array a hundred thousand times", "its arrays stand for more than the file holds"),
    ("many marks", "it has more than 500,000 instructions"),
    ("text", "it is no pickle"),
    ("empty", "it is empty"),
    ("cut in two", "it ends early"),
])  # fmt: skip
def test_the_line_says_what_was_tried(hostile, tmp_path, name, says):
    path = tmp_path / "bad.npz"
    path.write_bytes(hostile[1][name])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_haiku(path)
    assert str(error.value) == (
        f"{path}: {says}. Allowed: arrays of numbers in mappings. Fix: get the file from its publisher again."
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
def test_damaged_files_are_read_or_refused_but_never_anything_else(tmp_path, kind):
    path, draw = tmp_path / "a.npz", random.Random(0)
    if kind == "npz":
        write_haiku(path, small_tree())
    else:
        path.write_bytes(pickle.dumps(small_tree(), int(kind[-1])))
    honest, refused = path.read_bytes(), 0
    for _ in range(400):
        data = bytearray(honest)
        for _ in range(draw.choice((1, 1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            data = data[: draw.randrange(len(data))]
        path.write_bytes(data)
        reason = ""
        try:
            tree = read_haiku(path)
            assert sum(a.nbytes for arrays in tree.values() for a in arrays.values()) < 2 * len(honest)
        except ValueError as error:
            reason = str(error)
        assert "\n" not in reason
        refused += bool(reason)
    assert refused > 100


# --- weights into networks ---------------------------------------------------------------------------


def test_nothing_is_loaded_in_part_and_every_difference_is_named(tmp_path):
    net = create_model("nf_resnet_nano", num_classes=3)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tree = haiku_from_state_dict({k: v + 1 for k, v in before.items()})
    path = tmp_path / "a.npz"
    tree["NF_ResNet/~/linear"]["b"] = np.zeros(4, np.float32)
    tree["NF_ResNet/~/initial_conv"]["gain"] = np.full(32, np.nan, np.float32)
    del tree["NF_ResNet/~/nf_res_block"]
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_weights(net, path)
    assert str(error.value) == (
        f"{path} does not fit nf_resnet_nano with 3 classes: head.bias has shape (4,), expected (3,); "
        "stages.0.0.skip_gain is missing; stem.conv0.gain has values that are not finite."
    )
    tree["NF_ResNet/~/mystery"] = {"w": np.zeros(3, np.float32)}
    path.write_bytes(pickle.dumps(tree))
    with pytest.raises(
        ValueError, match="1 names in the haiku tree are not of the released NF_ResNet: NF_ResNet/~/my"
    ):
        load_weights(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_files_that_are_not_read(tmp_path):
    for suffix in ("pth", "pt", "bin", "ckpt", "pkl"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}")))
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_weights(path)
        assert str(error.value) == (
            f"{path} is a pickle, which may run code. Convert it first: normfree convert {path} FOLDER"
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
    with pytest.raises(ValueError, match=r"does not exist\. Give a released \.npz file\."):
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


def test_names_and_types_that_cannot_be_written(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"'../a', 'w': expected words with / between them"):
        write_haiku(path, {"../a": {"w": np.zeros(3, np.float32)}})
    with pytest.raises(ValueError, match=r"'a', 'b/w': expected words with / between them"):
        write_haiku(path, {"a": {"b/w": np.zeros(3, np.float32)}})
    with pytest.raises(ValueError, match=r"a/w holds object\. Allowed: f2, f4, f8, i1"):
        write_haiku(path, {"a": {"w": np.zeros(3, object)}})
    assert list(tmp_path.iterdir()) == []
