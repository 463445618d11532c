"""metrics.jsonl and the running means that are written to it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normfree.diagnose.metrics_file import LIMIT, row_in
from normfree.files import atomic_write_text, read_bytes


class MetricsWriter:
    """Writer of metrics.jsonl, one JSON object per line.

    Lines after `step`, which a killed run may have written after its last checkpoint, are removed first, and so are
    damaged ones. While the disk is full, lines are kept in memory and written later.

    Args:
        path: the file.
        step: the step after which the run continues.
        expected: what `state` returned when that checkpoint was saved; empty if that is not known.

    Attributes:
        damaged: whether the lines up to `step` are not those that `expected` describes.
    """

    def __init__(self, path: Path, *, step: int, expected: Mapping[str, Any] | None = None) -> None:
        self.path = path
        lines: list[str] = []
        if path.exists():
            lines = read_bytes(path, limit=LIMIT).decode("utf-8", "replace").splitlines()
        rows = [(line, row_in(line)) for line in lines]
        kept = "".join(line + "\n" for line, row in rows if row is not None and row["step"] <= step)
        self._digest = hashlib.sha256(kept.encode())
        self._size = self._written = len(kept.encode())
        self.damaged = bool(expected) and self.state() != expected
        self._pending: list[bytes] = []
        atomic_write_text(path, kept)
        self._file = path.open("r+b", buffering=0)

    def write(self, **values: Any) -> None:
        """Write one object to the operating system at once, so that it is kept if the process is killed."""
        line = (json.dumps(values) + "\n").encode()
        self._pending.append(line)
        self._digest.update(line)
        self._size += len(line)
        with contextlib.suppress(OSError):  # `flush` tries again
            self.flush()

    def flush(self) -> None:
        """Write the lines that the disk has not taken yet.

        Raises:
            OSError: it still does not take them.
        """
        while self._pending:
            self._file.seek(self._written)  # over a part of a line that a full disk took
            self._file.truncate()
            line = self._pending[0]
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._written += len(self._pending.pop(0))

    def state(self) -> dict[str, Any]:
        """Return size and SHA-256 of all lines, by which a checkpoint knows them again."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self.flush()
        self._file.close()


class NullMetricsWriter:
    """`MetricsWriter` of processes other than rank 0, which writes nothing."""

    def write(self, **values: Any) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

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
