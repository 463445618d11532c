"""Gradients of single examples, as differential privacy, influence functions and gradient noise scales need them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.suggest import problem, some_names

Loss = Callable[[Tensor, Tensor], Tensor]


def per_example_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    loss: Loss = F.cross_entropy,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Compute the gradient of the loss of each example with respect to each parameter that requires one.

    Without batch statistics the loss of an example depends on that example alone, so this is the gradient that a batch
    of one would give. `torch.func.vmap` computes all of them in one vectorized pass. Gradients of the model itself
    (`parameter.grad`) are left alone.

    Args:
        model: any module that maps images to logits and treats examples independently.
        images: B C H W.
        targets: B class indices, or B K class probabilities.
        loss: maps logits 1 K and targets of one example to its loss, 0-dim.
        chunk: examples computed at a time; None is all. A smaller number takes less memory and gives the same result.

    Returns:
        The gradients by parameter name, each of shape (B, *parameter.shape).

    Raises:
        ValueError: the model has a layer that uses batch statistics or draws random numbers, so that the gradient of
            an example is not defined by the example; or `targets` do not match `images`.

    Examples:
        >>> import torch
        >>> model = normfree.create_model("nf_resnet_nano", num_classes=3).eval()
        >>> grads = normfree.per_example_gradients(model, torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
        >>> grads["head.bias"].shape
        torch.Size([2, 3])
    """
    if len(targets) != len(images):
        given = f"{len(images)} images and {len(targets)} targets"
        raise ValueError(
            problem(given, allowed="one target for each image", fix="pass targets of the same batch")
        )
    _check_independent(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= {name: b.detach() for name, b in model.named_buffers()}

    def loss_of_one(learned: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, {**learned, **fixed}, (image[None],))
        return loss(logits, target[None])

    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0), chunk_size=chunk)
    found: dict[str, Tensor] = gradient(parameters, images, targets)
    return found


def _check_independent(model: nn.Module) -> None:
    modules = [(name, module) for name, module in model.named_modules() if module.training]
    batch = [n for n, m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch:
        raise ValueError(
            problem(
                f"batch norm in training mode: {some_names(batch)}",
                allowed="modules that treat examples independently",
                fix="normfree.convert_batchnorm(model), or model.eval() for running statistics",
            )
        )
    random = [n for n, m in modules if _draws(m)]
    if random:
        raise ValueError(
            problem(
                f"dropout or stochastic depth in training mode: {some_names(random)}",
                allowed="modules without random draws",
                fix="set the rates to 0, or model.eval()",
            )
        )


def _draws(module: nn.Module) -> bool:
    """Return True for dropout and stochastic depth of torch, timm, torchvision and this package with a rate above 0."""
    name = type(module).__name__.lower()
    known = any(part in name for part in ("dropout", "droppath", "drop_path", "stochasticdepth", "dropblock"))
    rates = (getattr(module, attribute, None) for attribute in ("p", "rate", "drop_prob"))
    return known and any(isinstance(rate, float | int) and rate > 0 for rate in rates)
