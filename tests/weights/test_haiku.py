"""Tests of released weight files: they are read exactly and written back exactly."""

import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from normfree.models.zoo import create_model
from normfree.weights.haiku import read_haiku, write_haiku
from normfree.weights.load import load_weights
from normfree.weights.names import haiku_from_state_dict

REFERENCE = Path(__file__).parent.parent / "reference"
TINY = {"widths": (32, 64, 96, 96), "depths": (1, 2, 2, 1), "group_width": 8, "num_classes": 10}


def assert_same(got: dict, expected: dict) -> None:
    assert [(m, list(a)) for m, a in got.items()] == [(m, list(a)) for m, a in expected.items()]
    for module, arrays in expected.items():
        for name, array in arrays.items():
            ours = got[module][name]
            assert ours.shape == np.shape(array), (module, name)
            assert ours.dtype == np.asarray(array).dtype.newbyteorder("="), (module, name)
            assert np.array_equal(ours, array), (module, name)
            assert ours.flags.writeable


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


def test_written_files_read_back_exactly_and_open_in_numpy(tmp_path, small_tree):
    for name, tree in (("tiny", read_haiku(REFERENCE / "tiny_haiku.npz")), ("small", small_tree)):
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
def test_every_protocol_reads_back(tmp_path, small_tree, protocol):
    tree = small_tree
    tree["NFNet/~/nf_block_3"]["scalar"] = np.float32(1.5)
    ordered = OrderedDict((m, OrderedDict(a)) for m, a in tree.items())
    for i, kind in enumerate((tree, ordered)):
        (tmp_path / f"{i}.npz").write_bytes(pickle.dumps(kind, protocol))
        assert_same(read_haiku(tmp_path / f"{i}.npz"), tree)


@pytest.mark.parametrize("names", [
    (b"numpy.core.multiarray", b"haiku._src.data_structures", b"frozendict", b"jax._src.array", b"_reconstruct_array"),
    (b"numpy._core.multiarray", b"haiku.data_structures", b"FlatMap", b"jax._src.device_array",
     b"reconstruct_device_array"),
    (b"numpy.core.multiarray", b"haiku._src.data_structures", b"FlatMapping", b"dill.dill", b"_create_array"),
])  # fmt: skip
def test_names_of_other_versions_are_understood(tmp_path, names):
    """Pickles by hand, as other versions of the libraries write them: other names, and a note after the state."""
    numpy_, haiku, mapping, module, rebuild = names
    array = b"c%b\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01bt" % numpy_
    minus_one = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00<NNN%b%bK\x00tb" % (
        minus_one, minus_one)  # fmt: skip
    state = b"(K\x01K\x02\x85%b\x89C\x08%bt" % (dtype, np.array([1.5, -2], "<f4").tobytes())
    # rebuild(function, its arguments, state, note)
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


def test_a_file_is_loaded_completely_or_not_at_all(tmp_path):
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
        ValueError, match="1 names in the haiku tree are not those of the released NF_ResNet: NF_ResNet/~/my"
    ):
        load_weights(net, path)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_names_and_types_that_cannot_be_written(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match=r"'../a', 'w' cannot be written\. Allowed: a module of letters"):
        write_haiku(path, {"../a": {"w": np.zeros(3, np.float32)}})
    with pytest.raises(ValueError, match=r"'a', 'b/w' cannot be written\. Allowed: a module of letters"):
        write_haiku(path, {"a": {"b/w": np.zeros(3, np.float32)}})
    with pytest.raises(ValueError, match=r"a/w has dtype object\. Allowed: f2, f4, f8, i1"):
        write_haiku(path, {"a": {"w": np.zeros(3, object)}})
    assert list(tmp_path.iterdir()) == []
