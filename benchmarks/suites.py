"""The table of suites: what each is called, where it runs, what it may take. A suite is a function that gives cases."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case
from benchmarks.machine import computes_bfloat16, cpu_info


@dataclass(frozen=True)
class Suite:
    """One row.

    module: has `cases(device, ...)`, which gives the suite's cases quickly, and `ABOUT`, the words of its page.
    cpu_s, gpu_s: seconds that it may take, by default; 0: it has nothing to say about that device.
    needs: packages beyond those of the library, as they are imported.
    options: further arguments of `cases`.
    one_core: it runs on a single core.
    by_name: it runs on a CPU only when it is named.
    """

    name: str
    module: str
    cpu_s: float
    gpu_s: float
    needs: tuple[str, ...] = ("timm",)
    options: tuple[tuple[str, Any], ...] = ()
    one_core: bool = False
    by_name: bool = False
    refuses: Callable[[torch.device], str] = lambda device: ""

    def obstacle(self, device: torch.device) -> str:
        """Why it cannot run here, or nothing."""
        if not self.budget(device):
            return f"it has nothing for {device.type}"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} missing: pip install -e '.[bench]'"
        return self.refuses(device)

    def budget(self, device: torch.device) -> float:
        """Seconds, by default."""
        return self.gpu_s if device.type == "cuda" else self.cpu_s

    def about(self) -> str:
        """What was done, in words."""
        return str(import_module(f"benchmarks.{self.module}").ABOUT)

    def cases(self, device: torch.device, data: Path | None) -> list[Case]:
        """`data`: the folder of CIFAR-10, for the suite that asks for one."""
        options = {key: data if key == "data" else value for key, value in self.options}
        return list(import_module(f"benchmarks.{self.module}").cases(device, **options))


def _no_compiler(device: torch.device) -> str:
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return "" if found or device.type == "cuda" else "there is no C++ compiler for torch.compile"


def _emulates(device: torch.device) -> str:
    computes = device.type == "cuda" or computes_bfloat16(cpu_info("flags") or cpu_info("Features"))
    return "" if computes else "this CPU emulates bfloat16"


#: On a GPU 540 s leave a minute of a call of ten for the start; on a CPU they add up to less than 20 minutes.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("training", "training", 385, 540),
        Suite(
            "training_bfloat16",
            "training",
            300,
            0,
            options=(("half", True),),
            by_name=True,
            refuses=_emulates,
        ),
        Suite("update", "update", 85, 300),
        Suite("inference", "inference", 228, 540),
        # Inductor takes minutes for each network and batch size on a CPU.
        Suite(
            "inference_compiled",
            "inference",
            900,
            0,
            options=(("compiled", True),),
            by_name=True,
            refuses=_no_compiler,
        ),
        Suite("memory", "memory", 100, 300),
        Suite("loading", "loading", 60, 0, needs=("skimage", "kornia_rs", "simplejpeg"), one_core=True),
        Suite("small_scale", "small_scale", 70, 540, options=(("data", None),)),
        Suite("startup", "startup", 190, 0),
        Suite("convolutions", "convolutions", 150, 400, by_name=True),
    )
}
