"""The base class of sources of encoded images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from normfree.data.transforms.decode import FULL_RANGE, load_image
from normfree.data.transforms.jpeg import load_array

if TYPE_CHECKING:
    from PIL.Image import Image

# A larger class number is a damaged label; it would also make the list of class names that long.
MAX_CLASSES = 100_000


class EncodedSource(ABC):
    """Base of sources of encoded images: subclasses return the path or the bytes of a sample, this class decodes.

    Args:
        background: Color 0 to 255 under transparent pixels.
        max_pixels: Largest width times height that is decoded.
        pixel_range: Value of white in 16-bit gray images.
    """

    def __init__(
        self, *, background: tuple[int, int, int], max_pixels: int, pixel_range: int = FULL_RANGE
    ) -> None:
        self._options: dict[str, Any] = {
            "background": background, "max_pixels": max_pixels, "pixel_range": pixel_range
        }  # fmt: skip

    @abstractmethod
    def data(self, index: int) -> str | bytes:
        """Return the path or the encoded bytes of sample `index`."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of sample `index` in errors."""

    def image(self, index: int, draw: int = 0) -> Image:
        """Return sample `index`, decoded; a file holds one image, so `draw` has no effect."""
        data, name = self._named(index)
        return load_image(data, name=name, **self._options)

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, uint8 H W 3."""
        data, name = self._named(index)
        return load_array(data, name=name, **self._options)

    def _named(self, index: int) -> tuple[str | bytes, str]:
        """Return the data of a sample and its name, which is the path if there is one."""
        data = self.data(index)
        return data, data if isinstance(data, str) else self.name(index)


def number_classes(count: int) -> tuple[str, ...]:
    """Return names for classes that have only numbers: "0", "1", ..."""
    return tuple(str(i) for i in range(count))
