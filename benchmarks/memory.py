"""Peak memory of one training step, forward and backward: allocated bytes, and the resident set of the process."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Bench, Case, GateError
from benchmarks.networks import (
    FORMATS,
    batch,
    best_formats,
    copied,
    forward_backward,
    gradient_distance,
    pair,
)
from benchmarks.summary import Comparison, spread, timing
from normfree.models.net import Net
from normfree.training.allocator import keep_freed_memory

ABOUT = (
    "MiB of one training step of timm's network and ours, forward and backward pass, beyond weights and images; "
    "each side in its memory format with the lower peak. `allocated`: the peak of the bytes allocated by PyTorch, "
    "which is the same in every run. `resident`: the growth of the peak of the process's resident set, each step "
    "in a new process. Gradients are compared first."
)
# timm's name, image size, batch size.
ON_CPU = (("nf_resnet50", 224, 8), ("dm_nfnet_f0", 192, 8))
ON_GPU = (("dm_nfnet_f0", 192, 64), ("nf_resnet50", 224, 256), ("dm_nfnet_f3", 320, 32))
TOLERANCE = 1e-3  # see `training.KINKED`
MIB = 2**20
CLEAR = Path("/proc/self/clear_refs")  # only Linux reports the resident set


def cases(device: torch.device) -> list[Case]:
    """Return a case per network."""
    networks = ON_GPU if device.type == "cuda" else ON_CPU
    return [case(*network) for network in networks]


def case(name: str, size: int, images: int) -> Case:
    """Return the case of timm's network `name` with `images` images of `size` pixels."""
    return Case(f"{name}, {size} px, batch {images}", (name,), partial(measure, name, size, images))


def measure(name: str, size: int, images: int, bench: Bench) -> Iterator[Comparison]:
    """Yield the comparison of allocated and, on a CPU, of resident memory."""
    sides = dict(zip(("timm", "normfree"), pair(name), strict=True))
    distances = [_distance(sides.values(), layout, size, bench.device) for layout in FORMATS]
    error = math.hypot(*distances)
    if not error <= TOLERANCE:
        raise GateError(
            f"{name}: gradients differ by {error:.1e}, allowed is {TOLERANCE:g}; no memory is reported"
        )
    variations = [(side, layout) for side in sides for layout in FORMATS]
    peaks = {f"{s} {f}": allocated(copied(sides[s], f, bench.device), size, images, f) for s, f in variations}
    chosen = best_formats(peaks)
    case = f"{name}, {size} px, batch {images}"
    layout = chosen[0].split()[1]
    again = allocated(copied(sides["timm"], layout, bench.device), size, images, layout)
    yield comparison(f"{case}, allocated", {arm: [peaks[arm]] for arm in chosen}, [again], error)
    if bench.device.type == "cuda" or not CLEAR.exists():
        return
    order = [*chosen, chosen[0]]
    growth = [in_a_process(name, size, images, *arm.split()) for arm in order]
    yield comparison(
        f"{case}, resident", {a: [g] for a, g in zip(chosen, growth, strict=False)}, growth[-1:], error
    )


def _distance(sides: Iterable[nn.Module], layout: str, size: int, device: torch.device) -> float:
    """Return the relative L2 distance of the gradients of both sides."""
    theirs, ours = (copied(net, layout, device) for net in sides)
    assert isinstance(ours, Net)
    return gradient_distance(theirs, ours, *batch(size, 2, device, layout))


def comparison(case: str, peaks: dict[str, list[float]], again: list[float], error: float) -> Comparison:
    """Return the comparison of peaks in bytes; `again` is the second measurement of the baseline."""
    rng = random.Random(0)
    base = next(iter(peaks.values()))
    timings = tuple(
        timing(
            arm,
            [p / MIB for p in own],
            [b / MIB for b in base],
            rng,
            error=error * (arm != next(iter(peaks))),
        )
        for arm, own in peaks.items()
    )
    noise = spread([b / a for b, a in zip(base, again, strict=True)], rng)
    return Comparison(case, next(iter(peaks)), timings, noise, len(base), unit="MiB")


def allocated(net: nn.Module, size: int, images: int, layout: str) -> float:
    """Return the peak of the bytes that one pass allocates."""
    device = next(net.parameters()).device
    x, y = batch(size, images, device, layout)
    if device.type == "cuda":
        forward_backward(net, x, y, half=True)  # libraries allocate their workspace
        net.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward_backward(net, x, y, half=True)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        forward_backward(net, x, y)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def in_a_process(name: str, size: int, images: int, side: str, layout: str) -> float:
    """Call `resident` in a new process."""
    args = [name, str(size), str(images), side, layout, str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *args],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout))


def resident(name: str, size: int, images: int, side: str, layout: str) -> int:
    """Return by how many bytes one pass raises the peak of this process's resident set."""
    net = copied(dict(zip(("timm", "normfree"), pair(name), strict=True))[side], layout, torch.device("cpu"))
    x, y = batch(size, images, torch.device("cpu"), layout)
    keep_freed_memory()  # as `normfree train` does; memory freed while building is not kept
    # Reset the peak. `ru_maxrss` would start from the peak of the parent process.
    CLEAR.write_text("5")
    before = status("VmRSS")
    forward_backward(net, x, y)
    return status("VmHWM") - before


def status(entry: str) -> int:
    """Return bytes of this process: "VmRSS", resident now, or "VmHWM", its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    torch.set_num_threads(int(arguments[5]))
    print(resident(arguments[0], int(arguments[1]), int(arguments[2]), *arguments[3:5]))
