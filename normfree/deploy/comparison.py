"""Comparison of an exported file with its network.

Shapes: B batch, K values of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Run = Callable[[Tensor], Tensor]

# Batch sizes at which a file is compared: one, the smallest batch above one, an odd size and a large one.
BATCHES = (1, 2, 5, 64)
# Largest allowed ||file - network|| / ||network|| of the logits of an image. Sums in a different order change the
# float32 logits of these networks by 1e-7 to 5e-6; an error in the graph changes them by far more than 1e-5.
TOLERANCE = 1e-5
# The same for modules of users, whose front ends may amplify rounding, and for OpenVINO, which sums in other orders.
WIDE_TOLERANCE = 1e-4


def joined(outputs: Any, batch: int) -> Tensor:
    """Return all tensors of an output as one, B x values; 1 x values if a tensor has no batch axis."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    size = batch if all(t.dim() and len(t) == batch for t in tensors) else 1
    return torch.cat([t.reshape(size, -1).float() for t in tensors], dim=1)


def compare(
    run: Run, net: Run, images: Tensor, *, batches: tuple[int, ...] = BATCHES
) -> tuple[dict[int, float], float]:
    """Measure the difference of two functions of images, B ... -> values B K, at each batch size of `batches`.

    Images are repeated to fill a batch.

    Returns:
        For each batch size, the largest ||run - net|| / ||net|| of the values of an image; and the percent of images
        with the same top-1 class. Two classes whose logits in `net` are closer than the tolerance count as the same.
    """
    errors: dict[int, float] = {}
    same = total = 0
    for batch in batches:
        x = images[torch.arange(batch) % len(images)].contiguous()
        expected, actual = net(x).double(), run(x).double()
        norm = expected.norm(dim=1)
        gap = (actual - expected).norm(dim=1)
        # The logits of an untrained classifier are all 0, so 0 / 0 counts as 0.
        errors[batch] = float((gap / norm).where(gap > 0, gap).max())
        chosen = expected.gather(1, actual.argmax(dim=1, keepdim=True))[:, 0]
        same += int((expected.max(dim=1).values - chosen <= 2 * WIDE_TOLERANCE * norm).sum())
        total += len(expected)
    return errors, 100 * same / total
