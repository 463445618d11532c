"""A network with its preprocessing inside: one RGB image of bytes, of any size, to probabilities.

Pillow resizes by weighted sums along each axis and rounds to bytes after each axis. Here, the weights of an axis are
a matrix, computed in the graph from the size of the image. So an exported file needs no operator for resizing and gives
the same pixels in every runtime. Source: `precompute_coeffs` and `ImagingResample` of Pillow's Resample.c.

Shapes: H height, W width of the image; S side of the network's input; K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from normfree.data.transforms.evaluate import BAR, CROP_PADDING
from normfree.data.transforms.normalize import normalize
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel
from normfree.suggest import problem

# Keys' cubic of Pillow and TensorFlow; PyTorch uses -0.75.
_A = -0.5
# Pillow's weights for bytes are fixed-point numbers with this many bits after the point.
_BITS = 22


class PreprocessedNet(nn.Module):
    """A module that maps an image, uint8 H W 3 with H and W above 1, to probabilities K.

    It computes what `predict` computes for an upright RGB image: resize and crop as `Preprocessing.transform`,
    normalization, the network and its probabilities. With antialiasing, columns are resized after lines are, each
    rounded to bytes. Pillow 13 resizes some images, mostly tall ones, in the other order; then about a quarter of the
    pixels differ by one level of 255.

    Args:
        net: normalized images B 3 S S -> logits B K.
        preprocessing: the preprocessing of the network.
        probabilities: logits B K -> probabilities B K.

    Raises:
        ValueError: the interpolation is "nearest".
    """

    def __init__(
        self, net: nn.Module, preprocessing: Preprocessing, probabilities: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        if preprocessing.interpolation == "nearest":
            raise ValueError(
                problem("preprocessing has interpolation='nearest'", allowed="bicubic and bilinear",
                        fix="export without preprocessing")
            )  # fmt: skip
        self.net, self.preprocessing, self.probabilities = net, preprocessing, probabilities

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities of the classes."""
        pre = self.preprocessing
        images = normalize(self.pixels(image)[None], mean=pre.mean, std=pre.std)
        return self.probabilities(self.net(images))[0]

    def pixels(self, image: Tensor) -> Tensor:
        """Return the resized and cropped image, 3 S S, values from 0 to 255; without antialiasing they overshoot."""
        pre = self.preprocessing
        vertical, horizontal = _axes(image, pre)
        x = image.permute(2, 0, 1).float()
        x = x @ _weights(image.shape[1], horizontal, pre).T
        if pre.antialias:
            x = _bytes(x)
        x = _weights(image.shape[0], vertical, pre) @ x
        if pre.crop == "letterbox":
            x = torch.where(vertical.covered()[:, None] & horizontal.covered(), x, float(BAR[0]))
        return _bytes(x) if pre.antialias else x


class _Axis(NamedTuple):
    """Resampling of one axis: output i is centered at start + (i + 1/2)·step and reads inputs from low to high - 1.

    `size` is the number of outputs. Those before `first`, and from `first + filled` on, are bars.
    """

    size: int
    start: Tensor
    step: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    filled: Tensor

    def covered(self) -> Tensor:
        """Return True for each output that the image covers."""
        outputs = torch.arange(self.size, dtype=torch.float64, device=self.start.device)
        return (outputs >= self.first) & (outputs < self.first + self.filled)


def _axes(image: Tensor, pre: Preprocessing) -> list[_Axis]:
    """Return the vertical and the horizontal resampling of an image, as `EvalTransform` crops it."""
    _, *sizes = pre.shape
    lengths = [
        torch.scalar_tensor(image.shape[axis], dtype=torch.float64, device=image.device) for axis in (0, 1)
    ]
    both = list(zip(sizes, lengths, strict=True))
    zero = torch.zeros_like(lengths[0])
    whole = [(zero, length, zero, zero + size) for size, length in both]  # low, high, first and filled
    if pre.crop == "crop_resize":
        parts = torch.minimum(*(length / (size + CROP_PADDING) for size, length in both))
        if sizes[0] == sizes[1]:
            kept = [torch.floor(sizes[0] / (sizes[0] + CROP_PADDING) * torch.minimum(*lengths))] * 2
        else:
            kept = [torch.floor(size * parts) for size in sizes]
        kept = [side.clamp(min=1) for side in kept]
        starts = [torch.floor((length - side + 1) / 2) for length, side in zip(lengths, kept, strict=True)]
        if not pre.antialias:  # Pillow reads pixels outside of the box, the reference code does not
            whole = [(s, s + k, *rest[2:]) for s, k, rest in zip(starts, kept, whole, strict=True)]
        steps = [side / size for side, size in zip(kept, sizes, strict=True)]
    elif pre.crop == "letterbox":
        scale = torch.minimum(*(size / length for size, length in both))
        counts = [torch.round(length * scale).clamp(min=1) for length in lengths]
        firsts = [torch.floor((size - count) / 2) for size, count in zip(sizes, counts, strict=True)]
        whole = [(w[0], w[1], f, c) for w, f, c in zip(whole, firsts, counts, strict=True)]
        steps = [length / count for length, count in zip(lengths, counts, strict=True)]
        starts = [-first * step for first, step in zip(firsts, steps, strict=True)]
    else:
        steps = [length / side for length, side in zip(lengths, _resized(lengths, pre), strict=True)]
        # Halves are rounded to even numbers, as in Python.
        starts = [
            torch.round((side - size) / 2) * step
            for side, size, step in zip(_resized(lengths, pre), sizes, steps, strict=True)
        ]
    return [
        _Axis(size, start, step, *rest)
        for size, start, step, rest in zip(sizes, starts, steps, whole, strict=True)
    ]


