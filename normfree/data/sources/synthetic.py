"""Pictures drawn by a formula: a data set that needs no files, for tests, timing and first steps."""

from __future__ import annotations

from difflib import get_close_matches

import numpy as np

from normfree.data.seeds import key
from normfree.data.source import ArraySource, Split

# Shapes that stay themselves when mirrored left to right, as training flips do. Inside is where the formula
# holds, with u to the right and v down, in units of the shape's radius.
SHAPES = ("disk", "ring", "square", "frame", "diamond", "triangle", "plus", "saltire", "bar", "pillar")
DEFAULTS = {"classes": 10, "size": 32, "train": 2000, "val": 500}
_LIMITS = {"classes": (2, len(SHAPES)), "size": (8, 1024), "train": (2, 10**6), "val": (2, 10**6)}


def open_synthetic(text: str) -> Split:
    """The split that "synthetic" or, for instance, "synthetic:classes=4,size=32,train=256,val=64" describes.

    One shape per class, in random place, size, colours and noise; labels take turns, so classes are even.
    Picture i is a function of (part, i) alone, whatever the seed of a run. Raises `ValueError` for unknown
    words.
    """
    options = _parse(text)
    classes = SHAPES[: options["classes"]]

    def part(name: str) -> ArraySource:
        labels = [i % len(classes) for i in range(options[name])]
        rngs = (np.random.default_rng(key("synthetic", name, i)) for i in range(len(labels)))
        images = [
            _draw(classes[label], options["size"], rng) for label, rng in zip(labels, rngs, strict=True)
        ]
        names = [f"synthetic/{name}/{i}" for i in range(len(labels))]
        return ArraySource(np.stack(images), labels, classes=classes, names=names)

    return Split(
        train=part("train"),
        val=part("val"),
        classes=classes,
        image_size=options["size"],
        notes=(f"synthetic: {options['train']} drawn shapes to train on, {options['val']} to validate",),
    )


def _draw(shape: str, size: int, rng: np.random.Generator) -> np.ndarray:
    radius = rng.uniform(0.25, 0.4)  # of the side; the centre keeps most of the shape inside the picture
    centre_u, centre_v = rng.uniform(0.35, 0.65, size=2)
    grid = (np.arange(size) + 0.5) / size
    u, v = ((grid - centre_u) / radius)[None, :], ((grid - centre_v) / radius)[:, None]
    background = rng.uniform(0, 255, size=3)
    ink = (background + rng.uniform(80, 175, size=3)) % 255  # differs visibly in every channel
    picture = np.where(_inside(shape, u, v)[..., None], ink, background) + rng.normal(
        0, 12, size=(size, size, 3)
    )
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius, box, city = np.hypot(u, v), np.maximum(abs(u), abs(v)), abs(u) + abs(v)
    masks: dict[str, np.ndarray] = {
        "disk": radius < 0.9,
        "ring": (radius > 0.55) & (radius < 1),
        "square": box < 0.85,
        "frame": (box > 0.5) & (box < 0.9),
        "diamond": city < 1.1,
        "triangle": (v < 0.8) & (v > 2 * abs(u) - 1),
        "plus": (box < 1) & ((abs(u) < 0.25) | (abs(v) < 0.25)),
        "saltire": (box < 1) & (abs(abs(u) - abs(v)) < 0.35),
        "bar": (abs(v) < 0.3) & (abs(u) < 1.1),
        "pillar": (abs(u) < 0.3) & (abs(v) < 1.1),
    }
    return masks[shape]


def _parse(text: str) -> dict[str, int]:
    options = dict(DEFAULTS)
    pairs = text.partition(":")[2]
    for pair in pairs.split(",") if pairs else []:
        word, _, value = pair.partition("=")
        if word not in options:
            nearest = (get_close_matches(word, options, n=1, cutoff=0.0) or ["size"])[0]
            raise ValueError(
                f"{text!r} names {word!r}. Allowed: {', '.join(options)}, each as word=number with commas between. "
                f"Fix: {nearest}={DEFAULTS[nearest]}"
            )
        least, most = _LIMITS[word]
        if not value.isdecimal() or not least <= int(value) <= most:
            raise ValueError(
                f"{text!r} gives {word}={value}. Allowed: a whole number from {least} to {most}. "
                f"Fix: {word}={DEFAULTS[word]}"
            )
        options[word] = int(value)
    return options
