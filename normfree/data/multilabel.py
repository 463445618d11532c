"""Samples with several classes: how a source states them, and their targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from normfree.data.source import Source


class MultiLabelSource(Source, Protocol):
    """A source whose samples have any number of classes; `label` is the first one, or 0 if there are none."""

    def labels(self, index: int) -> tuple[int, ...]:
        """Return all classes of sample `index`."""


def as_multilabel(source: Source) -> MultiLabelSource | None:
    """Return the source that states several classes for a sample, looking through subsets and unions, else None."""
    found = _base(source, 0)[0] if len(source) else source
    return cast(MultiLabelSource, found) if hasattr(found, "labels") else None


def targets_of(source: Source, indices: Sequence[int]) -> Tensor:
    """Return a row for each sample, with 1 for its classes and 0 for the others, float32 B K."""
    rows = torch.zeros(len(indices), len(source.classes))
    for row, index in zip(rows, indices, strict=True):
        owner, own = _base(source, index)
        several = (
            cast(MultiLabelSource, owner).labels(own) if hasattr(owner, "labels") else (owner.label(own),)
        )
        row[list(several)] = 1.0
    return rows


def _base(source: Source, index: int) -> tuple[Source, int]:
    """Return the source, and its index, that a sample of a subset or union comes from."""
    while hasattr(source, "base"):
        source, index = source.base(index)
    return source, index
