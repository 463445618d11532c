"""Sharpness-aware minimization (SAM, arXiv 2010.01412): the gradient is taken a step uphill of the weights.

As the NFNets were trained with it ([B] section 4.2 and appendix): the uphill gradient is that of a fifth of the same
batch, which adds about a fifth to a step's cost, and each process climbs on its own, without averaging.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Every fifth image of a batch decides the direction ([B] appendix: 20 % of the batch; all of it doubles the cost). A
#: stride, since the halves of a mixed batch differ.
STRIDE = 5


@torch.no_grad()
def ascend_(parameters: Iterable[Tensor], *, rho: float) -> list[Tensor]:
    """Moves parameters by rho * g / ||g||, with g all their gradients together, and clears the gradients.

    Returns copies of the parameters as they were, for `descend_`; parameters without a gradient stay. A gradient that
    is zero or not finite moves nothing: the step that follows is then an ordinary one, and finds what is wrong.

    Raises:
        ValueError: rho is not above 0.
    """
    if not rho > 0:
        raise ValueError(f"rho={rho}: expected a distance above 0. [B] fine-tunes with 0.05.")
    parameters = list(parameters)
    before = [p.detach().clone() for p in parameters]
    moving = [p for p in parameters if p.grad is not None]
    if moving:
        gradients = [p.grad for p in moving if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
        scale = torch.where((norm > 0) & norm.isfinite(), rho / norm, torch.zeros_like(norm))
        for parameter, gradient in zip(moving, gradients, strict=True):
            step = (gradient * scale).to(parameter.dtype)
            parameter.add_(torch.where(scale > 0, step, torch.zeros_like(step)))  # 0 * inf is no number
            parameter.grad = None
    return before


@torch.no_grad()
def descend_(parameters: Iterable[Tensor], before: list[Tensor]) -> None:
    """Puts the parameters back, bit for bit; their gradients, taken uphill, stay for the optimizer."""
    for parameter, saved in zip(parameters, before, strict=True):
        parameter.copy_(saved)
