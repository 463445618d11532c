"""Losses on embeddings: contrastive learning without labels (NT-Xent) and metric learning with labels.

Pure functions of tensors, without modules or state. All distances are Euclidean distances of L2-normalized embeddings,
as in pytorch-metric-learning, whose defaults and reductions they follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.suggest import problem, unknown

MINING = ("all", "hard", "semihard")


def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Return the normalized temperature-scaled cross entropy of two views of each image (SimCLR).

    Each of the 2 N embeddings is an anchor. Its positive is the other view of the same image, its negatives are the
    other 2 N - 2 embeddings: loss = -log(exp(s_positive / t) / sum of exp(s / t) over all but the anchor itself), with
    cosine similarities s, averaged over the anchors.

    Args:
        first: embeddings of the first views, N D. They need not be normalized.
        second: embeddings of the second views, N D, in the same order.
        temperature: t, above 0.

    Returns:
        The mean loss, 0-dim.

    Raises:
        ValueError: the shapes differ or are not N D, or the temperature is not above 0.

    Examples:
        >>> import torch
        >>> views = torch.eye(4)  # four images whose two views agree and which are orthogonal to each other
        >>> normfree.nt_xent(views, views, temperature=0.1) < 0.01
        tensor(True)

    Source: Chen et al. 2020 (arXiv 2002.05709), equation 1.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        given = f"first is {tuple(first.shape)} and second {tuple(second.shape)}"
        raise ValueError(
            problem(
                given, allowed="two tensors of one shape N x D, N from 1", fix="pass one row for each image"
            )
        )
    if not temperature > 0:
        raise ValueError(
            problem(f"temperature is {temperature}", allowed="above 0", fix="pass temperature=0.5")
        )
    count = len(first)
    embeddings = F.normalize(torch.cat([first, second]), dim=1)
    logits = embeddings @ embeddings.T / temperature
    itself = torch.eye(2 * count, dtype=torch.bool, device=logits.device)
    positive = torch.arange(2 * count, device=logits.device).roll(count)
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), positive)


def triplet_loss(
    embeddings: Tensor, labels: Tensor, *, margin: float = 0.05, mining: str = "all", swap: bool = False
) -> Tensor:
    """Return the triplet loss max(0, d(a, p) - d(a, n) + margin), averaged over triplets whose loss is above 0.

    Args:
        embeddings: N D. They need not be normalized.
        labels: N integers. An anchor's positives have its label, its negatives another one.
        margin: smallest wanted difference of the distances, in [0, 2].
        mining: which triplets count. "all": every one. "hard": for each anchor the farthest positive with the nearest
            negative. "semihard": for each anchor and positive, the negatives that are farther from the anchor than the
            positive, by less than the margin.
        swap: use min(d(a, n), d(p, n)) in place of d(a, n) in the loss; the triplets are chosen without it.

    Returns:
        The mean loss, 0-dim; 0 with a zero gradient if no triplet has a loss.

    Raises:
        ValueError: a shape, the margin or the name of the mining is not allowed.

    Examples:
        >>> import torch
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> normfree.triplet_loss(embeddings, labels, margin=0.2)  # the margin is met: d(a, n) = sqrt(2)
        tensor(0.)

    Source: Schroff et al. 2015 (arXiv 1503.03832); "hard": Hermans et al. 2017 (arXiv 1703.07737); swap: Balntas et
    al. 2016.
    """
    _check(embeddings, labels, margin=margin)
    if mining not in MINING:
        raise ValueError(unknown("mining", mining, MINING))
    distance = _distances(embeddings)
    same, other = _same_and_other(labels)
    if mining == "hard":
        anchors = same.any(1) & other.any(1)
        positive = distance.detach().masked_fill(~same, -torch.inf).argmax(1)
        negative = distance.detach().masked_fill(~other, torch.inf).argmin(1)
        a, p, n = (t[anchors] for t in (torch.arange(len(labels), device=labels.device), positive, negative))
    else:
        a, p, n = (same[:, :, None] & other[:, None, :]).nonzero(as_tuple=True)
    if mining == "semihard":
        gap = (distance[a, p] - distance[a, n]).detach()
        near = ((gap < 0) & (gap > -margin)) | gap.isnan()
        a, p, n = a[near], p[near], n[near]
    to_positive, to_negative = distance[a, p], distance[a, n]
    if swap:
        to_negative = torch.minimum(to_negative, distance[p, n])
    losses = F.relu(to_positive - to_negative + margin)
    return losses.sum() / torch.count_nonzero(losses).clamp(min=1)


def contrastive_loss(
    embeddings: Tensor, labels: Tensor, *, positive_margin: float = 0.0, negative_margin: float = 1.0
) -> Tensor:
    """Return the pairwise contrastive loss of all pairs: pull pairs of one label together, push other pairs apart.

    A pair of one label costs max(0, d - positive_margin), another pair max(0, negative_margin - d). Each of the two
    kinds is averaged over its pairs with a cost above 0; the result is the sum of both means.

    Args:
        embeddings: N D. They need not be normalized.
        labels: N integers.
        positive_margin: distance below which a pair of one label costs nothing, in [0, 2].
        negative_margin: distance above which a pair of two labels costs nothing, in [0, 2].

    Returns:
        The loss, 0-dim.

    Raises:
        ValueError: a shape or margin is not allowed.

    Examples:
        >>> import torch
        >>> embeddings, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> normfree.contrastive_loss(embeddings, labels)  # the distance of two orthogonal unit vectors
        tensor(1.4142)

    Source: Hadsell et al. 2006, with distances in place of their squares, as pytorch-metric-learning's
    `ContrastiveLoss`.
    """
    for margin in (positive_margin, negative_margin):
        _check(embeddings, labels, margin=margin)
    distance = _distances(embeddings)
    same, other = _same_and_other(labels)
    pull = F.relu(distance[same] - positive_margin)
    push = F.relu(negative_margin - distance[other])
    return sum(
        (cost.sum() / torch.count_nonzero(cost).clamp(min=1) for cost in (pull, push)), distance.new_zeros(())
    )


def _check(embeddings: Tensor, labels: Tensor, *, margin: float) -> None:
    if not isinstance(labels, Tensor) or not embeddings.is_floating_point():
        given = f"labels are a {type(labels).__name__} and embeddings of type {embeddings.dtype}"
        raise ValueError(
            problem(given, allowed="tensors, embeddings of floats", fix="torch.as_tensor(labels)")
        )
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1] or not len(labels):
        given = f"embeddings are {tuple(embeddings.shape)} and labels {tuple(labels.shape)}"
        allowed = "N x D and N, N from 1"
        raise ValueError(problem(given, allowed=allowed, fix="pass one label for each embedding"))
    if not 0 <= margin <= 2:
        allowed = "0 to 2, the distances of unit vectors"
        raise ValueError(problem(f"a margin is {margin}", allowed=allowed, fix="pass margin=0.05"))


def _distances(embeddings: Tensor) -> Tensor:
    """Return the N N Euclidean distances of the normalized embeddings, in float32 or wider; the gradient of a distance
    of 0 is 0."""
    if embeddings.dtype in (torch.float16, torch.bfloat16):  # `cdist` has no implementation for them on CPUs
        embeddings = embeddings.float()
    unit = F.normalize(embeddings, dim=1)
    # Not by a matrix product: |u|² + |v|² - 2uv rounds small distances to 3e-4 in float32.
    return torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")


def _same_and_other(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return masks N N: pairs of two samples with one label, and pairs with two labels."""
    equal = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return equal & ~itself, ~equal
