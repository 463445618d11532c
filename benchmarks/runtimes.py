"""One network in every runtime of a CPU: as a deployer sets it up by hand, and with normfree's functions."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from benchmarks.arms import Arm
from benchmarks.networks import FORMATS, copied
from normfree import export, fold, quantize
from normfree.deploy.graph_writers import silence
from normfree.models.net import Net
from normfree.onnx_net import open_graph
from normfree.openvino_net import OpenVinoNet, compile_openvino
from normfree.surgery.batchnorm import batchnorms

Run = Callable[[Tensor], Tensor]
# The ways to run a network, in the order of the tables.
PYTORCH, COMPILED, ONNXRUNTIME, OPENVINO, OPENVINO_HALF, INT8 = (
    "PyTorch", "torch.compile", "onnxruntime", "OpenVINO", "OpenVINO bfloat16", "int8",
)  # fmt: skip
COLUMNS = (PYTORCH, COMPILED, ONNXRUNTIME, OPENVINO, OPENVINO_HALF, INT8)
# Largest relative L2 distance from the float32 logits of timm's network. The weights are random, so the accuracy of
# int8 is measured elsewhere, by experiments/int8_accuracy.py.
ALLOWED = {PYTORCH: 1e-5, COMPILED: 1e-4, ONNXRUNTIME: 1e-4, OPENVINO: 1e-4, OPENVINO_HALF: 0.1, INT8: 0.3}
CALIBRATED = 24  # random inputs that both int8 forms are calibrated on


class Runtimes:
    """timm's network `theirs`, and `ours` with the same weights, in all runtimes; files are made on first use.

    `ours` may be `theirs` itself: then only normfree's functions are used, `fold`, `export` and `quantize`. Use it as a
    context manager, which removes the files at the end.

    Args:
        theirs: the network in evaluation mode.
        ours: a network with the same outputs.
        example: images that the files are made for; only the batch size may differ later.
        half: under autocast to bfloat16, in PyTorch and torch.compile.
    """

    def __init__(self, theirs: nn.Module, ours: nn.Module, example: Tensor, *, half: bool = False) -> None:
        self.theirs, self.ours, self.example, self.half = theirs, ours, example, half
        self._folder = tempfile.TemporaryDirectory(prefix="runtimes")

    def __enter__(self) -> Runtimes:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    # --- the same network in other forms ---

    @cached_property
    def folded(self) -> nn.Module:
        """Our network, folded."""
        return fold(self.ours)

    @cached_property
    def plain(self) -> nn.Module:
        """Their network for inference by hand: batch norm folded by torch.fx, if there is any."""
        return fuse(copy.deepcopy(self.theirs)) if batchnorms(self.theirs) else self.theirs

    @cached_property
    def their_onnx(self) -> Path:
        """Their network as torch.onnx.export writes it."""
        path = Path(self._folder.name) / "timm.onnx"
        images = torch.cat([self.example[:1]] * 2)  # of a single image, the exporter would fix the batch size
        with silence():
            torch.onnx.export(
                self.theirs, (images,), path, dynamo=True, external_data=False, input_names=["images"],
                output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        return path

    @cached_property
    def their_graph(self) -> Any:
        """Their network as OpenVINO converts a PyTorch module."""
        import openvino

        shape = [-1, *self.example.shape[1:]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it traces with torch.jit
            return openvino.convert_model(self.theirs, example_input=self.example, input=shape)

    @cached_property
    def our_onnx(self) -> Path:
        """Our network as `export` writes it: folded."""
        path = Path(self._folder.name) / "normfree.onnx"
        export(self.ours, path, images=torch.cat([self.example[:1]] * 2))
        return path

    @cached_property
    def calibration(self) -> tuple[Tensor, ...]:
        """Batches of random inputs."""
        generator = torch.Generator().manual_seed(2)
        return torch.randn(CALIBRATED, *self.example.shape[1:], generator=generator).split(6)

    @cached_property
    def our_int8(self) -> Path:
        """Our network as `quantize` writes it."""
        path = Path(self._folder.name) / "normfree.int8.onnx"
        return quantize(self.our_onnx, path, calibration=self.calibration).path

    @cached_property
    def our_openvino_int8(self) -> Path:
        """The same for OpenVINO."""
        return quantize(
            self.our_onnx, Path(self._folder.name) / "normfree.int8.xml", calibration=self.calibration
        ).path

    @cached_property
    def their_int8(self) -> Any:
        """Their network in 8 bits by NNCF with its defaults.

        It starts from the converted module: of an ONNX graph, in which SiLU is a sigmoid and a product, NNCF 3.4 makes
        one whose outputs are 0 in OpenVINO 2026.4.
        """
        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        inputs = [image[None] for batch in self.calibration for image in batch]
        data = nncf.Dataset(inputs, lambda image: image.numpy())
        return nncf.quantize(self.their_graph, data, subset_size=len(inputs))

    # --- arms ---

    def arms(self, column: str, images: Tensor, *, skipped: list[str]) -> list[Arm]:
        """Return the arms of one column, those of timm first, each with its distance from timm's float32 logits.

        Arms that are too far off are left out and recorded in `skipped`.
        """
        with torch.inference_mode():
            wanted = self.theirs(images)
        made = []
        for label, run in self._runs(column):
            x = images.to(memory_format=FORMATS[label[-4:]]) if label[-4:] in FORMATS else images
            start = time.perf_counter()
            with torch.inference_mode():
                found = run(x)
            facts = {"compile_s": time.perf_counter() - start} if column == COMPILED else {}
            error = float((found - wanted).norm() / wanted.norm())
            allowed = ALLOWED[OPENVINO_HALF if self.half else column]
            if not error <= allowed:
                skipped.append(f"{label}: off by {error:.1e}, allowed is {allowed:g}")
                continue
            made.append(Arm(label, partial(run, x), images=len(images), alike=False, distance=partial(float, error),
                            allowed=allowed, facts=facts))  # fmt: skip
        return made

    def _runs(self, column: str) -> Iterator[tuple[str, Run]]:
        """Yield name and function of each way to run the network in one column."""
        if column == PYTORCH:
            nets = {"timm": self.plain}
            nets |= {"normfree": self.ours} if isinstance(self.ours, Net) else {}
            for name, net in (nets | {"normfree, folded": self.folded}).items():
                for layout in FORMATS:
                    yield f"{name} {layout}", self._in_torch(self._copied(net, layout))
        elif column == COMPILED:
            for name, net in (("timm", self.plain), ("normfree, folded", self.folded)):
                yield f"{name}, compiled NHWC", self._in_torch(frozen(self._copied(net, "NHWC")))
        elif column == ONNXRUNTIME:
            yield "timm, onnxruntime", open_graph(self.their_onnx)
            yield "normfree, folded, onnxruntime", open_graph(self.our_onnx)
        elif column in (OPENVINO, OPENVINO_HALF):
            precision = "bfloat16" if column == OPENVINO_HALF else "float32"
            yield f"timm, {column}", in_openvino(self.their_graph, precision)
            yield f"normfree, folded, {column}", in_openvino(self.our_onnx, precision)
        else:
            yield "timm, NNCF int8, OpenVINO", in_openvino(self.their_int8)
            yield "normfree, int8, onnxruntime", open_graph(self.our_int8)
            yield "normfree, int8, OpenVINO", in_openvino(self.our_openvino_int8)

    def _copied(self, net: nn.Module, layout: str) -> nn.Module:
        return copied(net, layout, self.example.device)

    def _in_torch(self, net: Run) -> Run:
        """Return `net` under autocast if `half`."""

        def run(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
                return net(x)

        return run


def frozen(net: nn.Module) -> Run:
    """Return `net` compiled with its weights as constants, which Inductor then folds and packs."""
    compiled = torch.compile(net, dynamic=False, options={"freezing": True})
    return compiled


def in_openvino(source: Any, precision: str = "float32") -> Run:
    """Return a file or a graph in OpenVINO, on PyTorch's number of threads."""
    import openvino

    graph = openvino.Core().read_model(source) if isinstance(source, Path) else source
    return OpenVinoNet(compile_openvino(graph, precision=precision), name="benchmark")


def best_of_sides(seconds: dict[str, float]) -> list[str]:
    """Return the fastest arm of timm, then the fastest of normfree."""
    sides: Sequence[list[str]] = [[n for n in seconds if n.startswith(side)] for side in ("timm", "normfree")]
    return [min(names, key=seconds.__getitem__) for names in sides]
