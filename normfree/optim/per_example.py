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
    copies: int = 1,
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
        loss: maps the logits and targets of `copies` images of one example to their mean loss, 0-dim.
        copies: augmented images of each example (De et al. 2022, arXiv 2204.13650), neighbors in `images`; the gradient
            of an example is that of their mean loss, and the result has B / copies rows.
        chunk: examples computed at a time; None is all. A smaller number takes less memory and gives the same result.

    Returns:
        The gradients by parameter name, each of shape (B / copies, *parameter.shape).

    Raises:
        ValueError: the model has a layer that is known to use batch statistics or to draw random numbers, so that the
            gradient of an example is not defined by the example; `targets` do not match `images`; or B is no multiple
            of `copies`. Operations inside of a `forward` that mix examples are not found: `normfree.batch_dependence`
            measures whether they do.

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
    if copies < 1 or len(images) % copies:
        given = f"copies={copies} with {len(images)} images"
        raise ValueError(problem(given, allowed="a divisor of the number of images", fix="pass copies=1"))
    _check_independent(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= {name: b.detach() for name, b in model.named_buffers()}

    def loss_of_one(learned: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, {**learned, **fixed}, (image,)), target)

    if len(images) == 0:
        return {name: parameter.new_zeros(0, *parameter.shape) for name, parameter in parameters.items()}
    images, targets = (t.unflatten(0, (-1, copies)) for t in (images, targets))
    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0), chunk_size=chunk)
    found: dict[str, Tensor] = gradient(parameters, images, targets)
    return found


def clipped_gradient_sum(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    max_norm: float,
    loss: Loss = F.cross_entropy,
    copies: int = 1,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Compute the sum over examples of their gradients, each scaled down to a norm of at most `max_norm`.

    Args:
        model: as for `per_example_gradients`, whose other arguments these are.
        images: B C H W; B may be 0.
        targets: B class indices, or B K class probabilities.
        max_norm: largest norm of the gradient of an example over all parameters, above 0.
        loss: maps the logits and targets of one example to its loss.
        copies: augmented images of each example.
        chunk: examples computed at a time; None is all.

    Returns:
        The sums by parameter name, each of the shape of its parameter.

    Raises:
        ValueError: see `per_example_gradients`.
    """
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    size = max(1, len(images)) if chunk is None else chunk * copies
    for x, y in zip(images.split(size), targets.split(size), strict=True):
        if len(x) == 0:
            continue
        gradients = per_example_gradients(model, x, y, loss=loss, copies=copies)
        factors = clipping_factors(gradients, max_norm)
        for name, each in gradients.items():
            sums[name] += torch.einsum("b,b...->...", factors.to(each.dtype), each)
    return sums


def clipping_factors(gradients: dict[str, Tensor], max_norm: float) -> Tensor:
    """Return the factor of each example that reduces its gradient to a norm of at most `max_norm`, float64 B.

    Norms are computed in float64. Factors below 1 are smaller by the rounding of the product in the data type of the
    gradients, so that the norm of no product is above the bound.
    """
    norms = torch.stack(
        [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in gradients.values()]
    ).norm(dim=0)
    rounding = max(torch.finfo(g.dtype).eps for g in gradients.values())
    return torch.where(norms > max_norm, max_norm / norms * (1 - 2 * rounding), 1.0)


def using_batch_statistics(model: nn.Module) -> list[str]:
    """Return the names of batch norms in training mode, or without running statistics."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
    ]


def _check_independent(model: nn.Module) -> None:
    batch = using_batch_statistics(model)
    if batch:
        raise ValueError(
            problem(
                f"batch norm in training mode, or without running statistics: {some_names(batch)}",
                allowed="modules that treat examples independently",
                fix="normfree.convert_batchnorm(model), or model.eval() for running statistics",
            )
        )
    random = [n for n, m in model.named_modules() if m.training and _draws(m)]
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
