"""Laws of files: what was written is read again, and any bytes are read or refused."""

import contextlib
import hashlib
import json
import math
import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from normfree.diagnose.metrics_file import read_metrics, row_in
from normfree.files import (
    UnreadableFileError,
    atomic_write,
    atomic_write_text,
    read_bytes,
    read_csv,
    read_json,
    read_text,
    read_toml,
    sha256_of,
)
from normfree.training import checkpoint
from normfree.training.metrics import MetricsWriter
from normfree.weights.checksums import verify, write_checksums
from normfree.weights.haiku import read_haiku, write_haiku
from normfree.weights.tensor_file import read_tensors, write_tensors

utf8 = st.text(st.characters(codec="utf-8"), max_size=20)
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), utf8)
trees = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(utf8, x, max_size=3), max_leaves=6
)
objects = st.dictionaries(utf8, trees, max_size=4)


@contextlib.contextmanager
def file(data: bytes, name: str = "a"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        yield path


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_file_is_read_if_and_only_if_it_is_within_the_limit(data, limit):
    with file(data) as path:
        try:
            assert read_bytes(path, limit=limit) == data
            assert len(data) <= limit
        except UnreadableFileError as error:
            assert len(data) > limit
            assert repr(str(path)) in str(error)


@given(utf8)
def test_text_is_read_as_it_was_written(text):
    with file(b"before") as path:
        atomic_write_text(path, text)
        assert read_text(path, limit=1000) == text
        assert sha256_of(path) == hashlib.sha256(text.encode()).hexdigest()
        assert [other.name for other in path.parent.iterdir()] == ["a"]


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_a_write_that_fails_leaves_the_file_and_its_folder_as_they_were(before, begun):
    def write(temporary):
        temporary.write_bytes(begun)
        raise ZeroDivisionError

    with file(before) as path:
        with contextlib.suppress(ZeroDivisionError):
            atomic_write(path, write)
        assert path.read_bytes() == before
        assert [other.name for other in path.parent.iterdir()] == ["a"]


@given(objects)
def test_json_objects_are_read_as_they_were_written(value):
    with file(json.dumps(value).encode()) as path:
        assert read_json(path, limit=10**6) == value


@given(st.binary(max_size=60))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 10_000)
@example(b"\xff\xfe{}")
def test_any_bytes_are_json_toml_and_csv_or_unreadable_in_one_line(data):
    with file(data) as path:
        for read, kind in ((read_json, dict), (read_toml, dict), (read_csv, list)):
            try:
                assert isinstance(read(path, limit=10**6), kind)
            except UnreadableFileError as error:
                assert len(str(error).splitlines()) == 1
                assert str(path) in str(error)


numbers = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False))
rows = st.lists(st.dictionaries(st.sampled_from(["loss", "top1", "lr"]), numbers), max_size=5)


@given(rows)
def test_lines_of_metrics_are_read_as_they_were_written(values):
    with file(b"") as path:
        writer = MetricsWriter(path, step=0)
        for step, line in enumerate(values):
            writer.write(step=step, **line)
        state = writer.state()
        writer.close()
        expected = [{"step": step, **line} for step, line in enumerate(values)]
        assert read_metrics(path) == expected
        again = MetricsWriter(path, step=len(values), expected=state)
        assert not again.damaged
        assert again.state() == state
        again.close()


@given(rows, st.integers(0, 5))
def test_metrics_after_the_step_of_a_checkpoint_are_removed(values, step):
    with file(b"") as path:
        lines = [{"step": number, **line} for number, line in enumerate(values)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        MetricsWriter(path, step=step).close()
        assert read_metrics(path) == lines[: step + 1]


@given(rows, st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_of_metrics_is_noticed(values, at, byte):
    text = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in enumerate([{}, *values]))
    data = bytearray(text.encode())
    expected = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    same = data[at % len(data)] == byte
    data[at % len(data)] = byte
    with file(bytes(data)) as path:
        writer = MetricsWriter(path, step=10, expected=expected)
        writer.close()
        assert writer.damaged != same


@given(st.one_of(utf8, trees.map(json.dumps), objects.map(lambda o: json.dumps({**o, "step": 1}))))
@example('{"step": 1, "ratios": {"a": [true]}}')
@example('{"step": true}')
@example('{"step": 1, "ratios": ' + "[" * 100_000)
def test_a_line_of_metrics_holds_numbers_or_is_skipped(line):
    row = row_in(line)
    if row is not None:
        assert type(row["step"]) is int
        for name, value in row.items():
            flat = (
                [n for list_ in value.values() for n in list_]
                if name == "ratios" and type(value) is dict
                else [value]
            )
            assert all(type(number) in (int, float) for number in flat)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=4, max_side=3), elements=finite)
