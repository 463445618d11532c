"""The projection of contrastive learning: what the loss compares, and what is dropped after training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from normfree.models.net import Net


class ProjectionHead(nn.Linear):
    """Two linear layers with a ReLU in between: features B D -> embeddings B `dim`.

    The second layer is the module itself, so that its weight has the name of a classifier's, which AGC does not clip.

    Source: Chen et al. 2020 (arXiv 2002.05709), section 2.1, without the batch norm of their code.
    """

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__(num_features, dim)
        self.hidden = nn.Linear(num_features, num_features)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.xavier_normal_(self.weight)
        for bias in (self.hidden.bias, self.bias):
            nn.init.zeros_(bias)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.relu(self.hidden(features)))


def project_(net: Net, dim: int) -> None:
    """Replace the classifier of a network by a projection to `dim` numbers; 0 leaves the pooled features."""
    net.reset_classifier(dim)
    if dim:
        net.head = ProjectionHead(net.num_features, dim)
