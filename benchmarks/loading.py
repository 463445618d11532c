"""JPEG bytes to training crops on one core, from scikit-image's photographs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import simplejpeg
import torch
from kornia_rs import io as kornia_io
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.photographs import COUNT, HEIGHT, SIZE, WIDTH, jpegs
from benchmarks.summary import Comparison
from normfree.data.transforms import jpeg
from normfree.data.transforms.decode import load_image
from normfree.data.transforms.train import resize, train_transform

ABOUT = (
    "JPEG bytes of 500 × 375 pixels, quality 92, in memory -> decode -> random resized crop to 224, flip -> uint8 "
    "tensor 3 S S; 128 images per pass, one core, wall time. All loaders make the same crops of the same images, "
    "and the gate compares sixteen of them. Its tolerance allows for bicubic passes that round at other points; a "
    "resize without antialiasing would exceed it by far."
)
TOLERANCE = 2e-3  # relative L2


def pillow_v2(interpolation: str) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's transforms on Pillow images, as in most training scripts."""
    mode = v2.InterpolationMode(interpolation)
    return v2.Compose(
        [v2.RandomResizedCrop(SIZE, interpolation=mode), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def tensor_v2(interpolation: str) -> Callable[[np.ndarray], Tensor]:
    """Return the same transforms on tensors."""
    mode = v2.InterpolationMode(interpolation)
    steps = v2.Compose(
        [v2.RandomResizedCrop(SIZE, interpolation=mode, antialias=True), v2.RandomHorizontalFlip()]
    )
    return lambda pixels: steps(torch.from_numpy(pixels).permute(2, 0, 1)).contiguous()


def draw_boxes(count: int) -> list[tuple[int, int, int, int, bool]]:
    """Return the crops (top, left, height, width) and flips that the other arms draw."""
    crop, probe = v2.RandomResizedCrop(SIZE), torch.empty(1).expand(3, HEIGHT, WIDTH)
    torch.manual_seed(0)
    drawn = []
    for _ in range(count):
        p = crop.make_params([probe])
        drawn.append((p["top"], p["left"], p["height"], p["width"], bool(torch.rand(1) < 0.5)))
    return drawn


def decode(data: bytes) -> np.ndarray:
    """Call simplejpeg without checks of header, limits and orientation."""
    pixels: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB")
    return pixels


def gated(crops: Tensor) -> Tensor:
    """Return the crops that the gate compares: only some, since converting all to float would take time."""
    return crops[:: max(1, len(crops) // 16)].float()


def cases(device: torch.device) -> list[Case]:
    """Return a case per filter."""
    return [case(name) for name in ("bicubic", "bilinear")]


def case(interpolation: str, count: int = COUNT) -> Case:
    """Return the case of one filter, with `count` images per pass through each loader."""
    return Case(interpolation, (interpolation,), partial(measure, interpolation, count))


def measure(interpolation: str, count: int, bench: Bench) -> list[Comparison]:
    """Compare all loaders; Pillow with torchvision is the baseline."""
    # One pass reads more than fits into a cache, so it needs no warm-up.
    timed = replace(bench, window_s=0.0)
    return compare(timed, interpolation, arms(interpolation, jpegs(count)), tolerance=TOLERANCE)


def arms(interpolation: str, images: list[bytes]) -> list[Arm]:
    """Return all loaders; they make the same crops of the same images."""
    pil, tensor = pillow_v2(interpolation), tensor_v2(interpolation)
    ours = train_transform(image_size=SIZE, interpolation=interpolation)
    boxes = draw_boxes(len(images))

    def arm(name: str, one: Callable[[bytes], Tensor]) -> Arm:
        def run() -> Tensor:
            torch.manual_seed(0)
            return gated(torch.stack([one(data) for data in images]))

        return Arm(name, run, images=len(images))

    def bare() -> Tensor:
        made = [cut(data, box, interpolation) for data, box in zip(images, boxes, strict=True)]
        return gated(torch.stack(made))

    return [
        arm("Pillow + torchvision", lambda data: pil(load_image(data))),
        arm("simplejpeg + torchvision on Pillow", lambda data: pil(Image.fromarray(decode(data)))),
        arm("simplejpeg + torchvision on tensors", lambda data: tensor(decode(data))),
        arm("kornia-rs decode + torch resize", lambda data: ours(kornia_decode(data))),
        arm("normfree without simplejpeg", lambda data: ours(load_image(data))),
        arm("normfree", lambda data: ours(jpeg.load_array(data))),
        Arm("simplejpeg + torch resize, nothing checked or drawn", bare, images=len(images)),
    ]


def cut(data: bytes, box: tuple[int, int, int, int, bool], interpolation: str) -> Tensor:
    """Decode and resize one given crop, with the fewest operations."""
    top, left, tall, wide, flip = box
    scaled = resize(
        decode(data)[top : top + tall, left : left + wide], SIZE, SIZE, interpolation=interpolation
    )
    return (scaled.flip(-1) if flip else scaled).contiguous()


def kornia_decode(data: bytes) -> np.ndarray:
    """Decode with the libjpeg-turbo of kornia-rs."""
    return np.asarray(kornia_io.decode_image_jpegturbo(data, "rgb"))
