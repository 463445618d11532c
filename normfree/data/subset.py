"""Parts of sources and their unions: subsets, the split by hash, other classes, and evenly spread indices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from normfree.data.encoded import EncodedSource
from normfree.data.seeds import key
from normfree.data.source import Source, Split, as_streamed, pixels_of
from normfree.data.transforms.decode import read_file
from normfree.suggest import number_of, problem

if TYPE_CHECKING:
    from PIL.Image import Image

# Above this many images none is opened before training: at about 400 decodes per second and core, an audit of ImageNet
# would take most of an hour.
AUDIT_LIMIT = 200_000
# The note of a split whose validation images are trained on too.
NOT_HELD_OUT = "no image is held out for validation: the scores are those of images that are trained on"


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


class Joined:
    """The samples of several sources of the same classes, one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.classes = sources[0].classes
        self._sources = list(sources)
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def label(self, index: int) -> int:
        """Return the class of sample `index`."""
        source, own = self.base(index)
        return source.label(own)

    def image(self, index: int, draw: int = 0) -> Image:
        """Return the image of sample `index`."""
        source, own = self.base(index)
        return source.image(own, draw)

    def name(self, index: int) -> str:
        """Return the name of sample `index`."""
        source, own = self.base(index)
        return source.name(own)

    def base(self, index: int) -> tuple[Source, int]:
        """Return the source and its index of sample `index`."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        source = self._sources[part]
        return source, index - int(self._ends[part]) + len(source)


class Relabeled:
    """The samples of a source whose classes are found by name among other classes.

    Args:
        source: Data set; each of its classes that has samples must be in `classes`.
        classes: Class names, for example those of a model.
    """

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._source, self._numbers = source, [numbers.get(name, -1) for name in source.classes]

    def __len__(self) -> int:
        return len(self._source)

    def label(self, index: int) -> int:
        """Return the number of the sample's class among `classes`."""
        return self._numbers[self._source.label(index)]

    def image(self, index: int, draw: int = 0) -> Image:
        """Return the image of sample `index`."""
        return self._source.image(index, draw)

    def pixels(self, index: int, draw: int = 0) -> np.ndarray:
        """Return the same image as an array, uint8 H W 3."""
        return pixels_of(self._source, index, draw)

    def name(self, index: int) -> str:
        """Return the name of sample `index`."""
        return self._source.name(index)

    def origin(self, index: int) -> tuple[Source, int]:
        """Return the source, with its own classes, and its index of sample `index`."""
        return self._source, index


def encoded_bytes(source: Source, index: int) -> bytes | None:
    """Return the encoded bytes of sample `index`; None if the source does not keep them.

    Raises:
        ImageError: The file cannot be read.
    """
    while isinstance(source, Subset | Relabeled | Joined):
        source, index = source.origin(index) if isinstance(source, Relabeled) else source.base(index)
    if not isinstance(source, EncodedSource):
        return None
    data = source.data(index)
    return data if isinstance(data, bytes) else read_file(data)


def check_fractions(val_fraction: float, test_fraction: float = 0.0) -> None:
    """Raise `ValueError` unless both fractions are 0 or more and their sum is below 1."""
    if not 0 <= val_fraction < 1:
        raise ValueError(
            problem(f"val_fraction={val_fraction}", allowed="0 to below 1", fix="val_fraction=0.1")
        )
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(
            problem(
                f"test_fraction={test_fraction} with val_fraction={val_fraction}",
                allowed="0 or more, and together below 1",
                fix="test_fraction=0.1",
            )
        )


