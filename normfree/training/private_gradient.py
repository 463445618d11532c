"""The gradient of one step with differential privacy: clipped gradients of examples, and noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normfree.models.net import Net
from normfree.optim.per_example import clipped_gradient_sum
from normfree.training.config import Config
from normfree.training.gradient import BatchGradient
from normfree.training.privacy import PrivacyPlan
from normfree.training.profile import span
from normfree.training.secret import SecretKey


class PrivateGradient(BatchGradient):
    """Add the noisy mean of the clipped gradients of a Poisson sample to the parameters of `net`.

    The gradient is (sum of clipped gradients + noise_multiplier · C · N(0, 1)) / expected number of examples. The noise
    of a parameter is a function of the secret key, the step and the name. It takes the arguments of `BatchGradient`;
    a micro-batch bounds the memory, which is that of one gradient for each of its examples.

    Args:
        plan: clipping norm and noise.

    Attributes:
        key: the secret key, set before the first step.
    """

    def __init__(self, net: Net, config: Config, *, plan: PrivacyPlan, **options: Any) -> None:
        super().__init__(net, config, **options)
        self.plan, self.copies = plan, config.augment.repeats
        self.key: SecretKey | None = None

    def __call__(
        self, images: Tensor, targets: Tensor, step: int, *, micro_batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of a step.

        Args:
            images: B 3 S S, normalized, on the device; the copies of an example are neighbors. B may be 0.
            targets: B K class probabilities.
            step: decides the noise.
            micro_batch: in place of `self.micro_batch`.

        Returns:
            Two zeros in place of loss and number of correct answers: these are not private, and are not computed.
        """
        assert self.key is not None
        size = self.micro_batch if micro_batch is None else micro_batch
        self.net.train()
        for module in self.frozen:
            module.eval()
        with span("gradients"):
            sums = clipped_gradient_sum(
                self.net, images, targets, max_norm=self.plan.clip, copies=self.copies,
                loss=lambda logits, y: self.loss(logits, y) / self.copies,
                chunk=max(1, size // self.copies) if size else None,
            )  # fmt: skip
        deviation = self.plan.noise_multiplier * self.plan.clip
        with span("noise"):
            for name, parameter in self.net.named_parameters():
                if name not in sums:
                    continue
                total = sums[name]
                if deviation:
                    noise = torch.from_numpy(self.key.gaussian(total.shape, step, name))
                    total = total + deviation * noise.to(total)
                parameter.grad = total / self.plan.examples
        zero = torch.zeros((), device=images.device)
        return zero, zero.clone()
