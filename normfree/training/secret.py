"""The secret key of a private run, and the random numbers that follow from it.

Everything else in a run is a function of `seed`, which config.toml publishes. The noise and the sampling of a private
run must be unknown to readers of the model, so they are functions of a key from the operating system's generator. The
key is a file of the run folder that only its owner can read. It exists while the run can continue: with it, a resumed
run repeats the same steps with the same noise. It is deleted when the run ends.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from normfree.files import UnreadableFileError, flush, read_text
from normfree.suggest import problem

KEY_FILE = "privacy.key"
_BYTES = 32
# Entries of a tensor that one digest covers, so that memory stays small.
_BLOCK = 1 << 20
# Normal variables in the sum that makes one. A float64 from one normal variable can reveal the value that it was added
# to; reversing a sum of four takes far too many operations (Holohan and Braghin 2021, arXiv 2107.10138). Opacus does
# the same with secure_mode.
_SUMMANDS = 4


class SecretKey:
    """Random numbers as functions of a secret key and their purpose, without a state: SHAKE-256 of both.

    Args:
        secret: 32 bytes.
    """

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == _BYTES
        self._secret = secret

    @classmethod
    def create(cls, path: Path) -> SecretKey:
        """Write a new key to `path`, which only the owner can read (mode 0600), and return it."""
        secret = secrets.token_bytes(_BYTES)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret.hex() + "\n")
        flush(path)
        flush(path.parent)
        return cls(secret)

    @classmethod
    def read(cls, path: Path) -> SecretKey | None:
        """Return the key in `path`, None if there is none or only a part of one.

        Raises:
            ValueError: others can read the file.
        """
        try:
            secret = bytes.fromhex(read_text(path, limit=200))
        except (UnreadableFileError, ValueError):
            return None
        if path.stat().st_mode & 0o077:
            given = f"{path} can be read by other users, so the noise of this run is no longer secret"
            raise ValueError(problem(given, allowed="mode 0600", fix="start another run with --out"))
        return cls(secret) if len(secret) == _BYTES else None

    @property
    def fingerprint(self) -> str:
        """A digest that tells keys apart, and reveals nothing of the key or of the numbers that follow from it."""
        return self._digest(16, "fingerprint").hex()

    def members(self, count: int, rate: float, *, step: int) -> np.ndarray:
        """Return the indices of a Poisson sample: each of `count` samples by itself, with probability `rate`."""
        if rate >= 1.0:
            return np.arange(count)
        drawn = np.frombuffer(self._digest(8 * count, "sample", step), dtype="<u8")
        return np.flatnonzero(drawn < np.uint64(int(rate * 2**64)))

    def gaussian(self, shape: Sequence[int], *purpose: int | str) -> np.ndarray:
        """Return independent standard normal variables, float64, which belong to this purpose."""
        count = int(np.prod(shape, dtype=np.int64))
        found = np.empty(count)
        for block, start in enumerate(range(0, count, _BLOCK)):
            stop = min(start + _BLOCK, count)
            found[start:stop] = self._normal(stop - start, *purpose, block)
        return found.reshape(shape)

    def _normal(self, count: int, *purpose: int | str) -> np.ndarray:
        """Return normal variables, each a sum of four (Box and Muller 1958) divided by 2."""
        drawn = np.frombuffer(self._digest(8 * _SUMMANDS * count, "noise", *purpose), dtype="<u8")
        uniform = ((drawn >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside of (0, 1)
        radius, angle = uniform.reshape(2, _SUMMANDS // 2, count)
        radius, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
        # Cosine and sine of one pair are independent, but go to different sums, so that no sum is simply another pair.
        parts = [*(radius * np.cos(angle)), *np.roll(radius * np.sin(angle), 1, axis=1)]
        return np.sum(parts, axis=0) / np.sqrt(_SUMMANDS)

    def _digest(self, size: int, *purpose: int | str) -> bytes:
        text = "".join(f"{type(p).__name__}{len(str(p))}:{p}" for p in purpose)
        return hashlib.shake_256(self._secret + text.encode()).digest(size)
