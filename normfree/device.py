"""normfree.device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


def run_device(word: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU; other words are torch's.

    Raises:
        ValueError: no such device here.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {word!r} cannot be used here: {str(error).splitlines()[0]} Use 'auto'."
        ) from None
    return device
