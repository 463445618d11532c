"""What a run says: metrics.jsonl always, and one live line on a terminal (or a line now and then in a file)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class MetricsWriter:
    """Appends objects to `metrics.jsonl`. Opened at a step, it drops what a killed run had written beyond it."""

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
        work = path.with_name(f".{path.name}.tmp")  # a kill in the middle must not cost the lines so far
        work.write_text("".join(kept), encoding="utf-8")
        work.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """One object; flushed, so that it outlives the process."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class NullMetricsWriter:
    """`MetricsWriter` of a process that writes nothing."""

    def write(self, **values: Any) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Meter:
    """Means over the steps since it was last read. Keeps tensors where they are, so that a GPU is not waited for.

    A checkpoint takes its `state` along, and a new meter continues from it, so that the row after a stop covers the
    steps before it as well.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._start()
        if state:
            self._losses += [torch.tensor(x) for x in state["losses"]]
            self._corrects += [torch.tensor(x) for x in state["corrects"]]
            self._images, self._since = state["images"], time.monotonic() - state["seconds"]

    def _start(self) -> None:
        self._losses: list[Tensor] = []
        self._corrects: list[Tensor] = []
        self._images, self._since = 0, time.monotonic()

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """One step: its mean loss, its correct answers, its images."""
        self._losses.append(loss)
        self._corrects.append(correct)
        self._images += images

    def read(self) -> dict[str, float]:
        """Mean loss, train_top1 in percent and images per second since the last reading; then starts anew."""
        seconds = max(1e-9, time.monotonic() - self._since)
        values = {
            "loss": float(_stack(self._losses).mean()),
            "train_top1": 100.0 * float(_stack(self._corrects).sum()) / self._images,
            "images_per_s": round(self._images / seconds, 1),
        }
        self._start()
        return values

    def state(self) -> dict[str, Any]:
        """What has been added since the last reading, as plain numbers; exact for float32. Waits for a GPU."""
        return {
            "losses": _stack(self._losses).tolist() if self._losses else [],
            "corrects": _stack(self._corrects).tolist() if self._corrects else [],
            "images": self._images,
            "seconds": time.monotonic() - self._since,
        }


def _stack(values: list[Tensor]) -> Tensor:
    return torch.stack([v.to(values[-1].device) for v in values])  # those of a checkpoint lie on the CPU
