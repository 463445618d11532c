"""The loss of a batch for each value of the config's `objective`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from normfree.suggest import problem, unknown
from normfree.training.choices import EMBEDDINGS, OBJECTIVES, Choice, parse_choice
from normfree.training.objectives import MINING, contrastive_loss, nt_xent, triplet_loss

# Takes logits B K and targets B K; returns the sum over the images, so that micro-batches add up to their batch. For
# embeddings: takes embeddings B D and labels B of a whole batch, and returns its loss.
BatchLoss = Callable[[Tensor, Tensor], Tensor]


def batch_loss(objective: str) -> BatchLoss:
    """Return the loss that a value of `objective` names."""
    choice = parse_choice(objective, OBJECTIVES)
    if choice.name in EMBEDDINGS:
        return embedding_loss(choice)
    if choice.name == "classify":
        return cross_entropy
    threshold, total = choice["threshold"], choice["sum"]
    return lambda logits, targets: binary_cross_entropy(logits, targets, threshold=threshold, total=total)


def embedding_loss(choice: Choice) -> BatchLoss:
    """Return the loss of the embeddings of a whole batch. With simclr, two views of an image are neighbors in it.

    Raises:
        ValueError: an option is out of range.
    """
    if choice.name == "simclr":
        temperature = choice["temperature"]
        if not temperature > 0 or choice["dim"] < 1:
            given = f"objective 'simclr' with temperature={temperature:g},dim={choice['dim']}"
            raise ValueError(problem(given, allowed="a temperature above 0, a dim of 1 or more"))
        return lambda z, _: nt_xent(z[0::2], z[1::2], temperature=temperature)
    margin = choice["margin"]
    if not 0 <= margin <= 2:
        given = f"objective {choice.name!r} with margin={margin:g}"
        raise ValueError(problem(given, allowed="0 to 2, the distances of unit vectors"))
    if choice.name == "pairwise":
        return lambda z, labels: contrastive_loss(z, labels, negative_margin=margin)
    mining = choice["mining"]
    if mining not in MINING:
        raise ValueError(unknown("mining", mining, MINING))
    return lambda z, labels: triplet_loss(z, labels, margin=margin, mining=mining)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the softmax cross entropy with soft targets, summed over the images."""
    return F.cross_entropy(logits, targets, reduction="sum")


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, threshold: float = 0.0, total: bool = False
) -> Tensor:
    """Return the binary cross entropy of each class, averaged over the classes and summed over the images.

    Args:
        logits: B K.
        targets: B K in [0, 1].
        threshold: above 0, targets above it become 1 and the others 0.
        total: sum over the classes too.

    Source: Wightman et al. 2021 (arXiv 2110.00476); timm's `BinaryCrossEntropy`.
    """
    if threshold > 0.0:
        targets = (targets > threshold).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss if total else loss / logits.shape[1]
