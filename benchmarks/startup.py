"""Startup times: imports and the command, each in a new process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.arms import Arm
from benchmarks.harness import Bench, Case, compare
from benchmarks.summary import Comparison

ABOUT = (
    "Milliseconds from the start of a process to its end, with files in the system's cache. Any program that uses "
    "PyTorch waits for `import torch`. The gate requires that each process succeeds and prints the expected text."
)
ROUNDS = 7  # each takes ten seconds
IMPORTS = (
    "import timm",
    "import torch",
    "import normfree",
    "from normfree import create_model",
)
VERBS = {"--help": "normfree", "list": "nfnet_f0"}  # verb -> expected text


def cases(device: torch.device) -> list[Case]:
    """Return one case with all measurements."""
    return [Case("startup", ("startup",), measure)]


def measure(bench: Bench) -> list[Comparison]:
    """Compare all processes; timm's import is the baseline."""
    command = [str(Path(sys.executable).with_name("normfree"))]
    if shutil.which(command[0]) is None:
        command = [sys.executable, "-m", "normfree"]
    arms = [_arm(code, [sys.executable, "-c", code], "") for code in IMPORTS]
    arms += [_arm(f"normfree {verb}", [*command, verb], expected) for verb, expected in VERBS.items()]
    # No window: a call that starts a process needs no warm-up besides that of the gate.
    timed = replace(bench, window_s=0.0, rounds=min(ROUNDS, bench.rounds))
    (found,) = compare(timed, "startup", arms)
    return [beyond_torch(found)]


def beyond_torch(found: Comparison) -> Comparison:
    """Add the difference of each median from that of `import torch` as a fact."""
    torch_ms = next(t.median for t in found.timings if t.arm == "import torch")
    timings = (replace(t, facts={"beyond_torch_ms": t.median - torch_ms}) for t in found.timings)
    return replace(found, timings=tuple(timings))


def _arm(name: str, args: Sequence[str], expected: str) -> Arm:
    """Return the arm that runs `args`."""
    return Arm(name, partial(process, args, expected))


def process(args: Sequence[str], expected: str) -> Tensor:
    """Run a process; return 1 if it succeeds and prints `expected`, else 0."""
    done = subprocess.run(args, capture_output=True, text=True)
    return torch.tensor([float(done.returncode == 0 and expected in done.stdout)])
