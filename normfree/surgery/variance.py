"""Prediction of the variance of activations in networks of standardized convolutions.

It determines α, β and γ for the architectures of other libraries. A map is represented by samples of its values,
channels x positions, where each channel has its own distribution. A standardized convolution gives new, normally
distributed samples: their channel means vary as much as those of the input, and their total variance is 1 after the
constant in the weight. Activations, sums and products are applied to the samples, so γ is exact for any activation, and
the ReLU on the residual stream of post-activation networks is included. For the pre-activation networks of
[A] section 3, the result is 1 + kα².

Limits: neighboring positions are assumed to be independent. Average pooling is assumed to keep the variance, as in [A].
Depthwise filters of mean zero have a lower output variance than predicted where neighboring pixels are similar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Number of channels and positions of the samples. The variance is accurate to 1 %, and the variance of the channel
# means to a few percent.
CHANNELS, POSITIONS = 128, 1024


@dataclass(frozen=True)
class Signal:
    """Samples of the values of a map, channels x positions."""

    samples: Tensor

    @property
    def within(self) -> float:
        """Average over channels of the variance within a channel."""
        return float(self.samples.var(dim=1, correction=0).mean())

    @property
    def between(self) -> float:
        """Variance of the channel means."""
        return float(self.samples.mean(dim=1).var(correction=0))


class Tracker:
    """Creates signals and applies layers to them.

    The samples are quantiles of the normal distribution in random order, from a generator with a fixed seed.
    """

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *, between: float = 0.0, within: float = 1.0) -> Signal:
        """Return a signal whose channel means have variance `between` and whose channels have variance `within`.

        It is independent of all other signals.
        """
        z = torch.stack([self._quantiles(POSITIONS) for _ in range(CHANNELS)])
        means = self._quantiles(CHANNELS)[:, None]
        return Signal(means * math.sqrt(between) + z * math.sqrt(within))

    def convolved(self, signal: Signal, *, depthwise: bool) -> tuple[Signal, float]:
        """Return the output of a standardized convolution, and the constant (γβ) by which its weight is multiplied.

        The variance of the output, including that of the channel means, is 1. A depthwise filter of mean zero removes
        the mean of its channel.
        """
        between, within = (0.0 if depthwise else signal.between), signal.within
        total = between + within
        return self.normal(between=between / total, within=within / total), total**-0.5

    def largest(self, signal: Signal, count: int) -> Signal:
        """Return the maximum over windows of `count` positions, as max pooling computes it."""
        samples = [signal.samples]
        for _ in range(count - 1):
            samples.append(signal.samples[:, torch.randperm(POSITIONS, generator=self.generator)])
        return Signal(torch.stack(samples).amax(dim=0))

    def _quantiles(self, count: int) -> Tensor:
        """Return `count` quantiles of the normal distribution, with variance 1, in random order."""
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        z = math.sqrt(2) * torch.erfinv(2 * steps - 1)
        z = z / z.std(correction=0)
        return z[torch.randperm(count, generator=self.generator)]
