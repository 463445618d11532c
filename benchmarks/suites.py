"""The table of suites: names, devices and time budgets. A suite is a module with a function that returns cases."""

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
from normfree.training.precision import native_precision


@dataclass(frozen=True)
class Suite:
    """One entry of the table.

    Args:
        name: name on the command line.
        module: has `cases(device, ...)`, which returns the suite's cases quickly, and `ABOUT`, the text of its page.
        cpu_s: default time budget on a CPU in seconds; 0 if the suite does not run there.
        gpu_s: the same on a GPU.
        needs: import names of packages that the library does not depend on.
        options: further arguments of `cases`.
        one_core: whether it runs on a single core.
        by_name: whether it runs on a CPU only if it is named.
        extra: the extra of normfree that installs what it needs.
        folders: what the folder of --data must contain, if the suite cannot run without it.
        refuses: returns why it cannot run on a device, or "".
    """

    name: str
    module: str
    cpu_s: float
    gpu_s: float
    needs: tuple[str, ...] = ("timm",)
    options: tuple[tuple[str, Any], ...] = ()
    one_core: bool = False
    by_name: bool = False
    extra: str = "bench"
    folders: tuple[str, ...] = ()
    refuses: Callable[[torch.device], str] = lambda device: ""

    def obstacle(self, device: torch.device) -> str:
        """Return why the suite cannot run here, or ""."""
        if not self.budget(device):
            return f"it has no cases for {device.type}"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} missing: pip install -e '.[{self.extra}]'"
        return self.refuses(device)

    @property
    def reads_data(self) -> bool:
        """Whether --data means something to the suite."""
        return "data" in dict(self.options)

    def budget(self, device: torch.device) -> float:
        """Return the default time budget in seconds."""
        return self.gpu_s if device.type == "cuda" else self.cpu_s

    def about(self) -> str:
        """Return the text of the page."""
        return str(import_module(f"benchmarks.{self.module}").ABOUT)

    def cases(self, device: torch.device, data: Path | None) -> list[Case]:
        """Return the cases; `data` is the folder of CIFAR-10, for the suite that uses it."""
        options = {key: data if key == "data" else value for key, value in self.options}
        return list(import_module(f"benchmarks.{self.module}").cases(device, **options))


def _no_compiler(device: torch.device) -> str:
    """Return a message if `torch.compile` has no C++ compiler."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    return "" if found or device.type == "cuda" else "there is no C++ compiler for torch.compile"


def _slow_in_bfloat16(device: torch.device) -> str:
    """Return a message if `precision = "auto"` is not bfloat16 here."""
    found = native_precision(device)
    return "" if found.name == "bfloat16" else found.reason


# A GPU budget of 540 s leaves one of ten minutes for the start; on a CPU the budgets add up to less than 20 minutes.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("training", "training", 425, 540),
        Suite(
            "training_bfloat16",
            "training",
            300,
            0,
            options=(("half", True),),
            by_name=True,
            refuses=_slow_in_bfloat16,
        ),
        Suite("training_others", "training", 600, 0, options=(("others", True),), by_name=True),
        Suite("update", "update", 85, 300),
        Suite("inference", "inference", 228, 540),
        # Inductor takes about a minute for each network, batch size and side on a CPU.
        Suite(
            "inference_runtimes",
            "inference",
            5400,
            0,
            needs=("timm", "onnxruntime", "openvino", "nncf"),
            options=(("every_runtime", True),),
            by_name=True,
            extra="interop",
            refuses=_no_compiler,
        ),
        Suite("memory", "memory", 100, 300),
        Suite("loading", "loading", 60, 0, needs=("skimage", "kornia_rs", "simplejpeg"), one_core=True),
        Suite("small_scale", "small_scale", 70, 540, options=(("data", None),)),
        Suite("startup", "startup", 150, 0),
        Suite("growth", "growth", 900, 0, needs=("timm", "skimage"), by_name=True),
        Suite(
            "whole_job",
            "whole_job",
            4 * 3600,
            0,
            options=(("data", None),),
            by_name=True,
            folders=("train", "test"),
        ),
        Suite("convolutions", "convolutions", 150, 400, by_name=True),
        Suite(
            "spectrogram",
            "spectrogram",
            1200,
            0,
            needs=("timm", "onnxruntime", "openvino", "nncf"),
            one_core=True,
            by_name=True,
            extra="interop",
            refuses=_no_compiler,
        ),
    )
}
