"""normfree.models.shared_weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normfree.models.layers import WSConv2d
from normfree.ops.standardize import standardize_all


@contextmanager
def standardized_once(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, every `WSConv2d` of `net` uses one standardized kernel, whatever the number of forward passes.

    Gradients gather in the kernels; leaving the context takes their sum back to weights and gains in one
    backward pass. That is exact, since the gradient of the weights is linear in that of the kernels. Gives the kernels
    by module name; their `.grad` may be changed until the end, for example summed over processes. After an error
    nothing is taken back. Weights and gains must not change inside, and their own `.grad` is complete only after
    it. Kernels and their gradients take twice the memory of the weights.

    Raises:
        RuntimeError: a weight or gain was changed inside.
        ValueError: parameters are sharded over processes, or the context is open already.
    """
    convs: dict[str, WSConv2d] = {
        name: conv for name, conv in net.named_modules() if isinstance(conv, WSConv2d)
    }
    for name, conv in convs.items():
        if hasattr(conv.weight, "device_mesh"):
            raise ValueError(
                f"The weight of {name!r} is sharded over processes. standardized_once takes whole weights. "
                "Do without it, or use DDP."
            )
        if conv.shared_kernel is not None:
            raise ValueError(
                f"{name!r} has a standardized kernel already. standardized_once does not nest. Open it once."
            )
    kernels: dict[str, Tensor] = {}
    for eps in sorted({conv.eps for conv in convs.values()}):
        for learns in (False, True):
            some = {n: c for n, c in convs.items() if c.eps == eps and _learns(c) == learns}
            if some:
                made = standardize_all(
                    [c.weight for c in some.values()],
                    [c.gain for c in some.values()],
                    [c.input_scale for c in some.values()],
                    eps=eps,
                )
                kernels |= dict(zip(some, made, strict=True))
    leaves = {name: kernel.detach().requires_grad_(kernel.requires_grad) for name, kernel in kernels.items()}
    try:
        for name, conv in convs.items():
            conv.shared_kernel = leaves[name]
        yield leaves
    finally:
        for conv in convs.values():
            conv.shared_kernel = None
    used = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([kernels[n] for n in used], [leaves[n].grad for n in used])


def _learns(conv: WSConv2d) -> bool:
    return torch.is_grad_enabled() and (conv.weight.requires_grad or conv.gain.requires_grad)