def _resized(lengths: list[Tensor], pre: Preprocessing) -> list[Tensor]:
    """Return the height and width to which the crops that cut afterwards resize an image."""
    _, *sizes = pre.shape
    one = torch.ones_like(lengths[0])
    if pre.crop == "resize_crop_32":
        return [one * (size + CROP_PADDING) for size in sizes]
    down, across = (int(size / pre.crop_pct) for size in sizes)
    if pre.crop == "squash":
        return [one * down, one * across]
    # "center": one side fits, the other one keeps the aspect.
    height, width = lengths
    wide = across * height >= down * width
    return [
        torch.where(wide, torch.floor(across * height / width), one * down),
        torch.where(wide, one * across, torch.floor(down * width / height)),
    ]


def _weights(length: int, axis: _Axis, pre: Preprocessing) -> Tensor:
    """Return the weights of an axis, S x length, each line with the sum 1."""
    device = axis.start.device
    outputs = torch.arange(axis.size, dtype=torch.float64, device=device)
    inputs = torch.arange(length, dtype=torch.float64, device=device)
    center = (axis.start + (outputs + 0.5) * axis.step)[:, None]
    stretch = axis.step.clamp(min=1) if pre.antialias else torch.ones_like(axis.step)
    distance = (inputs + 0.5 - center).abs() / stretch
    inside = (inputs >= axis.low) & (inputs < axis.high)
    weights = torch.where(inside, _filter(distance, pre.interpolation), 0.0)
    total = weights.sum(dim=1, keepdim=True)
    # Only bars can have no weight at all.
    weights = weights / torch.where(total == 0, 1.0, total)
    if pre.antialias:
        weights = torch.round(weights * 2**_BITS) / 2**_BITS
    return weights.float()


def _filter(distance: Tensor, interpolation: str) -> Tensor:
    """Return the value of the filter at a distance from its center."""
    if interpolation == "bilinear":
        return (1 - distance).clamp(min=0)
    near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))


def _bytes(x: Tensor) -> Tensor:
    """Round to whole numbers from 0 to 255, halves up, as Pillow does."""
    return torch.floor(x + 0.5).clamp(0, 255)


# --- comparison with Pillow ------------------------------------------------------------------------------------


def as_pixels(image: Any) -> Tensor:
    """Return an image as uint8 H W 3.

    Raises:
        ValueError: it has another shape or type.
    """
    pixels = torch.from_numpy(np.array(image))
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or pixels.shape[-1] != 3 or min(pixels.shape[:2]) < 2:
        raise ValueError(
            problem(
                f"an image has the shape {tuple(pixels.shape)} and the type {pixels.dtype}",
                allowed="uint8 H x W x 3 with H and W above 1",
                fix="pass a list of RGB images",
            )
        )
    return pixels


def example_pixels() -> list[Tensor]:
    """Return smooth images of several sizes and aspects: waves of two colors with a little noise."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for height, width in ((120, 160), (97, 61), (240, 320), (33, 200), (480, 357)):
        y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
        waves = torch.stack([y.sin() * x.cos(), (x + y).sin(), (x - y).cos()], dim=-1)
        noise = 8 * torch.randn(height, width, 3, generator=generator)
        images.append((127 + 100 * waves + noise).clamp(0, 255).to(torch.uint8))
    return images


def compare_with_pillow(
    run: Callable[[Tensor], Tensor],
    net: nn.Module,
    model: TrainedModel,
    pixels: list[Tensor],
    *,
    close: float,
) -> tuple[dict[int, float], float]:
    """Compare a file with its preprocessing with the transform of `predict` and the network.

    Returns:
        1 -> the largest difference of a probability; and the percent of images with the same top-1 class. Two classes
        whose probabilities are closer than `close` count as the same.
    """
    from PIL import Image

    pre, worst, same = model.preprocessing, 0.0, 0
    transform = pre.transform()
    for image in pixels:
        inputs = normalize(transform(Image.fromarray(image.numpy()))[None], mean=pre.mean, std=pre.std)
        expected, actual = model.probabilities(net(inputs))[0], run(image).flatten()
        worst = max(worst, float((actual - expected).abs().max()))
        same += int(expected.max() - expected[actual.argmax()] <= close)
    return {1: worst}, 100 * same / len(pixels)
