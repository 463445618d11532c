"""Random numbers without hidden state: every draw is a function of (seed, purpose, epoch, sample or step)."""

from __future__ import annotations

import hashlib

import numpy as np

from normfree.suggest import problem

# The increment and the two multipliers of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
# generators"), the generator of Java's SplittableRandom.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key(*parts: int | str) -> int:
    """Return a number in [0, 2**63) that depends on every part and on nothing else.

    The parts name the purpose of the number: `key(seed, "order", epoch)`, `key(seed, "augment", epoch, index)`,
    `key(seed, "mix", step)`, `key(seed, "model", step, micro_batch)`. The same parts give the same number on every
    machine and in every process (BLAKE2b; Python's own `hash` is salted per process). `1` and `"1"` are different
    parts, and ("ab", "c") differs from ("a", "bc").
    """
    text = "".join(f"{'s' if isinstance(p, str) else 'i'}{len(str(p))}:{p}" for p in parts)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(n: int, *parts: int | str) -> np.ndarray:
    """Return the permutation of range(`n`) that belongs to these parts, int64 `n`.

    The items are sorted by a splitmix64 of (key, item). PyTorch's and NumPy's shuffles may change between versions;
    this one is defined here, so a run resumed on newer libraries sees the same samples.

    >>> permutation(5, 0, "order", 1).tolist()
    [3, 1, 0, 4, 2]
    """
    if n < 0:
        raise ValueError(
            problem(f"permutation of {n} items", allowed="0 or more", fix="check the length of the data")
        )
    steps = np.arange(1, n + 1, dtype=np.uint64)
    x = np.uint64(key(*parts)) + _GOLDEN * steps  # wraps modulo 2**64, as intended
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
