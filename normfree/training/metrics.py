"""metrics.jsonl and the running means that are written to it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.files import atomic_write_text


class MetricsWriter:
    """Writer of metrics.jsonl, one JSON object per line.

    Lines after `step`, which a killed run may have written after its last checkpoint, are removed first.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    continue
        atomic_write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Write one object and flush it to the operating system, so that it is kept if the process is killed."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class NullMetricsWriter:
    """`MetricsWriter` of processes other than rank 0, which writes nothing."""

    def write(self, **values: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Meter:
    """Means over the steps since the last `read`. Tensors stay on their device, so `add` does not wait for a GPU.

    A checkpoint stores its `state`, from which a new meter continues, so that the first line after a stop also covers
    the steps before it.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._start()
        if state:
            self._losses += [torch.tensor(x) for x in state["losses"]]
            self._corrects += [torch.tensor(x) for x in state["corrects"]]
            self._images, self._since = state["images"], time.monotonic() - state["seconds"]

    def _start(self) -> None:
        """Reset all sums."""
        self._losses: list[Tensor] = []
        self._corrects: list[Tensor] = []
        self._images, self._since = 0, time.monotonic()

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Add one step: its mean loss, number of correct predictions and number of images."""
        self._losses.append(loss)
        self._corrects.append(correct)
        self._images += images

    def read(self) -> dict[str, float]:
        """Return the mean loss, train_top1 in percent and images per second since the last `read`, and reset them."""
        seconds = max(1e-9, time.monotonic() - self._since)
        values = {
            "loss": float(_stack(self._losses).mean()),
            "train_top1": 100.0 * float(_stack(self._corrects).sum()) / self._images,
            "images_per_s": round(self._images / seconds, 1),
        }
        self._start()
        return values

    def state(self) -> dict[str, Any]:
        """Return what was added since the last `read` as Python numbers, exact for float32. Waits for a GPU."""
        return {
            "losses": _stack(self._losses).tolist() if self._losses else [],
            "corrects": _stack(self._corrects).tolist() if self._corrects else [],
            "images": self._images,
            "seconds": time.monotonic() - self._since,
        }


def _stack(values: list[Tensor]) -> Tensor:
    """Stack scalars on the device of the newest one; those of a checkpoint are on the CPU."""
    return torch.stack([v.to(values[-1].device) for v in values])
