"""The contrastive losses against loops over anchors, pairs and triplets, and their invariances."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from normfree.training.objectives import contrastive_loss, nt_xent, triplet_loss


@pytest.fixture
def embeddings() -> Tensor:
    return torch.randn(9, 5, dtype=torch.float64, requires_grad=True)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3])  # the last label has no positive


def unit_distances(embeddings: Tensor) -> list[list[Tensor]]:
    unit = F.normalize(embeddings, dim=1)
    return [[(u - v).norm() for v in unit] for u in unit]


def mean_of_positive(losses: list[Tensor]) -> Tensor:
    counted = [loss for loss in losses if loss > 0]
    return torch.stack(counted).mean() if counted else torch.zeros((), dtype=torch.float64)


def triplets(labels: Tensor) -> list[tuple[int, int, int]]:
    n = range(len(labels))
    return [
        (a, p, q)
        for a, p, q in product(n, n, n)
        if a != p and labels[a] == labels[p] and labels[a] != labels[q]
    ]


def assert_same_value_and_gradient(found: Tensor, expected: Tensor, embeddings: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss, embeddings, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_is_the_sum_over_anchors(embeddings, temperature):
    first, second = embeddings[:4], embeddings[4:8]
    unit = F.normalize(torch.cat([first, second]), dim=1)
    losses = []
    for anchor in range(8):
        others = [(unit[anchor] @ unit[k] / temperature).exp() for k in range(8) if k != anchor]
        positive = (unit[anchor] @ unit[(anchor + 4) % 8] / temperature).exp()
        losses.append(-(positive / torch.stack(others).sum()).log())
    found = nt_xent(first, second, temperature=temperature)
    assert_same_value_and_gradient(found, torch.stack(losses).mean(), embeddings)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("margin", [0.05, 0.4])
def test_triplet_loss_is_the_mean_over_all_triplets(embeddings, margin, swap):
    d = unit_distances(embeddings)
    losses = []
    for a, p, n in triplets(LABELS):
        negative = torch.minimum(d[a][n], d[p][n]) if swap else d[a][n]
        losses.append(F.relu(d[a][p] - negative + margin))
    found = triplet_loss(embeddings, LABELS, margin=margin, swap=swap)
    assert_same_value_and_gradient(found, mean_of_positive(losses), embeddings)


def test_hard_mining_takes_the_farthest_positive_and_the_nearest_negative(embeddings):
    d = unit_distances(embeddings)
    losses = []
    for a in range(8):
        positive = max(d[a][p] for p in range(9) if p != a and LABELS[p] == LABELS[a])
        negative = min(d[a][n] for n in range(9) if LABELS[n] != LABELS[a])
        losses.append(F.relu(positive - negative + 0.4))
    found = triplet_loss(embeddings, LABELS, margin=0.4, mining="hard")
    assert_same_value_and_gradient(found, mean_of_positive(losses), embeddings)


def test_semihard_mining_takes_negatives_within_the_margin(embeddings):
    d = unit_distances(embeddings)
    gaps = [d[a][p] - d[a][n] for a, p, n in triplets(LABELS)]
    losses = [gap + 0.4 for gap in gaps if -0.4 < gap < 0]
    found = triplet_loss(embeddings, LABELS, margin=0.4, mining="semihard")
    assert_same_value_and_gradient(found, mean_of_positive(losses), embeddings)


def test_semihard_triplets_are_chosen_before_the_swap(embeddings):
    """As pytorch-metric-learning's miner and loss in sequence."""
    distance = unit_distances(embeddings)
    losses = [
        F.relu(distance[a][p] - torch.minimum(distance[a][n], distance[p][n]) + 0.4)
        for a, p, n in triplets(LABELS)
        if 0 < distance[a][n] - distance[a][p] < 0.4
    ]
    found = triplet_loss(embeddings, LABELS, margin=0.4, mining="semihard", swap=True)
    assert_same_value_and_gradient(found, mean_of_positive(losses), embeddings)
    assert any(float(loss.detach()) > 0.4 for loss in losses)  # with the swap, farther than the negative


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(embeddings, dtype):
    half = embeddings.detach().to(dtype).requires_grad_()
    for loss in (contrastive_loss, triplet_loss):
        found = loss(half, LABELS)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(half.detach().float(), LABELS))
        assert torch.autograd.grad(found, half)[0].dtype == dtype


@pytest.mark.parametrize("mining", ["all", "hard", "semihard"])
def test_embeddings_that_are_no_numbers_are_not_a_loss_of_0(embeddings, mining):
    broken = embeddings.detach().clone()
    broken[0] = math.nan
    assert triplet_loss(broken, LABELS, mining=mining).isnan()


@pytest.mark.parametrize(("positive_margin", "negative_margin"), [(0.0, 1.0), (0.3, 1.6)])
def test_contrastive_loss_is_the_mean_over_each_kind_of_pair(embeddings, positive_margin, negative_margin):
    d = unit_distances(embeddings)
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    pull = [F.relu(d[i][j] - positive_margin) for i, j in pairs if LABELS[i] == LABELS[j]]
    push = [F.relu(negative_margin - d[i][j]) for i, j in pairs if LABELS[i] != LABELS[j]]
    found = contrastive_loss(
        embeddings, LABELS, positive_margin=positive_margin, negative_margin=negative_margin
    )
    assert_same_value_and_gradient(found, mean_of_positive(pull) + mean_of_positive(push), embeddings)


def losses_of(x: Tensor, labels: Tensor) -> list[Tensor]:
    half = len(x) // 2
    mined = [triplet_loss(x, labels, mining=mining) for mining in ("all", "hard", "semihard")]
    return [nt_xent(x[:half], x[half:]), *mined, contrastive_loss(x, labels)]


def test_losses_depend_neither_on_scale_nor_on_order(embeddings):
    x, labels = embeddings[:8], LABELS[:8]
    order = torch.tensor([2, 0, 3, 1])
    both = torch.cat([order, order + 4])
    scaled = x * torch.linspace(0.5, 3.0, 8, dtype=x.dtype)[:, None]
    for changed, ids in ((scaled, labels), (x[both], labels[both])):
        torch.testing.assert_close(losses_of(changed, ids), losses_of(x, labels), rtol=1e-12, atol=1e-12)


def test_collapsed_embeddings_have_finite_gradients():
    x = torch.ones(8, 5, requires_grad=True)
    losses = losses_of(x, LABELS[:8])
    assert losses[0].item() == pytest.approx(
        math.log(7), abs=1e-6
    )  # every other view is as near as the positive
    (gradient,) = torch.autograd.grad(sum(losses), x)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y: nt_xent(x, x[:3]),
            r"first is \(8, 5\) and second \(3, 5\). Allowed: two tensors of one shape",
        ),
        (lambda x, y: nt_xent(x, x, temperature=0.0), "temperature is 0.0. Allowed: above 0."),
        (
            lambda x, y: triplet_loss(x, y[:3]),
            r"embeddings are \(8, 5\) and labels \(3,\). Allowed: N x D and N.",
        ),
        (lambda x, y: triplet_loss(x, y, mining="semi"), "unknown mining 'semi'. Did you mean 'semihard'?"),
        (lambda x, y: contrastive_loss(x, y, negative_margin=3.0), "a margin is 3.0. Allowed: 0 to 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(8, 5), LABELS[:8])
