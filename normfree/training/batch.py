"""Turn a batch of the loader into the input of the network: normalized, mixed images and soft targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normfree.data.loader import Batch
from normfree.data.seeds import key
from normfree.data.transforms.mixing import FreshPairs, mix, paired_targets, smooth
from normfree.data.transforms.normalize import channel_statistics, normalize
from normfree.data.transforms.train import AfterMixing, train_transform
from normfree.training.choices import learns_embeddings
from normfree.training.class_weights import weigh
from normfree.training.config import Config, channels_of, size_of
from normfree.training.distributed.world import World

if TYPE_CHECKING:
    from PIL.Image import Image


class BatchPreparer:
    """Normalize and mix the images of a batch and make its soft targets.

    With mix_with "batch" the partners come from this process's part of the batch, so pairs and shares depend on the
    number of processes; with "fresh", and without mixing, nothing does. With `exact` the partners come from the
    micro-batch, and random numbers from its index.

    Args:
        micro_batch: images per micro-batch; 0 is the whole batch. Only `exact` needs it.
        class_weights: K, the factor of each label in the loss; None weighs all alike.
    """

    def __init__(
        self,
        config: Config,
        *,
        num_classes: int,
        world: World,
        micro_batch: int,
        exact: bool = False,
        class_weights: Tensor | None = None,
    ) -> None:
        self.augment, self.seed = config.augment, config.seed
        self.embeds = learns_embeddings(config.objective)
        self.num_classes, self.world = num_classes, world
        self.mean, self.std = channel_statistics(channels_of(config.input.image_size))
        self.micro_batch, self.exact = micro_batch, exact
        self.class_weights = None if class_weights is None else class_weights.to(world.device)

    def __call__(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Return images B C H W, channels_last, and targets B K, on the device; labels B if embeddings are learned."""
        rank = self.world.rank
        if self.embeds:
            images = normalize(
                batch.images.to(self.world.device, non_blocking=True), mean=self.mean, std=self.std
            )
            return images.contiguous(memory_format=torch.channels_last), batch.labels.to(self.world.device)
        if not self.exact:  # rank 0 draws what a single process draws
            return self._mixed(batch, key(self.seed, "mix", step, *((rank,) if rank else ())))
        size = self.micro_batch or len(batch)
        first = rank * len(batch) // size
        parts = (_part(batch, slice(start, start + size)) for start in range(0, len(batch), size))
        made = [
            self._mixed(part, key(self.seed, "mix", step, "part", number))
            for number, part in enumerate(parts, first)
        ]
        images, targets = (torch.cat(column) for column in zip(*made, strict=True))
        return images, targets

    def _mixed(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Normalize and mix one batch with the random numbers of `seed`."""
        augment, device = self.augment, self.world.device
        # With class weights, targets are smoothed after weighing.
        smoothing = augment.label_smoothing if self.class_weights is None else 0.0
        images = normalize(batch.images.to(device, non_blocking=True), mean=self.mean, std=self.std)
        labels = batch.labels.to(device, non_blocking=True)
        if batch.partners is not None and batch.share is not None:  # the loader has mixed the images already
            partners, share = batch.partners.to(device), batch.share.to(device)
            targets = (
                paired_targets(
                    labels, partners, share, num_classes=self.num_classes, label_smoothing=smoothing
                )
                if batch.targets is None
                else smooth(batch.targets.to(device), smoothing)
            )
            return images.contiguous(memory_format=torch.channels_last), self.weighed(targets)
        generator = torch.Generator().manual_seed(seed)
        images, targets = mix(
            images.contiguous(memory_format=torch.channels_last),
            labels if batch.targets is None else batch.targets.to(device), num_classes=self.num_classes,
            mixup=augment.mixup, cutmix=augment.cutmix, label_smoothing=smoothing, generator=generator,
        )  # fmt: skip
        return images, self.weighed(targets)

    def weighed(self, targets: Tensor) -> Tensor:
        """Return targets times the weights of their classes, then smoothed; unchanged without class weights."""
        if self.class_weights is None:
            return targets
        return weigh(targets, self.class_weights, label_smoothing=self.augment.label_smoothing)


def fresh_pairs(config: Config) -> FreshPairs | None:
    """Return the mixing that the loader does (mix_with "fresh"), or None if the device mixes or nothing is mixed."""
    augment = config.augment
    if augment.mix_with == "batch" or augment.mixup == augment.cutmix == 0:
        return None
    after = None if augment.randaugment == "off" else AfterMixing(augment.randaugment)
    return FreshPairs(augment.mixup, augment.cutmix, after)


def image_transform(config: Config) -> Callable[[Image], Tensor]:
    """Return the random transform of single training images that a resolved config describes."""
    augment = config.augment
    return train_transform(
        image_size=size_of(config.input.image_size),
        crop_min=augment.crop_min,
        flip=augment.flip,
        orientation=augment.orientation,
        letterbox=config.input.eval_crop == "letterbox",
        randaugment="off" if fresh_pairs(config) else augment.randaugment,
    )


def _part(batch: Batch, rows: slice) -> Batch:
    """Return some of the images of a batch."""
    return replace(
        batch, images=batch.images[rows], labels=batch.labels[rows], indices=batch.indices[rows],
        names=batch.names[rows], partners=None if batch.partners is None else batch.partners[rows],
        share=None if batch.share is None else batch.share[rows],
        targets=None if batch.targets is None else batch.targets[rows],
    )  # fmt: skip
