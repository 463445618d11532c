"""CPU inference of eca_nfnet_l0 on spectrograms, 12 x 3 x 128 x 313: what people do by hand, and what normfree does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import timm
import torch

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import shaken
from benchmarks.runtimes import COMPILED, INT8, ONNXRUNTIME, OPENVINO, OPENVINO_HALF, Runtimes
from benchmarks.summary import Comparison
from normfree import create_model, fold, load_weights

ABOUT = (
    "Milliseconds of one batch of 12 spectrograms, 3 x 128 x 313, through eca_nfnet_l0 with random weights, on one "
    "thread. By hand: timm's network in PyTorch, compiled with constant weights, in onnxruntime by torch.onnx.export, "
    "in OpenVINO by openvino.convert_model, and quantized by NNCF with its defaults. normfree: `fold` of timm's module "
    "and of our network with the same weights, files of `export`, and int8 files of `quantize`. Logits are compared "
    "first: float32 arms to 1e-4, bfloat16 to 0.1 and int8 to 0.3, relative; the weights are random, so the accuracy "
    "of int8 is measured elsewhere, by experiments/int8_accuracy.py. Both int8 forms are calibrated on 24 random "
    "inputs."
)
NAME, SHAPE = "eca_nfnet_l0", (12, 3, 128, 313)


def cases(device: torch.device, *, shape: tuple[int, ...] = SHAPE, compiled: bool = True) -> list[Case]:
    """Return the only case. `compiled` adds the arms of torch.compile, which take minutes."""
    name = f"{NAME}, {' x '.join(map(str, shape))}"
    return [Case(name, (NAME,), partial(measure, name, shape, compiled))]


def measure(name: str, shape: tuple[int, ...], compiled: bool, bench: Bench) -> Iterator[Comparison]:
    """Yield the comparison."""
    torch.manual_seed(0)
    theirs = shaken(timm.create_model(NAME)).eval()
    ours = create_model(f"timm_{NAME}").eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    nets = {"timm": theirs, "normfree, fold(timm)": fold(theirs), "normfree, folded": fold(ours)}
    arms = [Arm(label, partial(net, images), images=len(images)) for label, net in nets.items()]
    with Runtimes(theirs, ours, images) as runtimes:
        for column in (*([COMPILED] if compiled else []), ONNXRUNTIME, OPENVINO, OPENVINO_HALF, INT8):
            arms += runtimes.arms(column, images, skipped=bench.skipped)
        yield from compare(bench, name, arms, tolerance=1e-4)
