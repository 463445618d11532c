"""Single convolutions of NFNet-F0: memory formats, 1x1 ones as matrix products, and as our networks compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import FORMATS
from benchmarks.summary import Comparison, Floor
from normfree.native.library import library
from normfree.ops import conv2d_backends, winograd

ABOUT = (
    "Milliseconds of one convolution's forward pass, input gradient and weight gradient, in both memory formats; "
    "also as our networks compute it; if it is 1×1, as a linear layer over pixels; and if it is 3×3 of stride 1, with "
    "Winograd tiles of 2×2 and 4×4 outputs, whether our networks use them for this size or not. Results are compared "
    "first. A floor is the larger of two lower bounds: the multiplications at the rate of a large matrix product, "
    "and the bytes at the rate of a copy. A 3×3 convolution of stride 1 can be computed with 4 of 9 "
    "multiplications, or 1 of 4. On a GPU the type is bfloat16."
)
DIRECTIONS = ("forward", "input gradient", "weight gradient")
BATCH = {"cpu": 8, "cuda": 256}
# Largest relative L2 distance caused by a different order of sums.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Shape:
    """A convolution without bias on square feature maps of `side`, with padding that keeps their size."""

    inputs: int
    outputs: int
    side: int
    kernel_size: int = 1
    stride: int = 1
    group_width: int = 0

    @property
    def groups(self) -> int:
        """Number of groups of `group_width` input channels; one group if it is 0."""
        return self.inputs // self.group_width if self.group_width else 1

    def __str__(self) -> str:
        text = f"{self.kernel_size}×{self.kernel_size}, {self.inputs} to {self.outputs}, {self.side}²"
        text += f", stride {self.stride}" if self.stride > 1 else ""
        return text + (f", {self.groups} groups" if self.groups > 1 else "")


# The 3x3 convolutions of stride 1 of NF-ResNet-50 at 224 px, and some that show where tiles stop being faster.
PLAIN = (
    (64, 56),
    (128, 28),
    (256, 14),
    (512, 7),
    (96, 28),
    (192, 14),
    (256, 28),
    (128, 14),
    (64, 28),
    (32, 32),
)
# The convolutions of NFNet-F0 at 192 px: 3x3 with groups of width 128, and the 1x1 ones around them.
GROUPED = ((128, 48, 1), (256, 48, 2), (256, 24, 1), (768, 24, 2), (768, 12, 1), (768, 12, 2), (768, 6, 1))
POINTWISE = ((512, 256, 24), (512, 768, 24), (1536, 768, 12), (768, 1536, 12), (1536, 3072, 6))
SHAPES = (
    *(Shape(c, c, side, kernel_size=3, stride=stride, group_width=128) for c, side, stride in GROUPED),
    *(Shape(i, o, side) for i, o, side in POINTWISE),
    *(Shape(c, c, side, kernel_size=3) for c, side in PLAIN),
)


def cases(device: torch.device) -> list[Case]:
    """Return a case for each shape."""
    return [case(shape, BATCH[device.type]) for shape in SHAPES]


def case(shape: Shape, images: int) -> Case:
    """Return the case of one shape, with all directions."""
    kind = "pointwise" if shape.kernel_size == 1 else "grouped"
    return Case(str(shape), (kind,), partial(measure, shape, images))


def measure(shape: Shape, images: int, bench: Bench) -> Iterator[Comparison]:
    """Yield a comparison for each direction. Windows are short, since there are many comparisons."""
    kind = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    short = replace(bench, window_s=0.1 * bench.window_s)
    x, weight, up = tensors(shape, images, bench.device, kind)
    for direction in DIRECTIONS:
        arms = [
            Arm(name, partial(run, direction, shape, *(t.to(memory_format=layout) for t in (x, weight, up))))
            for name, layout in FORMATS.items()
        ]
        if shape.kernel_size == shape.stride == 1:
            arms.append(Arm("linear", linear(direction, x, weight, up)))
        channels_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, up))
        arms.append(Arm("normfree NHWC", partial(ours, direction, shape, *channels_last)))
        if (
            shape.kernel_size == 3
            and shape.stride == 1
            and bench.device.type == "cpu"
            and library() is not None
        ):
            for side in (2, 4):
                arms.append(Arm(f"tiles {side}×{side}", tiles(direction, shape, side, x, weight, up)))
        lowest = floor(bench, shape, [x, weight, up])
        yield from compare(short, f"{shape}, {direction}", arms, tolerance=TOLERANCE[kind], floor=lowest)


def tensors(
    shape: Shape, images: int, device: torch.device, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random input, weight and gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    after = -(-shape.side // shape.stride)
    fan_in = shape.inputs // shape.groups
    sizes = (
        (images, shape.inputs, shape.side, shape.side),
        (shape.outputs, fan_in, shape.kernel_size, shape.kernel_size),
        (images, shape.outputs, after, after),
    )
    x, weight, up = (torch.randn(size, generator=generator).to(device, kind) for size in sizes)
    return x, weight / (fan_in * shape.kernel_size**2) ** 0.5, up


def run(direction: str, shape: Shape, x: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    """Compute one direction with PyTorch's convolution."""
    side = shape.kernel_size // 2
    if direction == "forward":
        return F.conv2d(x, weight, None, shape.stride, side, 1, shape.groups)
    both = [direction == "input gradient", direction == "weight gradient", False]
    found = torch.ops.aten.convolution_backward(
        up, x, weight, None, [shape.stride] * 2, [side] * 2, [1, 1], False, [0, 0], shape.groups, both
    )
    return found[0] if both[0] else found[1]