def hash_split(
    source: Source,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    ident: Callable[[int], str] | None = None,
    what: str = "the data",
    fix: str = "add samples, or name validation data with ,val=...",
) -> tuple[Subset, Subset, Subset | None]:
    """Return a training, a validation and a test subset; the last is None if `test_fraction` is 0.

    Every class gives `val_fraction` and `test_fraction` of its samples. They are chosen by a hash of (seed, class,
    `ident(index)`), so runs agree, and mostly still do after samples were added. The validation samples do not depend
    on `test_fraction`. A class keeps at least one sample to train on; if it has two, it gives at least one to
    validation, and if it has three, at least one to the test.

    Args:
        source: Data set.
        val_fraction: Fraction for validation, above 0 and below 1.
        test_fraction: Fraction for the test.
        seed: Seed of the choice.
        ident: Id of a sample, by default its name. It should not depend on where the data are stored.
        what: Name of the data for the error message.
        fix: Advice for the error message.

    Raises:
        ValueError: A fraction is out of range, or no class has two samples.
    """
    check_fractions(val_fraction, test_fraction)
    ident = ident or source.name
    part = np.zeros(len(source), dtype=np.int8)  # 0 train, 1 validation, 2 test
    for label, own in _members(source).items():
        order = _hashed(own, lambda i, label=label: key(seed, "split", source.classes[label], ident(i)))  # type: ignore[misc]
        held = max(min(1, len(own) - 1), min(round(val_fraction * len(own)), len(own) - 1))
        rest = len(own) - held - 1
        tested = max(min(1, rest), min(round(test_fraction * len(own)), rest)) if test_fraction else 0
        part[order[:held]] = 1
        part[order[held : held + tested]] = 2
    if not (part == 1).any():
        raise ValueError(
            problem(
                f"{what} has one sample{' per class' * (len(source.classes) > 1)}, which leaves none for validation",
                allowed="two or more in at least one class",
                fix=fix,
            )
        )
    test = Subset(source, np.flatnonzero(part == 2)) if (part == 2).any() else None
    return Subset(source, np.flatnonzero(part == 0)), Subset(source, np.flatnonzero(part == 1)), test


def take_out(
    source: Source, *, fraction: float, seed: int, ident: Callable[[int], str] | None = None
) -> tuple[Subset, Subset]:
    """Return a source without `fraction` of each class, rounded to the nearest integer, and that fraction.

    The samples are chosen by a hash as in `hash_split`. A class of two samples or more gives one, and keeps one.
    """
    ident = ident or source.name
    out = np.zeros(len(source), dtype=bool)
    for label, own in _members(source).items():
        order = _hashed(own, lambda i, label=label: key(seed, "test", source.classes[label], ident(i)))  # type: ignore[misc]
        out[order[: max(min(1, len(own) - 1), min(round(fraction * len(own)), len(own) - 1))]] = True
    return Subset(source, np.flatnonzero(~out)), Subset(source, np.flatnonzero(out))


def in_folds(split: Split, *, fold: int, count: int, seed: int) -> Split:
    """Return a split whose validation part is one of `count` folds of all its images except the test part.

    Each image is in exactly one fold. The folds differ in size by at most one image, and so do their parts of each
    class. They are chosen by a hash of (seed, class, name without the folder that all names share), so they do not
    depend on the fold, nor on where the data are stored.

    Args:
        split: Training, validation and possibly test part; the last one stays.
        fold: Which fold validates, from 1.
        count: Number of folds, 2 or more.
        seed: Seed of the choice.

    Raises:
        ValueError: There are fewer images than folds, a class has one image, or the source has an order of its own.
    """
    pool = Joined([split.train, split.val])
    if as_streamed(split.train) is not None:
        raise ValueError(
            problem(
                "folds of data that are read in their own order",
                allowed="images that can be read in any order",
            )
        )
    if not split.held_out:
        raise ValueError(problem("folds of data without a validation part", fix="--input.val_fraction 0.1"))
    names = [pool.name(i).replace(os.sep, "/") for i in range(len(pool))]
    shared = len(shared_folder(names))
    part = np.zeros(len(pool), dtype=np.int64)
    given = 0  # images dealt so far: the next class goes on with the next fold
    for label, own in sorted(_members(pool).items()):
        if len(own) < 2:
            raise ValueError(
                problem(
                    f"the class {pool.classes[label]!r} has one image outside the test part, which cannot be both "
                    "trained on and left out",
                    allowed="two or more in each class",
                    fix="add images of the class, or remove it",
                )
            )
        order = _hashed(own, lambda i, label=label: key(seed, "fold", pool.classes[label], names[i][shared:]))  # type: ignore[misc]
        part[order] = (given + np.arange(len(own))) % count
        given += len(own)
    if len(pool) < count:
        raise ValueError(problem(f"{count} folds of {len(pool)} images", allowed=f"2 to {len(pool)} folds"))
    train, val = (
        Subset(pool, np.flatnonzero(part != fold - 1)),
        Subset(pool, np.flatnonzero(part == fold - 1)),
    )
    counts = f"validates: {len(val)}, and the others train: {len(train)}"
    note = f"of the images outside the test part, fold {fold} of {count} {counts}"
    return replace(split, train=train, val=val, notes=(*split.notes, note))


