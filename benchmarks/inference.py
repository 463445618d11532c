"""Inference before and after folding, against timm's network with the same weights, float32 (GPU: bfloat16)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.networks import FORMATS, batch, best_formats, copied, multiplications, pair, shaken
from benchmarks.summary import Comparison
from normfree import create_model, export, fold
from normfree.models.net import Net
from normfree.onnx_net import open_onnx
from normfree.preprocessing import Preprocessing
from normfree.pretrained import TrainedModel

ABOUT = (
    "Milliseconds of one batch through timm's network, ours with the same weights, and ours folded; each network "
    "in its faster memory format, chosen in rounds that are not counted. Logits are compared first. `onnxruntime` "
    "runs the folded network as `normfree export` writes it, with PyTorch's number of threads. For NF-ResNet-50 "
    "the table also has resnet50 with its batch norm folded into the convolutions (timm's by torch.fx, ours by "
    "`fold`), each checked against its own unfolded form. Compiled arms use `torch.compile` with its defaults, "
    "NHWC."
)
# timm's name, image size.
ON_CPU = (("nf_resnet50", 224), ("dm_nfnet_f0", 192), ("eca_nfnet_l0", 224), ("nf_regnet_b1", 256))
ON_GPU = (("dm_nfnet_f0", 256), ("nf_resnet50", 288), ("eca_nfnet_l0", 288), ("dm_nfnet_f1", 320))
BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}
# Networks that are exported for onnxruntime, which takes most of a minute for each.
EXPORTED = ("nf_resnet50", "dm_nfnet_f0")
# Networks with batch norm that are measured in addition, by normalizer-free counterpart.
BATCH_NORM_NETWORKS = {"nf_resnet50": "resnet50"}
TOLERANCE, HALF_TOLERANCE = 1e-5, 2e-2

Network = Callable[[Tensor], Tensor]


def cases(device: torch.device, *, compiled: bool = False) -> list[Case]:
    """Return a case per network. `compiled` adds compiled arms on a CPU, for the first two networks only."""
    gpu = device.type == "cuda"
    networks = ON_GPU if gpu else ON_CPU[:2] if compiled else ON_CPU
    return [case(name, size, BATCHES[device.type], compiled=compiled or gpu) for name, size in networks]


def case(name: str, size: int, batches: tuple[int, ...], *, compiled: bool = False) -> Case:
    """Return the case of timm's network `name` at each of the batch sizes."""
    return Case(f"{name}, {size} px", (name,), partial(measure, name, size, batches, compiled))


def measure(
    name: str, size: int, batches: tuple[int, ...], compiled: bool, bench: Bench
) -> Iterator[Comparison]:
    """Yield a comparison per batch size."""
    theirs, ours = (net.eval() for net in pair(name))
    assert isinstance(ours, Net)
    networks: dict[str, nn.Module] = {"timm": theirs, "normfree": ours, "normfree, folded": fold(ours)}
    half = bench.device.type == "cuda"
    exported = _exported(bench, name, ours, size) if name in EXPORTED and not half and not compiled else None
    now = bench.clock()
    for number, images in enumerate(batches, 1):
        arms = [
            arm for label, net in networks.items() for arm in _both(bench, label, net, size, images, half)
        ]
        if compiled:
            arms += [
                _compiled(bench, k, networks[k], size, images, half) for k in ("timm", "normfree, folded")
            ]
        if exported is not None:
            x = batch(size, images, bench.device)[0]
            arms.append(Arm("normfree, folded, onnxruntime", partial(exported, x), images=images))
        if name in BATCH_NORM_NETWORKS:
            arms += _with_batch_norm(bench, BATCH_NORM_NETWORKS[name], size, images, half)
        timed = replace(bench, share=now + (bench.share - now) * number / len(batches))
        yield from compare(
            timed, f"{name}, {size} px, batch {images}", arms, tolerance=HALF_TOLERANCE if half else TOLERANCE,
            choose=best_formats, floor=None if half else multiplications(bench, name, size, images),
        )  # fmt: skip


def _both(bench: Bench, label: str, net: nn.Module, size: int, images: int, half: bool) -> Iterator[Arm]:
    """Yield arms of `net` in both memory formats."""
    for layout in FORMATS:
        x = batch(size, images, bench.device, layout)[0]
        run = partial(_run, copied(net, layout, bench.device), x, half)
        yield Arm(f"{label} {layout}", run, images=images)


def _compiled(bench: Bench, label: str, net: nn.Module, size: int, images: int, half: bool) -> Arm:
    """Return an arm of `net` compiled as a whole."""
    x = batch(size, images, bench.device, "NHWC")[0]
    forward = torch.compile(copied(net, "NHWC", bench.device), dynamic=False)
    return Arm(f"{label}, compiled NHWC", partial(_run, forward, x, half), images=images, compiled=True)


def _run(net: Network, x: Tensor, half: bool) -> Tensor:
    """Compute the logits, under autocast if `half`."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
        return net(x)


def _with_batch_norm(bench: Bench, name: str, size: int, images: int, half: bool) -> Iterator[Arm]:
    """Yield arms of a folded batch-norm network, timm's and ours; each is checked against its own unfolded form."""
    theirs = shaken(timm.create_model(name))
    ours = shaken(create_model(name, classifier_std=0.01))
    assert isinstance(ours, Net)
    for label, whole, plain in (
        ("timm", theirs, fuse(copy.deepcopy(theirs))),
        ("normfree", ours, fold(ours)),
    ):
        x = batch(size, 2, torch.device("cpu"))[0]
        with torch.inference_mode():
            error = float((plain(x) - whole(x)).norm() / whole(x).norm())
        for arm in _both(bench, f"{name} of {label}, folded", plain, size, images, half):
            yield replace(arm, alike=False, distance=partial(float, error))


def _exported(bench: Bench, name: str, net: Net, size: int) -> Network | None:
    """Return the folded network in onnxruntime, or None if onnxruntime is not installed."""
    model = TrainedModel(net, Preprocessing(image_size=size), tuple(map(str, range(net.num_classes))))
    try:
        with tempfile.TemporaryDirectory() as folder:
            export(model, Path(folder) / "net.onnx")
            return open_onnx(Path(folder) / "net.onnx")[0]
    except ModuleNotFoundError as error:
        bench.skipped.append(f"{name}, onnxruntime: {error}")
        return None
