"""JPEG bytes to training crops on one core, from scikit-image's photographs."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import simplejpeg
import torch
from kornia_rs import io as kornia_io
from PIL import Image
from skimage import data as samples
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.summary import Comparison
from normfree.data.transforms import jpeg
from normfree.data.transforms.decode import load_image
from normfree.data.transforms.train import resize, train_transform

ABOUT = (
    "JPEG bytes of 500 × 375 pixels, quality 92, in memory -> decode -> random resized crop to 224, flip -> uint8 "
    "tensor 3 S S; 128 pictures a pass, one core, wall time. All loaders make the same crops of the same "
    "pictures, and the gate compares sixteen of them; bicubic passes round at other places, a resize without "
    "antialiasing would be far above what it allows."
)
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
TOLERANCE = 2e-3  # relative L2


def jpegs(count: int = COUNT) -> list[bytes]:
    """The pictures, encoded; small ones are enlarged until the crop fits."""
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


def places(count: int) -> list[tuple[int, int, int, int, bool]]:
    """The crops and flips that the other arms draw."""
    crop, probe = v2.RandomResizedCrop(SIZE), torch.empty(1).expand(3, HEIGHT, WIDTH)
    torch.manual_seed(0)
    drawn = []
    for _ in range(count):
        p = crop.make_params([probe])
        drawn.append((p["top"], p["left"], p["height"], p["width"], bool(torch.rand(1) < 0.5)))
    return drawn


def decode(data: bytes) -> np.ndarray:
    """simplejpeg's plain call, without header check, limits and orientation."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return pixels


def gated(crops: Tensor) -> Tensor:
    """What the gate compares: some of the crops, as turning all into floats would take its own time."""
    return crops[:: max(1, len(crops) // 16)].float()


def cases(device: torch.device) -> list[Case]:
    """One per filter."""
    return [case(word) for word in ("bicubic", "bilinear")]


def case(word: str, count: int = COUNT) -> Case:
    """`count` pictures a pass through each loader with the filter called `word`."""
    return Case(word, (word,), partial(measure, word, count))


def measure(word: str, count: int, bench: Bench) -> list[Comparison]:
    """Pillow and torchvision are the baseline."""
    # one pass streams through more than a cache holds, so that it needs no warm one
    timed = replace(bench, window_s=0.0)
    return compare(timed, word, arms(word, jpegs(count)), tolerance=TOLERANCE)


def arms(word: str, pictures: list[bytes]) -> list[Arm]:
    """All loaders, which make the same crops of the same pictures."""
    pil, tensor = pillow_v2(word), tensor_v2(word)
    ours = train_transform(image_size=SIZE, interpolation=word)
    known = places(len(pictures))

    def arm(name: str, one: Callable[[bytes], Tensor]) -> Arm:
        def run() -> Tensor:
            torch.manual_seed(0)
            return gated(torch.stack([one(data) for data in pictures]))

        return Arm(name, run, images=len(pictures))

    def bare() -> Tensor:
        made = [cut(data, place, word) for data, place in zip(pictures, known, strict=True)]
        return gated(torch.stack(made))

    return [
        arm("Pillow + torchvision", lambda data: pil(load_image(data))),
        arm("simplejpeg + torchvision on Pillow", lambda data: pil(Image.fromarray(decode(data)))),
        arm("simplejpeg + torchvision on tensors", lambda data: tensor(decode(data))),
        arm("kornia-rs decode + torch resize", lambda data: ours(kornia_decode(data))),
        arm("normfree without simplejpeg", lambda data: ours(load_image(data))),
        arm("normfree", lambda data: ours(jpeg.load_array(data))),
        Arm("simplejpeg + torch resize, nothing checked or drawn", bare, images=len(pictures)),
    ]


def cut(data: bytes, place: tuple[int, int, int, int, bool], word: str) -> Tensor:
    """One crop at a known place, by the shortest way."""
    top, left, tall, wide, flip = place
    scaled = resize(decode(data)[top : top + tall, left : left + wide], SIZE, SIZE, interpolation=word)
    return (scaled.flip(-1) if flip else scaled).contiguous()


def kornia_decode(data: bytes) -> np.ndarray:
    """kornia-rs' libjpeg-turbo."""
    return np.asarray(kornia_io.decode_image_jpegturbo(data, "rgb"))
