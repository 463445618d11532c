"""The objective bce is timm's binary cross entropy, with smoothing, threshold and sum."""

import pytest
import torch

from normfree.data.transforms.mixing import smooth
from normfree.training.loss import binary_cross_entropy


@pytest.mark.works("timm", "objective bce")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("total", [False, True])
def test_bce_is_that_of_timm(smoothing, threshold, total):
    loss = pytest.importorskip("timm.loss").BinaryCrossEntropy
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    theirs = loss(smoothing=smoothing, target_threshold=threshold, sum_classes=total)(logits, labels)
    targets = smooth(torch.eye(5)[labels], smoothing)
    ours = binary_cross_entropy(logits, targets, threshold=threshold or 0.0, total=total) / 6
    torch.testing.assert_close(ours, theirs)
