"""The gradient of one step of an objective on embeddings: contrastive or metric learning, with gradient caching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfree.data.seeds import key
from normfree.embeddings import nearest_of_same_label
from normfree.models.net import Net
from normfree.training.cached_gradient import refuse_batch_statistics, two_passes
from normfree.training.choices import OBJECTIVES, parse_choice
from normfree.training.config import Config
from normfree.training.distributed.exact import TreeSum
from normfree.training.gradient import BatchGradient
from normfree.training.profile import span


class EmbeddingGradient(BatchGradient):
    """Add the gradient of a loss on all embeddings of a batch, over all processes, to the parameters of `net`.

    Each process computes the loss of all embeddings, and propagates its own ones. Micro-batches and random numbers are
    those of `BatchGradient`, whose arguments it takes; both passes over a micro-batch draw the same numbers.
    """

    def __init__(self, net: Net, config: Config, **options: Any) -> None:
        super().__init__(net, config, **options)
        self.views = parse_choice(config.objective, OBJECTIVES).name == "simclr"

    def __call__(
        self, images: Tensor, targets: Tensor, step: int, *, micro_batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add this process's share of the gradient.

        Args:
            images: B 3 S S, normalized, on the device; with simclr, the two views of an image are neighbors.
            targets: the classes, int64 B; with simclr they are not used.
            step: decides the random numbers.
            micro_batch: in place of `self.micro_batch`.

        Returns:
            This process's shares of the loss and of the number of images whose most similar image in the batch is
            their other view, or has their class; 0-dim.

        Raises:
            ValueError: the network has batch norm, and the batch is split.
        """
        size = (self.micro_batch if micro_batch is None else micro_batch) or len(images)
        parts = images.split(size)
        first, tree = self.world.rank * len(parts), TreeSum()
        labels = self._labels(targets)

        def encode(number: int) -> Tensor:
            torch.manual_seed(key(self.seed, "model", step, first + number))
            with span("forward"), torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
                embeddings: Tensor = self.net(parts[number])
            return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

        def after() -> None:
            if self.exact:
                tree.add(self._take_gradients())

        with self._passes():
            if len(parts) * self.world.size > 1:
                refuse_batch_statistics(self.net)
            loss, every = two_passes(
                encode, len(parts), lambda z: self.loss(z, labels), rank=self.world.rank,
                gather=self.world.concatenate, after=after, keep_graph=not self.exact,
            )  # fmt: skip
        if self.exact:
            for parameter, gradient in zip(self.trained, tree.total(), strict=True):
                parameter.grad = gradient
        own = slice(self.world.rank * len(images), (self.world.rank + 1) * len(images))
        correct = nearest_of_same_label(every, labels)[own].sum().to(torch.float32)
        return loss / self.world.size, correct

    def example_targets(self, count: int, num_classes: int) -> Tensor:
        """Return the classes of `count` images, for a test of the memory."""
        return torch.arange(count, device=self.world.device) // 2

    def _labels(self, targets: Tensor) -> Tensor:
        """Return the labels of all processes: the number of the image for its two views, or the classes."""
        if self.views:
            return torch.arange(len(targets) * self.world.size, device=targets.device) // 2
        return self.world.concatenate(targets)
