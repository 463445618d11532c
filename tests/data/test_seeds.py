from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from normfree.data.seeds import key, permutation


def test_keys_are_the_same_on_every_machine() -> None:
    # printf 'i1:0s7:augmenti1:3i2:17' | b2sum -l 64 prints these bytes; read little-endian, the last bit dropped
    assert key(0, "augment", 3, 17) == int.from_bytes(bytes.fromhex("785aaf7ae2137734"), "little") >> 1
    code = "from normfree.data.seeds import key; print(key(0, 'augment', 3, 17))"
    for salt in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": salt}, capture_output=True, check=True
        )
        assert int(out.stdout) == key(0, "augment", 3, 17)


def test_every_part_and_its_type_counts() -> None:
    keys = [
        key(1, "a"),
        key("1", "a"),
        key(1, "a", 0),
        key("a", 1),
        key("ab", "c"),
        key("a", "bc"),
        key("abc"),
        key(-1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_a_permutation_holds_each_number_once_and_differs_by_epoch() -> None:
    orders = [permutation(1000, 0, "order", epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(orders[0], orders[1])
    assert permutation(0, "x").tolist() == []


def splitmix64(seed: int, count: int) -> list[int]:
    numbers = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_order_is_that_of_splitmix64() -> None:
    # the usual test vector of splitmix64 implementations, seed 1234567
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    numbers = splitmix64(key(7, "order", 2), 300)
    assert permutation(300, 7, "order", 2).tolist() == sorted(range(300), key=numbers.__getitem__)


def test_every_position_is_equally_likely() -> None:
    counts = np.zeros((5, 5))
    for i in range(4000):
        counts[np.arange(5), permutation(5, "uniform", i)] += 1
    # 4000 draws of 1/5: mean 800, standard deviation 25; the limit is five of them
    assert np.abs(counts - 800).max() < 127


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(ValueError, match="permutation of -1 items"):
        permutation(-1, 0)
