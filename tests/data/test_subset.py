"""Halving a validation part."""

import numpy as np

from normfree.data.source import ArraySource, Split
from normfree.data.subset import halve_validation


def test_a_validation_part_that_is_too_small_keeps_its_images() -> None:
    images = np.zeros((4, 2, 2, 3), np.uint8)
    large = ArraySource(images, [0, 1, 0, 1], classes=["a", "b"], names=list("wxyz"))
    small = ArraySource(images[:2], [0, 1], classes=["a", "b"], names=list("st"))
    split = halve_validation(Split(large, small, ("a", "b")), seed=0)
    assert split.val is small
    assert split.test is None
    assert split.notes[-1] == "2 validation images are too few for a test part"
    halved = halve_validation(Split(small, large, ("a", "b")), seed=0)
    assert (len(halved.val), len(halved.test)) == (2, 2)
