"""`clip_grad_`, `SGD.step` and `Ema.update_` in one sweep over memory, for CPUs: the same bits in less time.

Each of the three calls walks over all weights, which are far larger than the cache. Here parameters go through all
three a bucket at a time, so that what one has read lies in the cache for the next. Only the norms of gradients come
before: nothing may move unless all gradients are finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from normfree.optim.agc import Batch, ClipReport, Entry, checked_total, gradient_entries, tensor_norms
from normfree.optim.ema import Ema, ema_decay
from normfree.optim.sgd import SGD
from normfree.optim.sharded import is_sharded

#: Elements of a bucket: weight, gradient, momentum and average of so many are 16 MB in float32, half of the last cache
#: of a server's core complex. A tensor is not divided.
BUCKET = 1 << 20


class _Bucket(NamedTuple):
    """Neighbours of one parameter group."""

    group: int
    entries: list[Entry]


class SweepUpdate:
    """One step of `optimizer`, which moves `model`, and of its average `ema`, with adaptive gradient clipping.

    Results are those of `clip_grad_(optimizer.param_groups, mode="agc", ...)`, `optimizer.step()` and
    `ema.update_(model, step=step)`, bit for bit.
    """

    def __init__(self, optimizer: SGD, *, model: nn.Module, ema: Ema, eps: float = 1e-3) -> None:
        self.optimizer, self.model, self.ema, self.eps = optimizer, model, ema, eps

    @staticmethod
    def fits(optimizer: SGD) -> bool:
        """Whether all parameters lie whole on the CPU, and their groups say how they are clipped."""
        groups = optimizer.param_groups
        tensors = [p for group in groups for p in group["params"]]
        whole = all(p.device.type == "cpu" and not is_sharded(p) for p in tensors)
        return whole and all("clipping" in group for group in groups)

    @torch.no_grad()
    def step_(self, *, step: int) -> ClipReport:
        """Moves weights, momentum and average; the gradients are left as clipped.

        Raises:
            NonFiniteGradientError: a gradient is not finite; nothing was moved.
            ValueError: a gradient is sparse, or the tensors of `model` are not those of the average.
        """
        shadows = dict(self.ema.pairs(self.model))
        buckets = list(self._buckets())
        entries = [entry for bucket in buckets for entry in bucket.entries]
        batches = [Batch(bucket.entries, None) if _clips(bucket) else None for bucket in buckets]
        here = [batch.grad_norm for batch in batches if batch is not None]
        exempt = [e.grad for bucket in buckets if not _clips(bucket) for e in bucket.entries]
        grad_norm = checked_total(here, tensor_norms(exempt, None), entries, True, None)
        weight = 1.0 - ema_decay(step, decay=self.ema.decay, ramp=self.ema.ramp)
        counts = []
        for bucket, batch in zip(buckets, batches, strict=True):
            if batch is not None:
                counts.append(batch.clip_(self.eps))
            params = [e.parameter for e in bucket.entries]
            self.optimizer.update_(params, self.optimizer.param_groups[bucket.group])
            self.ema.average_([(p, shadows.pop(p)) for p in params if p in shadows], weight)
        self.ema.average_(list(shadows.items()), weight)  # what the optimizer does not move
        units = sum(len(norms) for norms in here)
        clipped = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.long)
        fraction = clipped / units if units else torch.zeros_like(grad_norm)
        return ClipReport(fraction.to(torch.float32), units, grad_norm)

    def _buckets(self) -> Iterator[_Bucket]:
        """All parameters that have a gradient, in the order of the groups."""
        for index, group in enumerate(self.optimizer.param_groups):
            entries: list[Entry] = []
            elements = 0
            for entry in gradient_entries([group], 0.0):
                size = entry.parameter.numel()
                if entries and elements + size > BUCKET:
                    yield _Bucket(index, entries)
                    entries, elements = [], 0
                entries.append(entry)
                elements += size
            if entries:
                yield _Bucket(index, entries)


def _clips(bucket: _Bucket) -> bool:
    return bucket.entries[0].clipping > 0.0
