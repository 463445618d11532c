"""Weight standardization once per optimizer step, shared by all forward passes in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normfree.models.layers import WSConv2d
from normfree.native.dispatch import is_transformed
from normfree.ops.standardize import standardize_all
from normfree.suggest import problem


@contextmanager
def standardized_once(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within this context, every `WSConv2d` of `net` uses one standardized weight in all forward passes.

    `normfree train` computes each step like this. In a loop of your own it saves time if the network or the batch is
    small, or if several micro-batches share a step, also under `DistributedDataParallel`. Step the optimizer after the
    context.

    Gradients accumulate in the standardized weights; leaving the context propagates their sum to weights and gains in
    one backward pass. This is exact, since the gradient of the weights is linear in that of the standardized weights.
    After an error nothing is propagated. Weights and gains must not change inside, and their `.grad` is complete only
    after the context. Standardized weights and their gradients take twice the memory of the weights.

    Args:
        net: any module that contains `WSConv2d`.

    Yields:
        The standardized weights by module name. Their `.grad` may be changed until the end, for example summed over
        processes.

    Raises:
        RuntimeError: a weight or gain was changed inside.
        ValueError: parameters are sharded over processes, the context is open already, or it is opened inside a
            transform of `torch.func`. (Such a transform may be applied inside the context; it then standardizes the
            weights itself.)

    Examples:
        >>> import torch
        >>> from normfree import create_model, standardized_once
        >>> model = create_model("nf_resnet_nano", num_classes=3)
        >>> images = torch.randn(4, 3, 32, 32)
        >>> with standardized_once(model):
        ...     for micro_batch in images.split(2):
        ...         model(micro_batch).square().sum().backward()
        >>> model.stem.conv0.weight.grad.shape
        torch.Size([32, 3, 3, 3])
    """
    if is_transformed():
        given = "standardized_once inside a transform of torch.func or forward-mode AD"
        raise ValueError(problem(given, allowed="transforms inside standardized_once", fix="open it outside"))
    convs = {name: conv for name, conv in net.named_modules() if isinstance(conv, WSConv2d)}
    for name, conv in convs.items():
        _check(name, conv)
    made: dict[str, Tensor] = {}
    for eps in sorted({conv.eps for conv in convs.values()}):
        for trains in (False, True):
            some = {n: c for n, c in convs.items() if c.eps == eps and _trains(c) == trains}
            if some:
                weights, gains, scales = zip(
                    *((c.weight, c.gain, c.input_scale) for c in some.values()), strict=True
                )
                standardized = standardize_all(weights, gains, scales, eps=eps)
                made |= dict(zip(some, standardized, strict=True))
    leaves = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in made.items()}
    try:
        for name, conv in convs.items():
            conv.shared_weight = leaves[name]
        yield leaves
    finally:
        for conv in convs.values():
            conv.shared_weight = None
    used = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([made[n] for n in used], [leaves[n].grad for n in used])


def _check(name: str, conv: WSConv2d) -> None:
    if hasattr(conv.weight, "device_mesh"):
        raise ValueError(
            problem(
                f"the weight of {name!r} is sharded over processes",
                allowed="whole weights",
                fix="do not use standardized_once, or train with DDP",
            )
        )
    if conv.shared_weight is not None:
        raise ValueError(
            problem(
                f"{name!r} is in the context of standardized_once already",
                allowed="one context at a time",
                fix="open it once",
            )
        )


def _trains(conv: WSConv2d) -> bool:
    return torch.is_grad_enabled() and (conv.weight.requires_grad or conv.gain.requires_grad)
