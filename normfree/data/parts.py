"""What the sources have in common: a part of a source, a validation part by hash, and the grammar of a data word."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from normfree.data.images import load_image
from normfree.data.jpeg import load_array
from normfree.data.protocol import Source, Split
from normfree.data.seeds import key

if TYPE_CHECKING:
    from PIL.Image import Image

# Above this many pictures nothing is opened before training: at about 400 decodes per second and core, an audit of
# ImageNet would take most of an hour.
AUDIT_LIMIT = 200_000
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


class PartSource:
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
) -> tuple[PartSource, PartSource]:
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
    return PartSource(source, np.flatnonzero(~mask)), PartSource(source, np.flatnonzero(mask))


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


def parse_word(text: str, *, allowed: Sequence[str], named: bool = False) -> tuple[str, dict[str, str]]:
    """ "SCHEME:TARGET,option=value,..." -> (TARGET, options). Commas that no `option=` follows belong to TARGET.

    With `named`, SCHEME says what is meant and options follow it: "SCHEME" or "SCHEME:option=value,...". Raises
    `ValueError` for an empty target, for an option that is not in `allowed`, and for one given twice or without value.
    """
    scheme, colon, rest = text.partition(":")
    target, *parts = re.split(r",(?=\w+=)", rest)
    form = ", ".join(f"{word}=..." for word in allowed)
    if named:
        target, parts = "", [target, *parts] if colon else []
    elif not target:
        raise ValueError(f"{text!r} names nothing. Allowed: {scheme}:PATH, then {form}. Fix: add the path")
    options: dict[str, str] = {}
    for part in parts:
        word, _, value = part.partition("=")
        if word not in allowed or word in options or not value:
            near = get_close_matches(word, allowed, n=1, cutoff=0.0)[0]
            wrong = "an unknown" if word not in allowed else "a second" if word in options else "an empty"
            raise ValueError(f"{text!r} has {wrong} {word!r}. Allowed: {form}. Did you mean {near + '='!r}?")
        options[word] = value
    return target, options


def is_yes(options: Mapping[str, str], word: str, default: bool = False) -> bool:
    """What `word`=yes or `word`=no says among the options of a data word; `default` where it is not said."""
    said = options.get(word)
    if said not in (None, "yes", "no"):
        fix = "yes" if str(said).lower() in ("true", "1", "on", "y") else "no"
        raise ValueError(f"{word}={said}. Allowed: yes or no. Fix: {word}={fix}")
    return default if said is None else said == "yes"


def number_classes(count: int) -> tuple[str, ...]:
    """Names for classes that have only numbers: "0", "1", ..."""
    return tuple(str(i) for i in range(count))
