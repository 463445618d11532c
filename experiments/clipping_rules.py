"""Alternatives to unit-wise adaptive clipping that the NFNet paper compares with: layer-wise clipping, and LARS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normfree import SGD

GroupsOf = Iterable[Mapping[str, Any]]


@torch.no_grad()
def clip_layers_(groups: GroupsOf, *, clipping: float, eps: float = 1e-3) -> Tensor:
    """Scale down the gradients of each layer whose norm exceeds `clipping` times the norm of its parameters.

    A layer is a module: its weight, gain and bias count as one vector. Groups whose `clipping` is 0 are left alone.

    Returns:
        The fraction of the layers that was clipped, 0-dim.
    """
    layers: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if group["clipping"] > 0 and parameter.grad is not None:
                layers.setdefault(name.rpartition(".")[0], []).append(parameter)
    clipped = []
    for parameters in layers.values():
        gradients = [p.grad for p in parameters]
        limit = clipping * nn.utils.get_total_norm(parameters).clamp(min=eps)
        norm = nn.utils.get_total_norm(gradients)  # type: ignore[arg-type]
        factor = torch.where(norm > limit, limit / norm.clamp(min=1e-6), 1.0)
        torch._foreach_mul_(gradients, factor)
        clipped.append(norm > limit)
    return torch.stack(clipped).float().mean() if clipped else torch.zeros(())


class Lars(SGD):
    """SGD with momentum whose rate is scaled for each weight: layer-wise adaptive rate scaling.

    For a weight w with gradient g and decay d: g + d·w is scaled to a norm of trust · |w| · |g + d·w| / (|g| +
    d·|w|). Gains, biases and other vectors, and the classifier are trained as by SGD.

    Args:
        groups: as `parameter_groups` returns.
        lr: learning rate.
        trust: ratio of the norms of a step and of its weight, at a rate of 1.

    Source: You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, *, trust: float) -> None:
        super().__init__(groups, lr, momentum=0.9, nesterov=False)
        self.trust = trust

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["name"] == "weights":
                decay, group["weight_decay"] = group["weight_decay"], 0.0
                for parameter in group["params"]:
                    self._scale_(parameter, decay)
        loss = super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        return loss

    def _scale_(self, parameter: Tensor, decay: float) -> None:
        """Replace the gradient of a weight by its scaled one, decay included."""
        gradient = parameter.grad
        if gradient is None:
            return
        size, slope = parameter.norm(), gradient.norm()
        ratio = torch.where((size > 0) & (slope > 0), self.trust * size / (slope + decay * size), 1.0)
        gradient.add_(parameter, alpha=decay).mul_(ratio)
