"""A baseline for the demo's accuracy: the class of the nearest training image, compared pixel by pixel.

    python -m experiments.pixel_neighbor

Images are reduced to a few pixels a side by averaging, and compared by Euclidean distance. The size is chosen on the
training images alone, each of which is classified by the others. Writes experiments/results/pixel_neighbor.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from normfree import open_source
from normfree.data.source import Source
from normfree.training.recipes import demo

SIZES = (4, 6, 8, 12, 16, 24)
RESULT = Path(__file__).parent / "results" / "pixel_neighbor.md"


def pixels(source: Source, size: int) -> Tensor:
    """Return the images of a source at size x size, flattened: N 3·size² in [0, 1]."""
    arrays = []
    for i in range(len(source)):
        image = source.image(i).convert("RGB").resize((size, size), Image.Resampling.BOX)
        arrays.append(np.asarray(image, np.float32).reshape(-1) / 255)
    return torch.from_numpy(np.stack(arrays))


def nearest(queries: Tensor, references: Tensor, *, skip_same: bool = False) -> Tensor:
    """Return the index of the nearest of `references` R D for each of `queries` Q D.

    `skip_same`: both are the same images, and an image is not its own neighbor.
    """
    distances = torch.cdist(queries.double(), references.double())
    if skip_same:
        distances.fill_diagonal_(float("inf"))
    return distances.argmin(dim=1)


def main() -> None:
    """Classify the demo's test images and write the page."""
    split = open_source("emoji", test_fraction=demo().input.test_fraction)
    train, test = (
        torch.tensor([source.label(i) for i in range(len(source))]) for source in (split.train, split.test)
    )
    chosen = {}
    for size in SIZES:
        x = pixels(split.train, size)
        chosen[size] = 100 * float((train[nearest(x, x, skip_same=True)] == train).float().mean())
    size = max(chosen, key=chosen.__getitem__)
    found = nearest(pixels(split.test, size), pixels(split.train, size))
    top1 = 100 * float((train[found] == test).float().mean())
    table = ", ".join(f"{s} px {score:.1f}" for s, score in chosen.items())
    RESULT.write_text(
        "# The nearest training image, by pixels\n\n`python -m experiments.pixel_neighbor`: "
        f"{len(train)} training emoji, {len(test)} test emoji, nine groups.\n\n"
        f"Top-1 {top1:.1f} % at {size} px, the size with the best accuracy of the training images among each other "
        f"(in percent: {table}).\n",
        encoding="utf-8",
    )
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
