"""Peak memory of one training step, forward and backward: bytes allocated at a time, and the process's resident set."""

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
    "each side in its memory format with the lower peak. `allocated`: the most bytes that torch had allocated at "
    "a time, which is the same in every run. `resident`: by how much the peak of the process's resident set grew, "
    "each step in a fresh process. Gradients are compared first."
)
#: timm's name, image size, batch
ON_CPU = (("nf_resnet50", 224, 8), ("dm_nfnet_f0", 192, 8))
ON_GPU = (("dm_nfnet_f0", 192, 64), ("nf_resnet50", 224, 256), ("dm_nfnet_f3", 320, 32))
TOLERANCE = 1e-3  # see `training.KINKED`
MIB = 2**20
CLEAR = Path("/proc/self/clear_refs")  # Linux alone tells what is resident


def cases(device: torch.device) -> list[Case]:
    """One per network."""
    rows = ON_GPU if device.type == "cuda" else ON_CPU
    return [case(*row) for row in rows]


def case(name: str, size: int, images: int) -> Case:
    """timm's `name` on so many images of `size` pixels."""
    return Case(f"{name}, {size} px, batch {images}", (name,), partial(measure, name, size, images))


def measure(name: str, size: int, images: int, bench: Bench) -> Iterator[Comparison]:
    """Allocated; on a CPU also resident."""
    sides = dict(zip(("timm", "normfree"), pair(name), strict=True))
    found = [_distance(sides.values(), word, size, bench.device) for word in FORMATS]
    error = math.hypot(*found)
    if not error <= TOLERANCE:
        raise GateError(
            f"{name}: gradients are {error:.1e} apart, allowed are {TOLERANCE:g}; no memory is given"
        )
    words = [(side, word) for side in sides for word in FORMATS]
    peaks = {f"{s} {w}": allocated(copied(sides[s], w, bench.device), size, images, w) for s, w in words}
    chosen = best_formats(peaks)
    case = f"{name}, {size} px, batch {images}"
    again = allocated(
        copied(sides["timm"], chosen[0].split()[1], bench.device), size, images, chosen[0].split()[1]
    )
    yield comparison(f"{case}, allocated", {arm: [peaks[arm]] for arm in chosen}, [again], error)
    if bench.device.type == "cuda" or not CLEAR.exists():
        return
    order = [*chosen, chosen[0]]
    grown = [in_a_process(name, size, images, *arm.split()) for arm in order]
    yield comparison(
        f"{case}, resident", {a: [g] for a, g in zip(chosen, grown, strict=False)}, grown[-1:], error
    )


def _distance(sides: Iterable[nn.Module], word: str, size: int, device: torch.device) -> float:
    theirs, ours = (copied(net, word, device) for net in sides)
    assert isinstance(ours, Net)
    return gradient_distance(theirs, ours, *batch(size, 2, device, word))


def comparison(case: str, peaks: dict[str, list[float]], again: list[float], error: float) -> Comparison:
    """Of peaks in bytes; `again` those of the baseline once more."""
    dice = random.Random(0)
    base = next(iter(peaks.values()))
    timings = tuple(
        timing(
            arm,
            [p / MIB for p in own],
            [b / MIB for b in base],
            dice,
            error=error * (arm != next(iter(peaks))),
        )
        for arm, own in peaks.items()
    )
    noise = spread([b / a for b, a in zip(base, again, strict=True)], dice)
    return Comparison(case, next(iter(peaks)), timings, noise, len(base), unit="MiB")


def allocated(net: nn.Module, size: int, images: int, word: str) -> float:
    """Most bytes that one pass has allocated at a time, beyond what was there."""
    device = next(net.parameters()).device
    x, y = batch(size, images, device, word)
    if device.type == "cuda":
        forward_backward(net, x, y, half=True)  # libraries take their workspace
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


def in_a_process(name: str, size: int, images: int, side: str, word: str) -> float:
    """`resident` in a fresh process."""
    words = [name, str(size), str(images), side, word, str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout))


def resident(name: str, size: int, images: int, side: str, word: str) -> int:
    """By how many bytes one pass raised the peak of this process's resident set."""
    net = copied(dict(zip(("timm", "normfree"), pair(name), strict=True))[side], word, torch.device("cpu"))
    x, y = batch(size, images, torch.device("cpu"), word)
    keep_freed_memory()  # as `normfree train` does; what building has freed is not kept
    CLEAR.write_text(
        "5"
    )  # the peak begins anew; ru_maxrss would begin with that of the process that started this one
    before = status("VmRSS")
    forward_backward(net, x, y)
    return status("VmHWM") - before


def status(entry: str) -> int:
    """Bytes of this process: "VmRSS", resident now, or "VmHWM", its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    torch.set_num_threads(int(arguments[5]))
    print(resident(arguments[0], int(arguments[1]), int(arguments[2]), *arguments[3:5]))