named = st.dictionaries(
    st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4})?", fullmatch=True), tensors, min_size=1, max_size=4
)


@given(named, st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]))
def test_tensors_are_read_as_they_were_written(values, dtype):
    state = {name: torch.from_numpy(value.copy()).to(dtype) for name, value in values.items()}
    with file(b"") as path:
        write_tensors(path, state)
        found = read_tensors(path)
    assert found.keys() == state.keys()
    assert all(found[n].dtype == dtype and found[n].equal(state[n]) for n in state)


@given(named, st.data())
def test_a_damaged_header_of_tensors_is_unreadable_or_gives_tensors(values, data):
    with file(b"") as path:
        write_tensors(path, {name: torch.from_numpy(value.copy()) for name, value in values.items()})
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(path).values())
        except UnreadableFileError as error:
            assert len(str(error).splitlines()) == 1


modules = st.from_regex(r"NFNet/~/[a-z]{1,5}(_[0-9])?", fullmatch=True)
haiku_arrays = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.int32]),
    arrays.array_shapes(min_dims=0, max_dims=4, max_side=3),
    elements=st.integers(-100, 100),
)
haiku_trees = st.dictionaries(
    modules,
    st.dictionaries(st.sampled_from(["w", "b", "gain"]), haiku_arrays, min_size=1),
    min_size=1,
    max_size=3,
)


def same_trees(one, other):
    return one.keys() == other.keys() and all(
        one[module].keys() == other[module].keys()
        and all(a.dtype == (b := other[module][n]).dtype and np.array_equal(a, b) for n, a in arrays_.items())
        for module, arrays_ in one.items()
    )


@given(haiku_trees)
def test_a_haiku_tree_is_read_as_it_was_written(tree):
    with file(b"", "a.npz") as path:
        write_haiku(path, tree)
        assert same_trees(read_haiku(path), tree)


@given(haiku_trees, st.sampled_from([2, 3, 4]))
def test_a_haiku_tree_in_a_pickle_is_read_without_running_it(tree, protocol):
    with file(pickle.dumps(tree, protocol), "a.npz") as path:
        assert same_trees(read_haiku(path), tree)


@given(st.one_of(st.binary(max_size=100), st.binary(max_size=100).map(lambda b: b"PK\3\4" + b)))
@example(pickle.dumps(math.sqrt))
@example(pickle.dumps({"a": {"b": print}}))
def test_any_bytes_as_weights_are_refused_with_a_value_error(data):
    with file(data, "a.npz") as path, contextlib.suppress(ValueError):
        raise AssertionError(read_haiku(path))


@given(named, objects, st.integers(0, 10**9))
def test_a_checkpoint_is_read_as_it_was_saved(values, state, step):
    saved = {name: torch.from_numpy(value.copy()) for name, value in values.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), step, tensors={"model": saved}, state=state, keep=2)
        found, passed_over = checkpoint.newest(Path(folder))
        assert checkpoint.pointed(Path(folder), "last") == path.name
    assert not passed_over
    assert (found.step, found.state) == (step, state)
    assert all(found.tensors["model"][name].equal(tensor) for name, tensor in saved.items())


@given(st.sets(st.integers(0, 10**10), min_size=1, max_size=5))
@example({99_999_999, 100_000_000})
def test_the_newest_checkpoint_is_the_one_of_the_largest_step(steps):
    with tempfile.TemporaryDirectory() as folder:
        for step in sorted(steps):
            checkpoint.save(Path(folder), step, tensors={}, state={}, keep=2)
        found, _ = checkpoint.newest(Path(folder))
        kept = {path.name for path in Path(folder).glob("step-*")}
    assert found.step == max(steps)
    assert kept == {checkpoint.name_of(step) for step in sorted(steps)[-2:]}


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}\.[a-z]{1,3}", fullmatch=True), st.binary(max_size=20), min_size=1),
       st.data())  # fmt: skip
def test_a_changed_file_is_noticed_by_its_checksum(files, data):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, content in files.items():
            (root / name).write_bytes(content)
        write_checksums(root, list(files))
        for name in files:
            verify(root, name)
        name = data.draw(st.sampled_from(sorted(files)))
        (root / name).write_bytes(files[name] + b"!")
        try:
            verify(root, name)
        except ValueError as error:
            assert name in str(error)
        else:
            raise AssertionError(name)
