"""JPEG files made from scikit-image's photographs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from skimage import data as samples

COUNT, WIDTH, HEIGHT, SIZE, QUALITY = 128, 500, 375, 224, 92  # as in the published tables of loaders
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
)


def jpegs(count: int = COUNT) -> list[bytes]:
    """Return encoded images; small photographs are enlarged until the crop fits."""
    rng, made = np.random.default_rng(0), []
    photographs = [Image.fromarray(getattr(samples, name)()[..., :3]) for name in PHOTOGRAPHS]
    for i in range(count):
        image = photographs[i % len(photographs)]
        scale = max(1.0, WIDTH / image.width, HEIGHT / image.height)
        image = image.resize(
            (max(WIDTH, round(image.width * scale)), max(HEIGHT, round(image.height * scale)))
        )
        left, top = (int(rng.integers(0, n + 1)) for n in (image.width - WIDTH, image.height - HEIGHT))
        buffer = io.BytesIO()
        image.crop((left, top, left + WIDTH, top + HEIGHT)).save(buffer, "JPEG", quality=QUALITY)
        made.append(buffer.getvalue())
    return made
