"""Data type of the activations of a run whose config leaves it open with `precision = "auto"`.

bfloat16 where the device computes faster in it, else float32. On a CPU that is measured, once in each process, on
convolutions as the networks compute them: flags of the processor say which instructions exist, but not how fast they
are, and other libraries emulate them. The run stores the answer in its config and keeps it on any other machine.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normfree.ops.conv2d import conv2d
from normfree.training.config import Config
from normfree.training.config_io import load_config
from normfree.training.console import RunLog
from normfree.training.distributed.world import World

# bfloat16 must be this many times as fast. CPUs that emulate it reach 0.1; with AVX-512 instructions for it (AMD EPYC,
# family 26, model 2) these layers reach 1.4 to 1.5 and whole training steps 1.4 (the demo's network) to 2.0
# (NF-ResNet-50). A gain below this would not be worth the rounding, and could be noise.
LEAST_GAIN = 1.2
# The measured layers: a 3x3 and a 1x1 convolution, at a size that takes a few milliseconds in float32. With 64
# channels, the conversions around the products take as long as the products.
CHANNELS, SIDE, IMAGES, ROUNDS = 128, 14, 8, 5
# One image comes first. If bfloat16 takes this many times as long already, a larger batch would only cost time.
HOPELESS = 2.0
# The time that the thread computes, without that of other programs. Windows counts it in steps of 16 ms.
CLOCK = time.perf_counter if os.name == "nt" else time.thread_time


class Precision(NamedTuple):
    """A data type of activations, and the reason for it."""

    name: Literal["float32", "bfloat16"]
    reason: str


def native_precision(device: torch.device) -> Precision:
    """Return the data type that "auto" means on `device`."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        computes = "computes" if native else "does not compute"
        return Precision("bfloat16" if native else "float32", f"this GPU {computes} bfloat16 natively")
    if device.type != "cpu":
        return Precision("float32", f"bfloat16 has not been measured on {device.type}")
    gain = cpu_gain()
    reason = f"convolutions in bfloat16 take {1 / gain:.2f} times as long as in float32 on this CPU"
    return Precision("bfloat16" if gain >= LEAST_GAIN else "float32", reason)


@cache
def cpu_gain() -> float:
    """Return how many times as fast this CPU computes convolutions and their gradients in bfloat16 as in float32.

    Measured on one thread and by its own time, so that other programs on the machine change little. Takes about 0.1 s
    at the first call, and draws no random numbers.
    """
    gain, threads = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for images in (1, IMAGES):
            passes = {half: _layers(images, half=half) for half in (False, True)}
            gain = ratio_of_medians(passes[False], passes[True], rounds=ROUNDS)
            if gain < 1 / HOPELESS:
                break
    finally:
        torch.set_num_threads(threads)
    return gain


def ratio_of_medians(
    slow: Callable[[], object],
    fast: Callable[[], object],
    *,
    rounds: int,
    clock: Callable[[], float] = CLOCK,
) -> float:
    """Return the median time of `slow` divided by that of `fast`, in alternating calls after one call of each."""
    spent: dict[Callable[[], object], list[float]] = {slow: [], fast: []}
    for number in range(rounds + 1):
        for run, own in spent.items():
            start = clock()
            run()
            if number:
                own.append(clock() - start)
    medians = [statistics.median(own) for own in spent.values()]
    return medians[0] / medians[1]


def _layers(images: int, *, half: bool) -> Callable[[], object]:
    """Return a function that runs two convolutions forward and backward; `half` uses autocast to bfloat16."""

    def values(*shape: int) -> Tensor:
        ramp = torch.linspace(-1.0, 1.0, torch.Size(shape).numel()).view(shape)
        return ramp.contiguous(memory_format=torch.channels_last).requires_grad_()

    x, filters, matrix = (
        values(*shape)
        for shape in (
            (images, CHANNELS, SIDE, SIDE),
            (CHANNELS, CHANNELS, 3, 3),
            (CHANNELS, CHANNELS, 1, 1),
        )
    )

    def run() -> None:
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = conv2d(x, filters, None, act=None, stride=1, groups=1, padding="same")
                y = conv2d(y, matrix, None, act=None, stride=1, groups=1, padding="same")
            # of a scalar: for other gradients, PyTorch imports its symbolic shapes, in a second
            torch.autograd.grad(y.square().sum(), (x, filters, matrix))

    return run


def with_precision(config: Config, stored: Path, *, world: World, run_log: RunLog) -> Config:
    """Return a config with a data type in place of "auto", the same in all processes.

    A run that has begun keeps its data type: that of the config file `stored`, if there is one. The log tells which one
    it is and why, unless the config names float32. Every process makes the call.

    Raises:
        ConfigError: the file cannot be read.
    """
    chosen = None
    with world.all_or_none():
        if world.is_main:
            chosen = _chosen(config, stored, world.device)
    precision = world.all_gather(chosen)[0]
    assert precision is not None
    if precision.reason:
        run_log.info(f"precision {precision.name}: {precision.reason}")
    return config.model_copy(update={"precision": precision.name})


def without_auto(config: Config, device: torch.device) -> Config:
    """Return the config with the data type that "auto" means on `device`."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": native_precision(device).name})


def _chosen(config: Config, stored: Path, device: torch.device) -> Precision:
    """Return the data type of a run, and the reason; the reason is empty if it needs no explanation."""
    name, reasons = config.precision, []
    if name == "auto" and stored.is_file():
        name, reasons = load_config(stored).precision, [f"as when {stored.parent} was started"]
    if name == "auto":
        return native_precision(device)
    if name == "bfloat16" and device.type == "cpu" and (gain := cpu_gain()) < 1.0:
        reasons.append(f"WARNING: it takes {1 / gain:.1f} times as long as float32 on this CPU")
    return Precision(name, "; ".join(reasons))
