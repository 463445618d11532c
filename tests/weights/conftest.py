"""Fixtures of the tests of weight files."""

from __future__ import annotations

import numpy as np
import pytest

HaikuTree = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def small_tree() -> HaikuTree:
    """A tree with arrays of several ranks, dtypes and memory orders."""
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
