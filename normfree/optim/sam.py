"""Sharpness-aware minimization (SAM): the gradient is taken at weights moved uphill by a distance rho.

The NFNets were trained with it ([B] section 4.2 and appendix): the direction uphill is the gradient of a fifth of the
same batch, which adds about a fifth to the cost of a step, and each process moves on its own, without averaging.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from normfree.suggest import problem

# Every fifth image of a batch decides the direction ([B] appendix: 20 % of the batch; all of it doubles the cost). A
# stride, since the two halves of a mixed batch differ.
STRIDE = 5


class SAM:
    """Sharpness-aware minimization for any training loop and optimizer.

    Backpropagate the loss of a part of the batch, then compute the gradient of the whole batch within `perturbed()`:
    the weights are moved uphill by `rho` inside and restored bit for bit outside, where the gradient stays for the
    optimizer.

    Args:
        parameters: the parameters to move.
        rho: the distance, above 0. [B] fine-tunes with 0.05.

    Raises:
        ValueError: `rho` is not above 0.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> x, sam = torch.tensor([[3.0, 4.0]]), normfree.SAM(model.parameters(), rho=0.5)
        >>> model(x).pow(2).sum().backward()  # the gradient points along (3, 4)
        >>> with sam.perturbed():
        ...     weights = model.weight.detach().clone()
        ...     model(x).pow(2).sum().backward()
        >>> weights, model.weight.data  # moved by 0.5 * (0.6, 0.8), and restored
        (tensor([[1.3000, 1.4000]]), tensor([[1., 1.]]))

    Source: Foret et al. 2021 (arXiv 2010.01412); [B] section 4.2.
    """

    def __init__(self, parameters: Iterable[Tensor], *, rho: float = 0.05) -> None:
        _check_rho(rho)
        self.parameters, self.rho = list(parameters), rho

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Move the parameters along their gradients, clear these, and restore the parameters at the end."""
        before = ascend_(self.parameters, rho=self.rho)
        try:
            yield
        finally:
            descend_(self.parameters, before)


@torch.no_grad()
def ascend_(parameters: Iterable[Tensor], *, rho: float) -> list[Tensor]:
    """Move parameters by rho * g / ||g||, with g all their gradients together, and clear the gradients.

    A parameter without a gradient stays. A gradient that is zero or not finite moves nothing: the step that follows is
    then an ordinary one, and its finite check reports the problem.

    Returns:
        Copies of the parameters before the move, for `descend_`.

    Raises:
        ValueError: `rho` is not above 0.
    """
    _check_rho(rho)
    parameters = list(parameters)
    before = [p.detach().clone() for p in parameters]
    moving = [p for p in parameters if p.grad is not None]
    if moving:
        gradients = [p.grad for p in moving if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)).float())
        scale = torch.where((norm > 0) & norm.isfinite(), rho / norm, torch.zeros_like(norm))
        for parameter, gradient in zip(moving, gradients, strict=True):
            step = (gradient * scale).to(parameter.dtype)
            parameter.add_(torch.where(scale > 0, step, torch.zeros_like(step)))  # 0 * inf is NaN
            parameter.grad = None
    return before


@torch.no_grad()
def descend_(parameters: Iterable[Tensor], before: list[Tensor]) -> None:
    """Restore the parameters bit for bit; their gradients, computed uphill, stay for the optimizer."""
    for parameter, saved in zip(parameters, before, strict=True):
        parameter.copy_(saved)


def _check_rho(rho: float) -> None:
    if not rho > 0:
        fix = "pass rho=0.05, with which [B] fine-tunes"
        raise ValueError(problem(f"rho is {rho}", allowed="above 0", fix=fix))