def shared_folder(names: Sequence[str]) -> str:
    """Return the folder, with its separator, that all names share; "" for fewer than two names.

    >>> shared_folder(["data/photos/cat/1.jpg", "data/photos/dog/1.jpg"])
    'data/photos/'
    """
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, length) + 1]


def _members(source: Source) -> dict[int, list[int]]:
    """Return the indices of the samples of each class."""
    members: dict[int, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.label(index), []).append(index)
    return members


def _hashed(own: Sequence[int], hash_of: Callable[[int], int]) -> list[int]:
    """Return indices in the order of their hashes."""
    return sorted(own, key=lambda i: (hash_of(i), i))


def make_split(
    what: str,
    train: Source,
    val: Source | None,
    *,
    test: Source | None = None,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    ident: Callable[[int], str] | None = None,
    image_size: int | None = None,
    fix: str = "add samples, or name validation data with ,val=...",
) -> Split:
    """Return the split of parts; those that are missing are divided off `train` by hash. `what` names the data.

    With `val_fraction` 0 all images are trained on, and a tenth of them is scored.
    """
    notes = []
    everything = val is None and val_fraction == 0
    if test is None and test_fraction and (val is not None or everything):
        train, test = take_out(train, fraction=test_fraction, seed=seed, ident=ident)
        each = " of each class" * (len(train.classes) > 1)
        notes = [f"the test part is {100 * test_fraction:g} %{each} of the training data"]
    if everything:
        val = Subset(train, spread_indices(len(train), max(1, len(train) // 10)))
        how = NOT_HELD_OUT
    elif val is None:
        fraction = test_fraction if test is None else 0.0
        train, val, own = hash_split(
            train,
            val_fraction=val_fraction,
            test_fraction=fraction,
            seed=seed,
            ident=ident,
            what=what,
            fix=fix,
        )
        test = test or own
        also = f", and the test part another {100 * fraction:g} %" if own is not None else ""
        how = f"validation is {100 * val_fraction:g} % of each class{also}, the same in every run with this seed"
    else:
        how = "validation is the part named for it"
    counted = summary(what, train, None if everything else val, test)
    total = len(train) + len(val) + (len(test) if test is not None else 0)
    return Split(
        train=train,
        val=val,
        test=test,
        classes=tuple(train.classes),
        image_size=image_size,
        notes=(counted, how, *notes, *audit_notes(total)),
        files=total <= AUDIT_LIMIT,
        held_out=not everything,
    )


def halve_validation(split: Split, *, seed: int) -> Split:
    """Return a split whose validation part gave half of each class to the test part, for data with fixed parts.

    With too few validation images for two parts, the split is unchanged.
    """
    val, test = take_out(split.val, fraction=0.5, seed=seed)
    if not len(val) or not len(test):
        note = f"{len(split.val)} validation images are too few for a test part"
        return replace(split, notes=(*split.notes, note))
    note = f"of the validation images, {len(test)} are the test part"
    return replace(split, val=val, test=test, notes=(*split.notes, note))


def summary(what: str, train: Source, val: Source | None, test: Source | None = None) -> str:
    """Return the note that counts the images of a split."""
    counts = [f"{number_of(len(train), 'image')} to train on"]
    counts += [
        f"{len(part)} to {use}" for part, use in ((val, "validate"), (test, "test")) if part is not None
    ]
    return f"{what}: {', '.join(counts)}, {number_of(len(train.classes), 'class')}"


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
