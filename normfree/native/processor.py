"""The kind of CPU, by which the algorithms of `normfree.ops` are chosen."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch


def processor_kind() -> str:
    """Return PyTorch's name of the widest registers that it uses, "AVX2" or "AVX512", or "AVX512 AMD".

    The kind, and not a measurement in the process, decides which algorithm is used: the bits of a result must not
    depend on how busy the machine is. AMD's CPUs with AVX-512 are a kind of their own because MKL, which computes
    PyTorch's matrix products in float32, has no kernels with AVX-512 for them, while oneDNN's convolutions have. One
    model of each kind was measured (docs/speed.md).
    """
    found = torch.backends.cpu.get_cpu_capability()
    return f"{found} AMD" if found == "AVX512" and _is_amd() else found


@cache
def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")  # of Linux; elsewhere the processor's name contains it
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else platform.processor()
    return "AuthenticAMD" in text
