"""Description of the machine, and its highest rates of copying and of matrix products."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normfree.native.library import library
from normfree.tools.speed import matmul_rate
from normfree.training.precision import native_precision

PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "numpy")
# Bytes of the buffer that is copied: several times the largest cache.
COPIED = {"cpu": 256 << 20, "cuda": 4 << 30}
COPIES = 7


@dataclass(frozen=True)
class Ceilings:
    """Rates of a copy (GB/s, read and written) and of a large matrix product (GFLOP/s) in `precision`."""

    copy_gb_s: float
    matmul_gflop_s: float
    precision: str


def ceilings(device: torch.device) -> Ceilings:
    """Measure the rates: the median for a copy, the best of six for a product. Takes half a second on two cores."""
    precision = "bfloat16" if device.type == "cuda" else "float32"
    source = torch.randn(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _seconds(partial(target.copy_, source), device)
    return Ceilings(rate / 1e9, matmul_rate(device, precision) / 1e9, precision)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of `COPIES` calls, after one uncounted call."""
    took = []
    for _ in range(COPIES + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def facts(device: torch.device) -> dict[str, Any]:
    """Return processor, its capability in PyTorch, threads, versions, date, and the GPU if there is one."""
    found: dict[str, Any] = {
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": "native" if native_precision(torch.device("cpu")).name == "bfloat16" else None,
        "threads": torch.get_num_threads(),
        "kernels in C": "compiled" if library() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device.type,
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return {**found, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def processor() -> str:
    """Return the name of the CPU; virtual machines often report only the maker, so family and model are added."""
    name = cpu_info("model name") or platform.processor()
    family, model = cpu_info("cpu family"), cpu_info("model\t")
    return f"{name} (family {family}, model {model})" if family and model else name


def cpu_info(entry: str) -> str:
    """Return an entry of /proc/cpuinfo ("model name", "flags"), or "" if there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(entry)), "")
