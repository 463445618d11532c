"""normfree.data.subset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from normfree.data.seeds import key
from normfree.data.source import Source, Split

if TYPE_CHECKING:
    from PIL.Image import Image


# Above this many pictures nothing is opened before training: at about 400 decodes per second and core, an audit of
# ImageNet would take most of an hour.
AUDIT_LIMIT = 200_000


class Subset:
    """Some samples of a source: sample i is number `indices[i]` of `source`."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.classes = source.classes
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def label(self, index: int) -> int:
        """The class of sample `index` of this part."""
        return self._source.label(int(self._indices[index]))

    def image(self, index: int, draw: int = 0) -> Image:
        """The picture of sample `index` of this part."""
        return self._source.image(int(self._indices[index]), draw)

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """The same as an array, H W 3."""
        read = getattr(self._source, "pixels", None)
        index = int(self._indices[index])
        return np.asarray(self._source.image(index, draw)) if read is None else read(index, draw)

    def name(self, index: int) -> str:
        """The name of sample `index` of this part."""
        return self._source.name(int(self._indices[index]))


def hash_split(
    source: Source, *, val_fraction: float, seed: int, ident: Callable[[int], str] | None = None
) -> tuple[Subset, Subset]:
    """A training and a validation part: every class gives `val_fraction` of its samples to validation.

    They are chosen by a hash of (seed, class, `ident(index)`), so runs agree, and mostly still do after samples
    were added. `ident` (default: the name) should not depend on where the data lie. A class keeps one sample to
    train on and, when it has two, gives at least one. Raises `ValueError` for a fraction outside (0, 1), and when
    no class has two samples.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}. Allowed: above 0 and below 1. Fix: val_fraction=0.1")
    ident = ident or source.name
    members: dict[int, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.label(index), []).append(index)
    held: list[int] = []
    for label, own in members.items():
        word = source.classes[label]
        order = sorted(own, key=lambda i, word=word: (key(seed, "split", word, ident(i)), i))  # type: ignore[misc]
        held += order[: max(min(1, len(own) - 1), min(round(val_fraction * len(own)), len(own) - 1))]
    if not held:
        raise ValueError(
            "one sample per class leaves none for validation. Allowed: two or more in at least one class. "
            "Fix: add samples, or name a validation part with ,val=..."
        )
    mask = np.zeros(len(source), dtype=bool)
    mask[held] = True
    return Subset(source, np.flatnonzero(~mask)), Subset(source, np.flatnonzero(mask))


def make_split(
    what: str,
    train: Source,
    val: Source | None,
    *,
    val_fraction: float,
    seed: int,
    ident: Callable[[int], str] | None = None,
    image_size: int | None = None,
) -> Split:
    """The split of `train` and `val`; without `val`, `hash_split` divides `train`. `what` opens the note."""
    if val is None:
        train, val = hash_split(train, val_fraction=val_fraction, seed=seed, ident=ident)
        how = f"validation is {100 * val_fraction:g} % of each class, the same samples in every run with this seed"
    else:
        how = "validation is the part named for it"
    total = len(train) + len(val)
    notes = [
        f"{what}: {len(train)} images to train on, {len(val)} to validate, {len(train.classes)} classes",
        how,
    ]
    if total > AUDIT_LIMIT:
        notes.append(
            f"{total} images are too many to open each before training; a bad one stops the run by name"
        )
    return Split(
        train=train,
        val=val,
        classes=tuple(train.classes),
        image_size=image_size,
        notes=tuple(notes),
        files=total <= AUDIT_LIMIT,
    )


def spread_indices(length: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over range(length), or all of them if there are fewer.

    >>> spread_indices(10, 4)
    [0, 2, 5, 7]
    """
    count = min(length, count)
    return [index * length // count for index in range(count)]
