"""Tests of reading PyTorch's files: dense tensors are read exactly, everything else is refused and runs no code."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from normfree.weights.torch_file import plain_tensors, read_torch_file, state_dict_in

STATE = OrderedDict(
    w=torch.arange(6.0).reshape(2, 3), b=torch.tensor([1, 2]), half=torch.ones(3, dtype=torch.bfloat16)
)


class Call:
    """An object whose pickle calls `function`."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def test_a_wrapped_state_dict_comes_back_exactly(tmp_path):
    path = tmp_path / "a.pth"
    tied = {**STATE, "turned": STATE["w"].T, "again": STATE["w"]}
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tied.items()}}, path)
    got = read_torch_file(path)
    assert got.keys() == tied.keys()
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tied.items())
    assert {p.name for p in tmp_path.iterdir()} == {"a.pth"}


def test_code_in_a_file_does_not_run(tmp_path):
    path, sentinel = tmp_path / "a.pt", tmp_path / "ran"
    torch.save({"state_dict": dict(STATE), "args": Call(os.system, f"touch {sentinel}")}, path)
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared below
        read_torch_file(path)
    assert str(error.value) == (
        f"{path}: it asks for posix.system. Allowed: tensors in mappings. "
        "Fix: save only weights, with torch.save(net.state_dict(), path)."
    )
    assert not sentinel.exists()
    torch.load(path, weights_only=False)  # the payload works when it is loaded
    assert sentinel.exists()


def test_a_plain_pickle_is_refused(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {tmp_path / 'ran'}"), 2))
    with pytest.raises(
        ValueError, match=r"a\.bin: it asks for posix\.system\. Allowed: tensors in mappings\."
    ):
        read_torch_file(path)
    assert not (tmp_path / "ran").exists()


def replaced(source, target, change, *, kind=zipfile.ZIP_STORED):
    """Copy a file of torch.save; `change` gets name and content of each member and returns its new content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind, compresslevel=1) as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))


def test_compressed_members_and_large_pickles_are_refused(tmp_path):
    """A few megabytes could decompress to gigabytes, and each byte of a pickle is an instruction."""
    valid, bomb, long = (tmp_path / f"{name}.pth" for name in "abc")
    torch.save({"w": torch.zeros(1 << 18)}, valid)
    replaced(valid, bomb, lambda name, data: data, kind=zipfile.ZIP_DEFLATED)
    with pytest.raises(
        ValueError, match=r"b\.pth: its member 'a/.*' is compressed\. Allowed: members as torch.save"
    ):
        read_torch_file(bomb)
    replaced(valid, long, lambda name, data: bytes(9 << 20) if name.endswith(".pkl") else data)
    with pytest.raises(
        ValueError, match=r"c\.pth: its pickle has 9,437,184 bytes\. Allowed: at most 8,388,608\.$"
    ):
        read_torch_file(long)


def test_a_file_that_asks_for_much_memory_stops_at_the_limit(tmp_path):
    """The child may take 400 MB more than an idle one; this file asks for 2 GB."""
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(3), "x": Call(bytearray, 2_000_000_000)}, path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_torch_file(path)
    assert str(error.value) == (
        f"{path}: reading it took more memory or time than {path.stat().st_size:,} bytes of weights can need."
    )


def test_a_file_larger_than_any_network_is_not_read(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"")
    os.truncate(path, 40_000_000_000)  # takes no space
    with pytest.raises(ValueError, match=r"has 40,000,000,000 bytes\. Allowed: at most 17,179,869,184\.$"):
        read_torch_file(path)


def test_there_are_not_more_tensors_than_any_network_has():
    with pytest.raises(ValueError, match=r"^it has 20,001 entries\. Allowed: at most 20,000\.$"):
        plain_tensors({str(i): torch.zeros(0) for i in range(20_001)}, size=1000)


@pytest.mark.parametrize(("content", "key", "found"), [
    (STATE, "", STATE),
    ({"model": STATE, "epoch": 3}, "", STATE),
    ({"model_state_dict": STATE, "optimizer": {}}, "", STATE),
    ({"state_dict": {}, "state_dict_ema": STATE}, "state_dict_ema", STATE),
    ({"weights": STATE}, "weights", STATE),
])  # fmt: skip
def test_the_state_dict_is_found(content, key, found):
    assert state_dict_in(content, key=key) is found


@pytest.mark.parametrize(("content", "key", "message"), [
    ([1], "", "it has a list. Allowed: a state dict. Fix: torch.save(net.state_dict(), path)."),
    ({"state_dict": STATE, "state_dict_ema": STATE}, "",
     "it has several state dicts: state_dict, state_dict_ema. Fix: choose one, for example --key state_dict_ema."),
    ({"epoch": 3, "lr": 0.1}, "", "it has epoch, lr. Allowed: tensors, or one of state_dict, model, model_state_dict, "
     "state_dict_ema."),
    ({}, "", "it has nothing. Allowed: tensors, or one of state_dict, model, model_state_dict, state_dict_ema."),
    ({"model": STATE, "ema": STATE}, "emma", "there is no state dict under 'emma'. Allowed: model, ema."),
])  # fmt: skip
def test_content_without_one_state_dict(content, key, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        state_dict_in(content, key=key)
    assert str(error.value) == message


@pytest.mark.parametrize("value", [
    torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.bool),
    torch.zeros(3, device="meta"), [1.0], 3, None, "text", {"a": torch.zeros(3)},
])  # fmt: skip
def test_only_dense_numbers_are_weights(value):
    with pytest.raises(ValueError, match=r"^1 entries are not dense tensors of numbers: odd\.$"):
        plain_tensors({"w": torch.zeros(3), "odd": value}, size=1000)


def test_tensors_cannot_be_larger_than_the_file():
    with pytest.raises(ValueError, match=r"^its tensors are larger than the 1,000 bytes of the file\.$"):
        plain_tensors({"w": torch.zeros(1).expand(10**9)}, size=1000)


def test_the_prefix_module_is_removed_from_all_names_or_none():
    assert list(plain_tensors({"module.a": torch.zeros(3), "module.b": torch.zeros(1)}, size=16)) == [
        "a",
        "b",
    ]
    assert list(plain_tensors({"module.a": torch.zeros(3), "b": torch.zeros(1)}, size=16)) == [
        "module.a",
        "b",
    ]


def test_checkpoints_of_training_programs_with_options_and_prefixes(tmp_path):
    weights = {"stem.weight": torch.ones(2), "head.bias": torch.zeros(3)}
    timm = {"epoch": 3, "state_dict": weights, "args": argparse.Namespace(model="x", lr=0.1), "optimizer": {}}
    torch.save(timm, tmp_path / "model_best.pth.tar")
    assert read_torch_file(tmp_path / "model_best.pth.tar").keys() == weights.keys()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod.", "net."):
        state = state_dict_in({"state_dict": {prefix + k: v for k, v in weights.items()}})
        assert plain_tensors(state, size=1000).keys() == weights.keys(), prefix
    mixed = {"model.a": torch.ones(1), "other.b": torch.ones(1)}  # no common prefix
    assert plain_tensors(mixed, size=1000).keys() == mixed.keys()
