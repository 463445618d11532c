"""Parts of a source: a subset, the validation split by hash, and evenly spread indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from normfree.data.seeds import key
from normfree.data.source import Source, Split, pixels_of
from normfree.suggest import problem

if TYPE_CHECKING:
    from PIL.Image import Image

# Above this many images none is opened before training: at about 400 decodes per second and core, an audit of ImageNet
# would take most of an hour.
AUDIT_LIMIT = 200_000


class Subset:
    """A part of a source: sample i is sample `indices[i]` of `source`."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.classes = source.classes
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def label(self, index: int) -> int:
        """Return the class of sample `index` of the subset."""
        return self._source.label(int(self._indices[index]))

    def image(self, index: int, draw: int = 0) -> Image:
        """Return the image of sample `index` of the subset."""
        return self._source.image(int(self._indices[index]), draw)

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, uint8 H W 3."""
        return pixels_of(self._source, int(self._indices[index]), draw)

    def name(self, index: int) -> str:
        """Return the name of sample `index` of the subset."""
        return self._source.name(int(self._indices[index]))

    def base(self, index: int) -> tuple[Source, int]:
        """Return the source and its index of sample `index` of the subset."""
        return self._source, int(self._indices[index])


def check_val_fraction(val_fraction: float) -> None:
    """Raise `ValueError` unless 0 < `val_fraction` < 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            problem(f"val_fraction={val_fraction}", allowed="above 0 and below 1", fix="val_fraction=0.1")
        )


def hash_split(
    source: Source,
    *,
    val_fraction: float,
    seed: int,
    ident: Callable[[int], str] | None = None,
    what: str = "the data",
    fix: str = "add samples, or name validation data with ,val=...",
) -> tuple[Subset, Subset]:
    """Return a training and a validation subset: every class gives `val_fraction` of its samples to validation.

    Samples are chosen by a hash of (seed, class, `ident(index)`), so runs agree, and mostly still do after samples
    were added. A class keeps at least one sample to train on and, if it has two, gives at least one.

    Args:
        source: Data set.
        val_fraction: Fraction for validation, above 0 and below 1.
        seed: Seed of the choice.
        ident: Id of a sample, by default its name. It should not depend on where the data are stored.
        what: Name of the data for the error message.
        fix: Advice for the error message.

    Raises:
        ValueError: The fraction is out of range, or no class has two samples.
    """
    check_val_fraction(val_fraction)
    ident = ident or source.name
    members: dict[int, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.label(index), []).append(index)
    held_out = np.zeros(len(source), dtype=bool)
    for label, own in members.items():
        hashes = {i: key(seed, "split", source.classes[label], ident(i)) for i in own}
        count = max(min(1, len(own) - 1), min(round(val_fraction * len(own)), len(own) - 1))
        held_out[sorted(own, key=lambda i, hashes=hashes: (hashes[i], i))[:count]] = True  # type: ignore[misc]
    if not held_out.any():
        raise ValueError(
            problem(
                f"{what} has one sample per class, which leaves none for validation",
                allowed="two or more in at least one class",
                fix=fix,
            )
        )
    return Subset(source, np.flatnonzero(~held_out)), Subset(source, np.flatnonzero(held_out))


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
    """Return the split of `train` and `val`; without `val`, `hash_split` divides `train`. `what` names the data."""
    if val is None:
        train, val = hash_split(train, val_fraction=val_fraction, seed=seed, ident=ident, what=what)
        how = f"validation is {100 * val_fraction:g} % of each class, the same samples in every run with this seed"
    else:
        how = "validation is the part named for it"
    total = len(train) + len(val)
    return Split(
        train=train,
        val=val,
        classes=tuple(train.classes),
        image_size=image_size,
        notes=(summary(what, train, val), how, *audit_notes(total)),
        files=total <= AUDIT_LIMIT,
    )


def summary(what: str, train: Source, val: Source) -> str:
    """Return the note that counts the images of a split."""
    return f"{what}: {len(train)} images to train on, {len(val)} to validate, {len(train.classes)} classes"


def audit_notes(total: int) -> tuple[str, ...]:
    """Return a note if `total` images are too many for an audit."""
    if total <= AUDIT_LIMIT:
        return ()
    return (f"{total} images are too many to open each before training; a bad one stops the run by name",)


def spread_indices(length: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over range(length), or all of them if there are fewer.

    >>> spread_indices(10, 4)
    [0, 2, 5, 7]
    """
    count = min(length, count)
    return [index * length // count for index in range(count)]
