"""What a signal's variance will be along a traced graph whose convolutions are standardized: the bookkeeping of α, β
and γ for architectures that nobody here wrote.

A map is represented by draws of its values: channels by places, each channel with a distribution of its own. A
standardized convolution makes new, normal ones: channel means as far apart as its input's, and variance 1 in total
after the constant that it carries. Activations, sums and products act on the draws themselves, so that γ is exact for
any activation, and the ReLU on the residual stream of a post-activation network is followed, too ([A] section 3 has
pre-activation networks, where this is 1 + kα²).

Not followed: neighbouring places are taken as independent. Average pooling is taken to keep the variance, as [A] does;
depthwise kernels with mean zero put out less than is said here where neighbours are alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: Channels and places of the draws: enough for a variance to 1 % and for the spread of channel means to a few.
CHANNELS, PLACES = 128, 1024


@dataclass(frozen=True)
class Signal:
    """Draws of a map's values, channels x places."""

    draws: Tensor

    @property
    def within(self) -> float:
        """Average over channels of a channel's variance."""
        return float(self.draws.var(dim=1, correction=0).mean())

    @property
    def between(self) -> float:
        """Variance of the channel means."""
        return float(self.draws.mean(dim=1).var(correction=0))


class Tracker:
    """Makes and changes signals. The draws are normal quantiles in random order, from a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *, between: float = 0.0, within: float = 1.0) -> Signal:
        """Channel means with variance `between`, places with variance `within`; independent of all other signals."""
        z = torch.stack([self._quantiles(PLACES) for _ in range(CHANNELS)])
        means = self._quantiles(CHANNELS)[:, None]
        return Signal(means * math.sqrt(between) + z * math.sqrt(within))

    def convolved(self, signal: Signal, *, depthwise: bool) -> tuple[Signal, float]:
        """The output of a standardized convolution and the constant that it carries (γβ): the output's variance,
        channel means included, is 1. A depthwise filter of mean zero takes its channel's mean away."""
        between, within = (0.0 if depthwise else signal.between), signal.within
        total = between + within
        return self.normal(between=between / total, within=within / total), total**-0.5

    def largest(self, signal: Signal, count: int) -> Signal:
        """The largest of `count` places, as max pooling has it."""
        draws = [signal.draws]
        for _ in range(count - 1):
            draws.append(signal.draws[:, torch.randperm(PLACES, generator=self.generator)])
        return Signal(torch.stack(draws).amax(dim=0))

    def _quantiles(self, count: int) -> Tensor:
        steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        z = math.sqrt(2) * torch.erfinv(2 * steps - 1)
        z = z / z.std(correction=0)
        return z[torch.randperm(count, generator=self.generator)]