@torch.no_grad()
def ours(direction: str, shape: Shape, x: Tensor, weight: Tensor, up: Tensor) -> Tensor:
    """Compute one direction as our networks do."""
    side = shape.kernel_size // 2
    geometry = conv2d_backends.Geometry(shape.stride, (side, side), shape.groups)
    with torch.set_grad_enabled(direction != "forward"):  # gradients are computed by the backend of training
        backend = conv2d_backends.choose_backend(x, weight, None, geometry)
    if direction == "forward":
        return backend.forward(x, weight, None, geometry)
    needs = (direction == "input gradient", direction == "weight gradient", False)
    by_x, by_weight, _ = conv2d_backends.gradients(backend, up, x, weight, geometry, needs)
    found = by_x if needs[0] else by_weight
    assert found is not None
    return found


def linear(direction: str, x: Tensor, weight: Tensor, up: Tensor) -> Callable[[], Tensor]:
    """Return a 1x1 convolution as a matrix product over the pixels of channels_last maps, with the same shapes."""
    x, up = (t.permute(0, 2, 3, 1).contiguous() for t in (x, up))
    matrix = weight.flatten(1)
    if direction == "forward":
        return lambda: F.linear(x, matrix).permute(0, 3, 1, 2)
    if direction == "input gradient":
        return lambda: F.linear(up, matrix.t()).permute(0, 3, 1, 2)
    return lambda: (up.flatten(0, 2).t() @ x.flatten(0, 2))[:, :, None, None]


def tiles(
    direction: str, shape: Shape, side: int, x: Tensor, weight: Tensor, up: Tensor
) -> Callable[[], Tensor]:
    """Return a 3x3 convolution of stride 1 by Winograd's algorithm, with tiles of `side` x `side` outputs."""
    x, weight, up = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, up))
    options = {"groups": shape.groups, "side": side}
    if direction == "forward":
        return lambda: winograd.conv2d(x, weight, None, **options)
    if direction == "input gradient":
        return lambda: winograd.input_gradient(up, weight, **options)
    return lambda: winograd.weight_gradient(x, up, **options)


def floor(bench: Bench, shape: Shape, moved: list[Tensor]) -> Floor | None:
    """Return the lower bound for each direction, which reads two of the three tensors and writes the third."""
    if not bench.matmul or not bench.bandwidth:
        return None
    _, weight, up = moved
    multiplications = 2 * weight[0].numel() * up.numel() / bench.matmul
    copying = sum(t.nbytes for t in moved) / bench.bandwidth
    reason = "multiplications" if multiplications > copying else "bytes"
    return Floor(1e3 * max(multiplications, copying), reason)
