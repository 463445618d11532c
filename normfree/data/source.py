"""What a data set is: a `Source` of labelled pictures, and a `Split` of two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


class Source(Protocol):
    """Labelled pictures, by number. The order is fixed; shuffling is the loader's work."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is a position in this tuple."""

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class of sample `index`, without opening its picture."""

    def image(self, index: int, draw: int = 0) -> Image:
        """The picture of sample `index`, mode RGB; `ImageError` when it cannot be read.

        A sample may own several pictures of the same thing (an emoji in its skin tones): `draw` chooses one,
        as a number of any size taken modulo their count, and 0 is the canonical one. Most samples own one
        picture.
        """

    def name(self, index: int) -> str:
        """The path or id of sample `index`, for errors, logs and tables of predictions."""

    # A source may also have `pixels(index, draw=0) -> np.ndarray`: the same picture as uint8 H W 3, perhaps read-only.
    # The loader prefers it for training, as it saves copies.
    #
    # A source that is cheap to read only forwards (`StreamSource`) says so by three methods more. `order(seed, turn)`:
    # each index once, in place of the loader's permutation. `read(indices)`: what `image` needs for them, called in the
    # process that plans, in the order of the plan. `hold(data)`: takes that in the process that decodes.


@dataclass(frozen=True)
class Split:
    """A training and a validation source with the same classes, and what there is to say about them.

    `credit` is the attribution that the pictures' licence asks for, or "". `image_size` is the side in pixels
    of pictures that all have one size, or None. `notes` are plain sentences on what was read, taken or left
    out. `files` is True when the pictures are a user's own files, which an audit should open before training
    starts.
    """

    train: Source
    val: Source
    classes: tuple[str, ...]
    credit: str = ""
    image_size: int | None = None
    notes: tuple[str, ...] = ()
    files: bool = False


class ArraySource:
    """A source of pictures that are already decoded in memory.

    `images` is uint8, M H W 3; `labels` holds N class numbers; `names` holds N ids. `rows[i]` lists the
    pictures of sample i, the canonical one first; without `rows`, sample i owns picture i alone (then M
    equals N).
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
        """The class of sample `index`."""
        return self._labels[index]

    def image(self, index: int, draw: int = 0) -> Image:
        """Picture `draw` (modulo their count) of sample `index`; 0 is the canonical one."""
        from PIL import Image

        return Image.fromarray(self.pixels(index, draw))

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """The same as an array, H W 3."""
        row = (index,) if self._rows is None else self._rows[index]
        picture: np.ndarray = self._images[row[draw % len(row)]]
        return picture

    def name(self, index: int) -> str:
        """The id of sample `index`."""
        return self._names[index]
