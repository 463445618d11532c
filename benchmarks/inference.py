"""Inference in each runtime: the best that a deployer makes of timm's network by hand, against normfree's best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import timm
import torch
from torch import nn

from benchmarks.harness import Bench, Case, OutOfTimeError, compare
from benchmarks.networks import batch, multiplications, pair, shaken
from benchmarks.runtimes import COLUMNS, COMPILED, ONNXRUNTIME, PYTORCH, Runtimes, best_of_sides
from benchmarks.summary import Comparison

ABOUT = (
    "Milliseconds of one batch through a network, float32 (on a GPU bfloat16): the fastest of what a deployer makes "
    "by hand of timm's network, against the fastest of normfree's forms with the same weights. Each runtime is a "
    "comparison of its own; the arms that are timed are the fastest of either side in a round that is not counted. "
    "`PyTorch`: both memory formats; batch norm folded by torch.fx, standardized weights folded by `fold`. "
    "`torch.compile`: NHWC, with constant weights (`freezing`). `onnxruntime`: files of torch.onnx.export and of "
    "`export`. `OpenVINO`: openvino.convert_model, and `export`. `int8`: by NNCF with its defaults, and by `quantize`, "
    "calibrated on the same 24 random images. resnet50 and efficientnet_b0 have batch norm: they are what a user "
    "would deploy instead. "
    "Logits are compared with timm's in float32 first: PyTorch to 1e-5, other runtimes to 1e-4, bfloat16 to 0.1 and "
    "int8 to 0.3, relative."
)
# timm's name, image size. Those with batch norm come last.
ON_CPU = (
    ("nf_resnet50", 224), ("dm_nfnet_f0", 192), ("eca_nfnet_l0", 224), ("nf_regnet_b1", 256),
    ("resnet50", 224), ("efficientnet_b0", 224),
)  # fmt: skip
ON_GPU = (("dm_nfnet_f0", 256), ("nf_resnet50", 288), ("eca_nfnet_l0", 288), ("dm_nfnet_f1", 320))
WITH_BATCH_NORM = ("resnet50", "efficientnet_b0")
BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}


def cases(device: torch.device, *, every_runtime: bool = False) -> list[Case]:
    """Return a case per network; without `every_runtime`, a CPU runs those that take seconds to set up."""
    if device.type == "cuda":
        return [case(name, size, BATCHES["cuda"], columns=(PYTORCH, COMPILED)) for name, size in ON_GPU]
    columns = COLUMNS if every_runtime else (PYTORCH, ONNXRUNTIME)
    networks = ON_CPU if every_runtime else ON_CPU[:3]
    return [case(name, size, BATCHES["cpu"], columns=columns) for name, size in networks]


def case(name: str, size: int, batches: tuple[int, ...], *, columns: Sequence[str] = COLUMNS) -> Case:
    """Return the case of timm's network `name` at each of the batch sizes."""
    return Case(f"{name}, {size} px", (name,), partial(measure, name, size, batches, tuple(columns)))


def measure(
    name: str, size: int, batches: tuple[int, ...], columns: tuple[str, ...], bench: Bench
) -> Iterator[Comparison]:
    """Yield a comparison per batch size and runtime."""
    theirs, ours = (net.to(bench.device) for net in networks(name))
    half = bench.device.type == "cuda"
    start, parts = bench.clock(), [(images, column) for images in batches for column in columns]
    with Runtimes(theirs, ours, batch(size, 1, bench.device)[0], half=half) as runtimes:
        for number, (images, column) in enumerate(parts, 1):
            timed = replace(bench, share=start + (bench.share - start) * number / len(parts))
            row = f"{name}, {size} px, batch {images}"
            exact = not half and name not in WITH_BATCH_NORM
            floor = multiplications(bench, name, size, images) if exact else None
            try:
                arms = runtimes.arms(column, batch(size, images, bench.device)[0], skipped=bench.skipped)
                # The comparison in PyTorch has the name of its row.
                title = row if column == PYTORCH else f"{row}, {column}"
                if {arm.name.startswith("timm") for arm in arms} != {True, False}:
                    bench.skipped.append(f"{row}, {column}: no arm is left on one side")
                    continue
                found = compare(timed, title, arms, choose=best_of_sides, floor=floor)
            except (OutOfTimeError, ModuleNotFoundError) as error:
                bench.skipped.append(f"{row}, {column}: {error}")
                continue
            yield from (replace(comparison, row=row, column=column) for comparison in found)


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Return timm's network in evaluation mode, and ours with the same weights; the same twice if it has batch norm."""
    if name not in WITH_BATCH_NORM:
        theirs, ours = (net.eval() for net in pair(name))
        return theirs, ours
    torch.manual_seed(0)
    net = shaken(timm.create_model(name))
    return net, net
