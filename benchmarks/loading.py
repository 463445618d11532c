"""JPEG bytes to training crops on one core: `python benchmarks/loading.py [--rounds N]`. Writes results/loading.*.

128 crops of 500 x 375 pixels from scikit-image's photographs, quality 92, in memory -> decode -> random resized crop to
224, flip -> uint8 tensor, 3 S S. Every arm makes the same crops of the same pictures (the gate compares them).

Needs scikit-image and kornia-rs.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from harness import Arm, Comparison, Timing, compare, table, write
from kornia_rs import io as kornia_io
from PIL import Image
from skimage import data as samples
from torch import Tensor
from torchvision.transforms import v2

from normfree.data import jpeg
from normfree.data.augment import train_transform
from normfree.data.crops import resize
from normfree.data.images import load_image

COUNT, WIDTH, HEIGHT, SIZE, QUALITY = 128, 500, 375, 224, 92  # as the published loader tables have it
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "retina",
    "hubble_deep_field",
    "immunohistochemistry",
)
TOLERANCE = (
    2e-3  # relative L2; bicubic passes round at other places, a resize without antialiasing is far above
)


def jpegs() -> list[bytes]:
    """The pictures, encoded; small ones are enlarged until the crop fits."""
    rng, made = np.random.default_rng(0), []
    photographs = [Image.fromarray(getattr(samples, name)()[..., :3]) for name in PHOTOGRAPHS]
    for i in range(COUNT):
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


def pillow_v2(word: str) -> Callable[[Image.Image], Tensor]:
    """torchvision's transforms on Pillow pictures: what most training scripts run."""
    mode = v2.InterpolationMode(word)
    return v2.Compose(
        [v2.RandomResizedCrop(SIZE, interpolation=mode), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def tensor_v2(word: str) -> Callable[[np.ndarray], Tensor]:
    """The same on tensors."""
    mode = v2.InterpolationMode(word)
    steps = v2.Compose(
        [v2.RandomResizedCrop(SIZE, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    )
    return lambda pixels: steps(torch.from_numpy(pixels).permute(2, 0, 1)).contiguous()


def places() -> list[tuple[int, int, int, int, bool]]:
    """The crops and flips that the other arms draw."""
    crop, probe = v2.RandomResizedCrop(SIZE), torch.empty(1).expand(3, HEIGHT, WIDTH)
    torch.manual_seed(0)
    drawn = []
    for _ in range(COUNT):
        p = crop.make_params([probe])
        drawn.append((p["top"], p["left"], p["height"], p["width"], bool(torch.rand(1) < 0.5)))
    return drawn


def decode(data: bytes) -> np.ndarray:
    """simplejpeg's plain call, without header check, limits and orientation."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return pixels


def gated(crops: Tensor) -> Tensor:
    """What the gate compares: some of the crops, as turning all into floats would take its own time."""
    return crops[:: COUNT // 16].float()


def suite(*, rounds: int) -> list[Comparison]:
    """One comparison per filter, Pillow and torchvision as the baseline."""
    pictures, known = jpegs(), places()
    results = []
    for word in ("bicubic", "bilinear"):
        pil, tensor, ours = (
            pillow_v2(word),
            tensor_v2(word),
            train_transform(image_size=SIZE, interpolation=word),
        )

        def each(one: Callable[[bytes], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                torch.manual_seed(0)
                return gated(torch.stack([one(data) for data in pictures]))

            return run

        def bare(word: str = word) -> Tensor:
            made = []
            for data, (top, left, tall, wide, flip) in zip(pictures, known, strict=True):
                scaled = resize(
                    decode(data)[top : top + tall, left : left + wide], SIZE, SIZE, interpolation=word
                )
                made.append((scaled.flip(-1) if flip else scaled).contiguous())
            return gated(torch.stack(made))

        arms = [
            Arm("Pillow + torchvision", each(lambda data, f=pil: f(load_image(data)))),
            Arm(
                "simplejpeg + torchvision on Pillow",
                each(lambda data, f=pil: f(Image.fromarray(decode(data)))),
            ),
            Arm("simplejpeg + torchvision on tensors", each(lambda data, f=tensor: f(decode(data)))),
            Arm("kornia-rs decode + torch resize", each(lambda data, f=ours: f(kornia_decode(data)))),
            Arm("normfree without simplejpeg", each(lambda data, f=ours: f(load_image(data)))),
            Arm("normfree", each(lambda data, f=ours: f(jpeg.load_array(data)))),
            Arm("simplejpeg + torch resize, nothing checked or drawn", bare),
        ]
        results.append(compare(word, arms, rounds=rounds, tolerance=TOLERANCE))
    return results


def kornia_decode(data: bytes) -> np.ndarray:
    """kornia-rs' libjpeg-turbo."""
    return np.asarray(kornia_io.decode_image_jpegturbo(data, "rgb"))


def rate(timing: Timing) -> str:
    """Images per second, as the table has it."""
    slow, fast = (COUNT / (1e-3 * ms) for ms in reversed(timing.quartiles_ms))
    return f"{COUNT / (1e-3 * timing.median_ms):.0f} ({slow:.0f} … {fast:.0f})"


def main() -> None:
    """Measures on one core, writes, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    words = parser.parse_args()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    comparisons = suite(rounds=words.rounds)
    what = f"JPEG bytes of {WIDTH} × {HEIGHT} pixels, quality {QUALITY} -> random resized crop to {SIZE}, flip -> uint8"
    about = f"{what}; {COUNT} pictures per pass, one core, wall time."
    rows = table(comparisons, columns=("filter", "loader", "images/s (quartiles)"), figure=rate)
    print(write("loading", comparisons, about=about, rows=rows).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
