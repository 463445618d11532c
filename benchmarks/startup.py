"""How long one waits before anything happens: imports and the command, each in a fresh process."""

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
    "Milliseconds from the start of a process to its end, files in the system's cache. `import torch` is what any "
    "program on torch waits for; the gate asks that each process ends well and prints what it should."
)
ROUNDS = 9  # each takes ten seconds
IMPORTS = (
    "import timm",
    "import torch",
    "import normfree",
    "from normfree import create_model",
)
VERBS = {"--help": "normfree", "list": "nfnet_f0"}  # and what they print


def cases(device: torch.device) -> list[Case]:
    """All in one case."""
    return [Case("startup", ("startup",), measure)]


def measure(bench: Bench) -> list[Comparison]:
    """timm's import is the baseline."""
    command = [str(Path(sys.executable).with_name("normfree"))]
    if shutil.which(command[0]) is None:
        command = [sys.executable, "-m", "normfree"]
    arms = [_arm(words, [sys.executable, "-c", words], "") for words in IMPORTS]
    arms += [_arm(f"normfree {verb}", [*command, verb], said) for verb, said in VERBS.items()]
    # a window of no length: a call that starts a process needs no warm one beside that of the gate
    timed = replace(bench, window_s=0.0, rounds=min(ROUNDS, bench.rounds))
    (found,) = compare(timed, "startup", arms)
    return [beyond_torch(found)]


def beyond_torch(found: Comparison) -> Comparison:
    """With how much longer each takes than torch's import alone, a difference of medians, as a fact."""
    torch_ms = next(t.median for t in found.timings if t.arm == "import torch")
    timings = (replace(t, facts={"beyond_torch_ms": t.median - torch_ms}) for t in found.timings)
    return replace(found, timings=tuple(timings))


def _arm(name: str, words: Sequence[str], said: str) -> Arm:
    return Arm(name, partial(process, words, said))


def process(words: Sequence[str], said: str) -> Tensor:
    """One, if the process ends well and prints `said`; else zero."""
    done = subprocess.run(words, capture_output=True, text=True)
    return torch.tensor([float(done.returncode == 0 and said in done.stdout)])
