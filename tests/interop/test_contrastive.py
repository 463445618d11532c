"""Losses equal those of pytorch-metric-learning and lightly, which also run under the exact cached gradient."""

import pytest
import torch

from normfree import cached_backward, contrastive_loss, create_model, nt_xent, triplet_loss
from normfree.embeddings import nearest_of_same_label, recall_at_1

PML, LIGHTLY = "pytorch-metric-learning", "lightly"


@pytest.fixture
def pml():
    return pytest.importorskip("pytorch_metric_learning")


def embeddings(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    return values, torch.arange(count) % 5


def same(ours, theirs, values: torch.Tensor) -> None:
    """Compare two losses and their gradients."""
    (a,), (b,) = (torch.autograd.grad(loss, values) for loss in (ours, theirs))
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.works(PML, "nt_xent")
def test_nt_xent_equals_that_of_pytorch_metric_learning(pml):
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    z, _ = embeddings()
    theirs = SelfSupervisedLoss(NTXentLoss(temperature=0.3))(z[:12], z[12:])
    same(nt_xent(z[:12], z[12:], temperature=0.3), theirs, z)


@pytest.mark.works(LIGHTLY, "nt_xent")
def test_nt_xent_equals_that_of_lightly():
    loss = pytest.importorskip("lightly.loss")
    z, _ = embeddings()
    theirs = loss.NTXentLoss(temperature=0.3, memory_bank_size=0)(z[:12], z[12:])
    same(nt_xent(z[:12], z[12:], temperature=0.3), theirs, z)


@pytest.mark.works(PML, "triplet_loss")
def test_triplets_equal_those_of_pytorch_metric_learning(pml):
    from pytorch_metric_learning import losses, miners

    z, labels = embeddings()
    for swap in (False, True):
        theirs = losses.TripletMarginLoss(margin=0.3, swap=swap)(z, labels)
        same(triplet_loss(z, labels, margin=0.3, swap=swap), theirs, z)
        for mining, miner in (
            ("hard", miners.BatchHardMiner()),
            ("semihard", miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard")),
        ):
            theirs = losses.TripletMarginLoss(margin=0.3, swap=swap)(z, labels, miner(z, labels))
            same(triplet_loss(z, labels, margin=0.3, mining=mining, swap=swap), theirs, z)


@pytest.mark.works(PML, "contrastive_loss")
def test_pairs_equal_those_of_pytorch_metric_learning(pml):
    from pytorch_metric_learning.losses import ContrastiveLoss

    z, labels = embeddings()
    theirs = ContrastiveLoss(pos_margin=0.1, neg_margin=1.3)(z, labels)
    same(contrastive_loss(z, labels, positive_margin=0.1, negative_margin=1.3), theirs, z)


@pytest.mark.works(PML, "cached_backward")
def test_a_loss_of_pytorch_metric_learning_has_an_exact_cached_gradient(pml):
    from pytorch_metric_learning.losses import MultiSimilarityLoss

    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=0, skip_gain=0.5, stochdepth_rate=0.0).double()
    images, labels = torch.randn(12, 3, 16, 16, dtype=torch.float64), torch.arange(12) % 3
    loss = MultiSimilarityLoss()
    loss(net(images), labels).backward()
    whole = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad(set_to_none=True)
    cached_backward(net, images, lambda z: loss(z, labels), micro_batch=5)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert float((found - whole).norm() / whole.norm()) < 1e-12


@pytest.mark.works(LIGHTLY, "cached_backward")
def test_a_loss_of_lightly_has_an_exact_cached_gradient():
    loss = pytest.importorskip("lightly.loss").DCLLoss()
    torch.manual_seed(0)
    net = create_model("nf_resnet_nano", num_classes=8, skip_gain=0.5, stochdepth_rate=0.0).double()
    net.head.weight.data.normal_()
    views = torch.randn(12, 3, 16, 16, dtype=torch.float64)

    def contrast(z: torch.Tensor) -> torch.Tensor:
        return loss(z[0::2], z[1::2])

    contrast(net(views)).backward()
    whole = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad(set_to_none=True)
    cached_backward(net, views, contrast, micro_batch=4)
    found = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert float((found - whole).norm() / whole.norm()) < 1e-12


def test_recall_equals_a_search_with_the_distances_of_pytorch_metric_learning(pml):
    from pytorch_metric_learning.distances import CosineSimilarity

    z, labels = embeddings()
    similar = CosineSimilarity()(z.detach(), z.detach())
    similar.fill_diagonal_(-2)
    hits = labels[similar.argmax(dim=1)] == labels
    assert torch.equal(nearest_of_same_label(z.detach(), labels), hits)
    assert recall_at_1(z.detach(), labels) == pytest.approx(100 * float(hits.double().mean()))
