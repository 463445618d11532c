"""The data set protocols, `Source` and `StreamedSource`, and the `Split` of a data set for training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from normfree.suggest import printable, problem

if TYPE_CHECKING:
    from PIL.Image import Image


class Source(Protocol):
    """A data set of labeled images with random access. Its order is fixed; the loader shuffles.

    A source may also implement `PixelSource` or `StreamedSource`; `has_pixels` and `as_streamed` check for them.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into this tuple."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """Return the class of sample `index`, without decoding its image."""

    def image(self, index: int, draw: int = 0) -> Image:
        """Return the image of sample `index` in mode RGB.

        Args:
            index: Sample, from 0.
            draw: A sample may own several images of the same thing, such as an emoji in its skin tones. `draw`, taken
                modulo their number, chooses one; 0 is the canonical image. Most samples own one image.

        Raises:
            ImageError: The image cannot be read.
        """

    def name(self, index: int) -> str:
        """Return the path or id of sample `index`, for errors, logs and tables of predictions."""


class PixelSource(Source, Protocol):
    """A source that returns arrays directly, which saves the loader the copies of a detour through a PIL image."""

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the image of sample `index` as uint8, H W 3; the array may be read-only."""


class StreamedSource(Source, Protocol):
    """A source that is cheap to read only in its own order, such as files behind a network.

    The loader takes samples in `order` instead of a permutation of its own. It calls `read` ahead of time in the
    process that samples, in the order of the steps, and hands the result to `hold` in the process that decodes.
    """

    def order(self, seed: int, cycle: int) -> np.ndarray:
        """Return the permutation of the indices used in cycle `cycle`, int64 N; a cycle uses each index once."""

    def read(self, indices: Sequence[int]) -> dict[int, Any]:
        """Return the data that `image` needs for `indices`, by index."""

    def hold(self, data: dict[int, Any]) -> None:
        """Keep the result of `read` for the following calls of `image`, in place of what was kept before."""


def has_pixels(source: Source) -> bool:
    """Return True if `source` is a `PixelSource`."""
    return hasattr(source, "pixels")


def as_streamed(source: Source) -> StreamedSource | None:
    """Return `source` if it is a `StreamedSource`, else None."""
    streamed = all(hasattr(source, method) for method in ("order", "read", "hold"))
    return cast(StreamedSource, source) if streamed else None


def pixels_of(source: Source, index: int, draw: int = 0) -> np.ndarray:
    """Return the image of sample `index` as uint8, H W 3, from any source; the array may be read-only."""
    if has_pixels(source):
        return cast(PixelSource, source).pixels(index, draw)
    return np.asarray(source.image(index, draw))


@dataclass(frozen=True)
class Split:
    """A training, a validation and possibly a test source with the same classes, and how they were made.

    Attributes:
        train: Source to train on.
        val: Source to validate on: it chooses the best step, and shows progress.
        classes: Class names of both.
        credit: Attribution required by the license of the images, or "".
        image_size: Side in pixels if all images are squares of one size, else None.
        notes: Sentences on what was read, chosen or left out.
        files: True if the images are the user's own files, which should be audited before training.
        held_out: False if the images of `val` are trained on too, so that their scores tell nothing about new images.
        test: Source that is scored once, at the end of a run; None if there is none.
        left_out: Names of images that cannot be read and were left out, with the reasons.
    """

    train: Source
    val: Source
    classes: tuple[str, ...]
    credit: str = ""
    image_size: int | None = None
    notes: tuple[str, ...] = ()
    files: bool = False
    held_out: bool = True
    test: Source | None = None
    left_out: tuple[str, ...] = ()

    def parts(self) -> dict[str, Source]:
        """Return the sources by their names: "train", "val" and, if there is one, "test"."""
        return {"train": self.train, "val": self.val} | ({"test": self.test} if self.test is not None else {})


def require_class_names(classes: Sequence[str], *, source: str) -> None:
    """Check that class names can be printed and written: strings of valid Unicode without control characters.

    Raises:
        ValueError: one is not; the message names it and `source`.
    """
    for name in classes:
        if not isinstance(name, str) or not name or printable(name, one_line=True) != name:
            raise ValueError(
                problem(f"{printable(source)!r} has a class named {name!r}",
                        allowed="printable text in UTF-8, without line breaks", fix="rename the class")
            )  # fmt: skip


class ArraySource:
    """A source of images that are already decoded in memory.

    Args:
        images: uint8, M H W 3.
        labels: Class numbers of the N samples.
        classes: Class names.
        names: Ids of the N samples.
        rows: `rows[i]` lists the indices into `images` of sample i, the canonical image first. None means that sample
            i owns image i alone, so M equals N.

    Examples:
        >>> import numpy as np
        >>> source = ArraySource(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], classes=["a", "b"], names=["x", "y"])
        >>> len(source), source.label(1), source.image(1).size
        (2, 1, (8, 8))
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int],
        *,
        classes: Sequence[str],
        names: Sequence[str],
        rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        assert images.dtype == np.uint8, images.dtype
        assert images.ndim == 4, images.shape
        assert images.shape[3] == 3, images.shape
        assert len(labels) == len(names) == len(images if rows is None else rows)
        self.classes = tuple(classes)
        self._images = images
        self._labels = [int(label) for label in labels]
        self._names = list(names)
        self._rows = None if rows is None else [tuple(row) for row in rows]

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, index: int) -> int:
        """Return the class of sample `index`."""
        return self._labels[index]

    def image(self, index: int, draw: int = 0) -> Image:
        """Return image `draw` of sample `index`, taken modulo their number; 0 is the canonical one."""
        from PIL import Image

        return Image.fromarray(self.pixels(index, draw))

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, uint8 H W 3."""
        row = (index,) if self._rows is None else self._rows[index]
        image: np.ndarray = self._images[row[draw % len(row)]]
        return image

    def name(self, index: int) -> str:
        """Return the id of sample `index`."""
        return self._names[index]
