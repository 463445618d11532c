"""CPU inference of eca_nfnet_l0 on spectrograms, 12 x 3 x 128 x 313: what people do by hand, and what normfree does."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import shaken
from benchmarks.summary import Comparison
from normfree import create_model, export, fold, load_weights, quantize
from normfree.deploy.graph_writers import silence
from normfree.onnx_net import open_graph
from normfree.openvino_net import OpenVinoNet, compile_openvino, read_openvino

ABOUT = (
    "Milliseconds of one batch of 12 spectrograms, 3 x 128 x 313, through eca_nfnet_l0 with random weights, on one "
    "thread. By hand: timm's network in PyTorch, compiled, exported with torch.onnx.export and run by onnxruntime and "
    "OpenVINO, and quantized by NNCF with its defaults. normfree: `fold` of timm's module and of our network with the "
    "same weights, files of `export`, and int8 files of `quantize`. Logits are compared first: float32 "
    "arms to 1e-4, bfloat16 to 0.1 and int8 to 0.3, relative; the weights are random, so the accuracy of int8 is "
    "measured elsewhere, by experiments/int8_accuracy.py. Both int8 forms are calibrated on 24 random inputs."
)
NAME, SHAPE = "eca_nfnet_l0", (12, 3, 128, 313)
TOLERANCE, HALF_TOLERANCE, INT8_TOLERANCE = 1e-4, 0.1, 0.3
CALIBRATED = 24

Run = Callable[[], Tensor]


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
    folder = Path(tempfile.mkdtemp(prefix="spectrogram"))
    try:
        arms = [Arm("timm", partial(theirs, images), images=len(images))]
        networks = {"normfree, fold(timm)": fold(theirs), "normfree, folded": fold(ours)}
        arms += [Arm(label, partial(net, images), images=len(images)) for label, net in networks.items()]
        if compiled:
            for label, net in {"timm": theirs, "normfree, folded": networks["normfree, folded"]}.items():
                run = partial(torch.compile(net, dynamic=False), images)
                arms.append(Arm(f"{label}, compiled", run, images=len(images), compiled=True))
        arms += _exported(bench, theirs, ours, images, folder)
        yield from compare(bench, name, arms, tolerance=TOLERANCE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exported(bench: Bench, theirs: nn.Module, ours: nn.Module, images: Tensor, folder: Path) -> list[Arm]:
    """Return the arms of other runtimes."""
    by_hand, own = folder / "timm.onnx", folder / "normfree.onnx"
    with silence():
        torch.onnx.export(
            theirs, (images,), by_hand, dynamo=True, external_data=False, input_names=["images"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    export(ours, own, images=images[:2])
    generator = torch.Generator().manual_seed(2)
    batches = torch.randn(CALIBRATED, *images.shape[1:], generator=generator).split(6)
    small = quantize(own, folder / "normfree.int8.onnx", calibration=batches).path
    with torch.inference_mode():
        wanted = theirs(images)
    made: dict[str, tuple[Run, float]] = {}
    for label, path in (("timm", by_hand), ("normfree, folded", own), ("normfree, int8", small)):
        allowed = INT8_TOLERANCE if path is small else TOLERANCE
        made[f"{label}, onnxruntime"] = partial(open_graph(path), images), allowed
        made[f"{label}, OpenVINO"] = _openvino(path, images, "float32"), allowed
        half = max(allowed, HALF_TOLERANCE)
        made[f"{label}, OpenVINO bfloat16"] = _openvino(path, images, "bfloat16"), half
    made["timm, NNCF int8, OpenVINO"] = _nncf(by_hand, batches, images), INT8_TOLERANCE
    arms = []
    for label, (run, allowed) in made.items():
        error = float((run() - wanted).norm() / wanted.norm())
        if not error <= allowed:
            bench.skipped.append(f"{label}: off by {error:.1e}, allowed is {allowed:g}")
            continue
        exact = allowed == TOLERANCE
        distance = None if exact else partial(float, error)
        arms.append(Arm(label, run, images=len(images), alike=exact, distance=distance, allowed=allowed))
    return arms


def _openvino(source: Any, images: Tensor, precision: str) -> Run:
    """Return a run of an ONNX file or an OpenVINO graph in OpenVINO, on PyTorch's number of threads."""
    import openvino

    graph = openvino.Core().read_model(source) if isinstance(source, Path) else source
    return partial(OpenVinoNet(compile_openvino(graph, precision=precision), name="spectrogram"), images)


def _nncf(path: Path, batches: tuple[Tensor, ...], images: Tensor) -> Run:
    """Return a run of the int8 form that NNCF makes with its defaults."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    inputs = [image[None] for batch in batches for image in batch]
    data = nncf.Dataset(inputs, lambda image: {"images": image.numpy()})
    graph = nncf.quantize(openvino.Core().read_model(path), data, subset_size=len(inputs))
    written = path.with_suffix(".nncf.xml")
    openvino.save_model(graph, written, compress_to_fp16=False)
    return _openvino(read_openvino(written), images, "float32")
