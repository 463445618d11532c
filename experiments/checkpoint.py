"""The checkpoint of a training inside a cell: written now and then, and when a signal arrives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from normfree.files import atomic_write
from normfree.training.stop import Stop, StoppedBySignal

SAVE_EVERY = 60.0  # seconds between two checkpoints


class Saved(Protocol):
    """A training whose state can be saved."""

    def state(self) -> Mapping[str, Any]:
        """Return tensors, numbers, lists and dictionaries."""
        ...


class StateFile:
    """The file state.pt of a cell's folder, and the CPU time that the cell took so far.

    Args:
        folder: of the cell; the training continues if it has a checkpoint.
        device: where its tensors go.

    Attributes:
        state: what the training saved; None at the start.
        step: optimizer steps taken.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.path, self.step, self._spent = folder / "state.pt", 0, 0.0
        self.state: Mapping[str, Any] | None = None
        self._begun, self._saved_at = time.process_time(), time.monotonic()
        if self.path.exists():
            saved = torch.load(self.path, map_location=device, weights_only=True)
            self.state, self.step, self._spent = saved["state"], saved["step"], saved["cpu_seconds"]

    @property
    def cpu_seconds(self) -> float:
        """The CPU time of the cell, in this process and before."""
        return round(self._spent + time.process_time() - self._begun, 3)

    def keep(self, step: int, training: Saved, stop: Stop) -> None:
        """Before step number `step`: save if it is time, and end if a signal has arrived.

        Raises:
            StoppedBySignal: a signal has arrived; the state is saved.
        """
        if stop.number or time.monotonic() - self._saved_at > SAVE_EVERY:
            content = {"state": training.state(), "step": step, "cpu_seconds": self.cpu_seconds}
            atomic_write(self.path, lambda target: torch.save(content, target))
            self._saved_at = time.monotonic()
        if stop.number:
            raise StoppedBySignal(step, stop.number)

    def remove(self) -> None:
        """Remove the file, at the end of the training."""
        self.path.unlink(missing_ok=True)
