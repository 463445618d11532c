"""Images drawn by formulas: a data set without files, for tests, timing and first steps."""

from __future__ import annotations

import numpy as np

from normfree.data.seeds import key
from normfree.data.source import ArraySource, Split
from normfree.suggest import closest, problem

# Shapes that are unchanged by the left-right flips of training. `_inside` has their formulas.
SHAPES = ("disk", "ring", "square", "frame", "diamond", "triangle", "plus", "saltire", "bar", "pillar")
DEFAULTS = {"classes": 10, "size": 32, "train": 2000, "val": 500}
_BYTES = 4_000_000_000  # of all images, which are kept in memory: 1.3 million of 32 x 32
_LIMITS = {"classes": (2, len(SHAPES)), "size": (8, 1024), "train": (2, 10**6), "val": (2, 10**6)}


def open_synthetic(text: str) -> Split:
    """Return the split for "synthetic" or, for instance, "synthetic:classes=4,size=32,train=256,val=64".

    Each class is a shape, drawn with random position, size, colors and noise. Labels alternate, so classes have equal
    sizes. Image i is a function of (part, i) only, for any seed of a run.

    Raises:
        ValueError: An option is unknown or out of range, or the images would take too much memory.
    """
    options = options_of(text)
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
    """Draw one image, uint8 `size` `size` 3."""
    # As fractions of the side; the range of the center keeps most of the shape inside the image.
    radius = rng.uniform(0.25, 0.4)
    center_u, center_v = rng.uniform(0.35, 0.65, size=2)
    grid = (np.arange(size) + 0.5) / size
    u, v = ((grid - center_u) / radius)[None, :], ((grid - center_v) / radius)[:, None]
    background = rng.uniform(0, 255, size=3)
    ink = (background + rng.uniform(80, 175, size=3)) % 255  # differs visibly in every channel
    image = np.where(_inside(shape, u, v)[..., None], ink, background) + rng.normal(
        0, 12, size=(size, size, 3)
    )
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the mask of a shape: u points right and v down, in units of the shape's radius."""
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


def options_of(text: str) -> dict[str, int]:
    """Return the options in a text such as "synthetic:classes=4", and the defaults of the others.

    Raises:
        ValueError: An option is unknown or out of range, or the images would take more than `_BYTES`.
    """
    options = dict(DEFAULTS)
    pairs = text.partition(":")[2]
    for pair in pairs.split(",") if pairs else []:
        option, _, value = pair.partition("=")
        if option not in options:
            nearest = closest(option, options) or "size"
            raise ValueError(
                problem(
                    f"{text!r} has an unknown option {option!r}",
                    allowed=f"{', '.join(options)}, each as option=number, separated by commas",
                    fix=f"{nearest}={DEFAULTS[nearest]}",
                )
            )
        least, most = _LIMITS[option]
        if not value.isdecimal() or len(value) > 9 or not least <= int(value) <= most:
            raise ValueError(
                problem(
                    f"{text!r} gives {option}={value}",
                    allowed=f"a whole number from {least} to {most}",
                    fix=f"{option}={DEFAULTS[option]}",
                )
            )
        options[option] = int(value)
    needed = 3 * options["size"] ** 2 * (options["train"] + options["val"])
    if needed > _BYTES:
        given = f"{text!r} draws images of {needed:,} bytes"
        raise ValueError(problem(given, allowed=f"at most {_BYTES:,}", fix="fewer or smaller images"))
    return options
