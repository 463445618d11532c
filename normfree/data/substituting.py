"""A source that goes on when images go bad in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from normfree.data.multilabel import as_multilabel, targets_of
from normfree.data.source import Source, pixels_of
from normfree.data.transforms.decode import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

Read = TypeVar("Read")


class Substituting:
    """A source that returns another image of the same class, or classes, for one that can no longer be read.

    The substitute is the next readable sample of that class, so it is the same in all processes. `bad` collects the
    errors, by name. It is not for sources that are read in their own order (`StreamedSource`).
    """

    def __init__(self, source: Source) -> None:
        self.classes = source.classes
        self.source = source
        self.bad: dict[str, str] = {}
        self._several = as_multilabel(source) is not None

    def __len__(self) -> int:
        return len(self.source)

    def label(self, index: int) -> int:
        """Return the class of sample `index`, which is also that of its substitute."""
        return self.source.label(index)

    def name(self, index: int) -> str:
        """Return the name of sample `index`."""
        return self.source.name(index)

    def base(self, index: int) -> tuple[Source, int]:
        """Return the source and its index of sample `index`."""
        return self.source, index

    def image(self, index: int, draw: int = 0) -> Image:
        """Return the image of sample `index` or of its substitute.

        Raises:
            ImageError: No image of the class can be read.
        """
        return self._first(index, lambda i: self.source.image(i, draw))

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, uint8 H W 3."""
        return self._first(index, lambda i: pixels_of(self.source, i, draw))

    def _first(self, index: int, read: Callable[[int], Read]) -> Read:
        """Return what `read` returns for the first readable sample of the class, from `index` on."""
        failure: ImageError | None = None
        own = self._classes_of(index)
        for step in range(len(self)):
            other = (index + step) % len(self)
            if self._classes_of(other) != own:
                continue
            try:
                return read(other)
            except ImageError as error:
                failure = failure or error
                self.bad[error.name] = error.reason
        assert failure is not None
        raise failure

    def _classes_of(self, index: int) -> tuple[int, ...]:
        """Return the class of a sample, or its classes if it may have several."""
        if not self._several:
            return (self.source.label(index),)
        return tuple(targets_of(self.source, [index])[0].nonzero()[:, 0].tolist())
