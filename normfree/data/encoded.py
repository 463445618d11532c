"""What the sources have in common: a part of a source, a validation part by hash, and the grammar of a data word."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from normfree.data.transforms.decode import load_image
from normfree.data.transforms.jpeg import load_array

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CLASSES = 100_000  # a larger class number is a damaged label, and would make a list of names as long


class EncodedSource(ABC):
    """What sources of encoded pictures share: `data(index)` is a file's path or its bytes, and decoding is the same."""

    def __init__(self, *, background: tuple[int, int, int], max_pixels: int) -> None:
        self._background, self._max_pixels = background, max_pixels

    @abstractmethod
    def data(self, index: int) -> str | bytes:
        """The path or the encoded bytes of sample `index`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What errors call sample `index`."""

    def image(self, index: int, draw: int = 0) -> Image:
        """Sample `index`, decoded; a file holds one picture, so `draw` changes nothing."""
        return load_image(
            self.data(index), name=self.name(index), background=self._background, max_pixels=self._max_pixels
        )

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """The same as an array, H W 3."""
        return load_array(
            self.data(index), name=self.name(index), background=self._background, max_pixels=self._max_pixels
        )


def number_classes(count: int) -> tuple[str, ...]:
    """Names for classes that have only numbers: "0", "1", ..."""
    return tuple(str(i) for i in range(count))
