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
    owner = _owner(source, 0)[0] if len(source) else source
    return cast(MultiLabelSource, owner) if hasattr(owner, "labels") else None


def targets_of(source: Source, indices: Sequence[int]) -> Tensor:
    """Return a row for each sample, with 1 for its classes and 0 for the others, float32 B K."""
    numbers = {name: number for number, name in enumerate(source.classes)}
    rows = torch.zeros(len(indices), len(source.classes))
    for row, index in zip(rows, indices, strict=True):
        owner, own = _owner(source, index)
        several = (
            cast(MultiLabelSource, owner).labels(own) if hasattr(owner, "labels") else (owner.label(own),)
        )
        row[[numbers[owner.classes[k]] for k in several]] = 1.0
    return rows


def _owner(source: Source, index: int) -> tuple[Source, int]:
    """Return the source, and its index, that a sample of a subset, union or relabeled source comes from."""
    while (inner := getattr(source, "base", None) or getattr(source, "origin", None)) is not None:
        source, index = inner(index)
    return source, index
