"""Choosing the device of a computation."""

from __future__ import annotations

import torch

from normfree.suggest import problem

KINDS = ("cpu", "cuda", "mps")


def run_device(name: str) -> torch.device:
    """Return the device called `name`, for example "cpu" or "cuda:1".

    "auto" is the first GPU (CUDA, then MPS) if there is one, else the CPU.

    Raises:
        ValueError: PyTorch does not know the device or cannot use it on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.split(":")[0] not in KINDS:
        allowed = "auto, cpu, cuda, cuda:N or mps"
        raise ValueError(problem(f"device is {name!r}", allowed=allowed, fix="use 'auto'"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            problem(f"device {name!r} cannot be used here: {reason}", fix="use 'auto'")
        ) from None
    return device
