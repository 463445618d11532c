"""Grad-CAM: which parts of an image make a class more probable.

The map of class c is relu(Σ_k w_k A_k), where A is a feature map, k a channel, and w_k the mean over the map of the
derivative of the logit of c by A_k. For a network that ends in the mean over the map and a linear layer, it is the
class activation map of Zhou et al. 2016 (arXiv 1512.04150), without its negative values, divided by the number of
positions.

Shapes: B batch, K classes, C channels, h w size of the feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normfree.suggest import problem


def grad_cam(
    model: nn.Module,
    images: Tensor,
    *,
    classes: int | Sequence[int] | Tensor | None = None,
    layer: nn.Module | None = None,
) -> Tensor:
    """Return the Grad-CAM heat maps of images, in evaluation mode; the mode is restored afterwards.

    Args:
        model: images -> logits B K. Networks of `create_model` and of timm are explained at their last feature map.
        images: inputs of the model, normalized, B ..., on its device.
        classes: index of the class to explain, one for all images or one for each; None means the most probable ones.
        layer: a module of the model whose output B C h w is explained instead, for example `model.stages[1]`. It is
            required for models without `forward_features` and `forward_head`.

    Returns:
        Heat maps B h w, float32, 0 or more. They are not scaled: divide by the maximum to plot one.

    Raises:
        ValueError: the model has no feature map or no classes, or a class is out of range.

    Examples:
        >>> import torch
        >>> import normfree
        >>> net = normfree.create_model("nf_resnet_nano", num_classes=2)
        >>> heat = normfree.grad_cam(net, torch.randn(3, 3, 32, 32), classes=1)
        >>> heat.shape, bool((heat >= 0).all())
        (torch.Size([3, 8, 8]), True)

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), equations 1 and 2.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            images = images.clone() if images.is_inference() else images
            maps, logits = _at_last_map(model, images) if layer is None else _at_layer(model, images, layer)
            _check(model, maps, logits)
            chosen = _chosen(logits, classes)
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), maps)
    finally:
        model.train(was_training)
    weights = gradient.float().mean(dim=(2, 3), keepdim=True)
    return (weights * maps.detach().float()).sum(dim=1).relu()


def _at_last_map(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last feature map, a leaf, and the logits computed from it, so that only the head is differentiated."""
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        given = f"{type(model).__name__} has no forward_features and forward_head"
        fix = "pass layer=, a module of the network whose output is B C h w"
        raise ValueError(problem(given, allowed="networks of create_model and timm", fix=fix))
    with torch.no_grad():
        maps = model.forward_features(images)
    maps = maps.detach().requires_grad_()
    return maps, model.forward_head(maps)


def _at_layer(model: nn.Module, images: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the output of a layer, a leaf, and the logits computed from it."""
    found: list[Any] = []

    def detach(module: nn.Module, inputs: Any, output: Any) -> Any:
        found.append(output.detach().requires_grad_() if isinstance(output, Tensor) else output)
        return found[-1]

    handle = layer.register_forward_hook(detach)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if len(found) != 1 or not isinstance(found[0], Tensor):
        given = f"layer {type(layer).__name__} ran {len(found)} times or does not return a tensor"
        raise ValueError(problem(given, allowed="a module that runs once and returns B C h w"))
    return found[0], logits


def _check(model: nn.Module, maps: Tensor, logits: Tensor) -> None:
    """Raise `ValueError` if the map has no height and width, or the output is not logits."""
    if maps.dim() != 4 or getattr(model, "output_fmt", "NCHW") != "NCHW":
        given = f"the feature map of {type(model).__name__} has the shape {tuple(maps.shape)}"
        fix = "pass layer=, a module of the network whose output is B C h w"
        raise ValueError(problem(given, allowed="B C h w", fix=fix))
    if not isinstance(logits, Tensor) or logits.dim() != 2 or getattr(model, "num_classes", 1) == 0:
        given = f"{type(model).__name__} has no classes"
        raise ValueError(problem(given, allowed="a network that returns logits B K"))


def _chosen(logits: Tensor, classes: int | Sequence[int] | Tensor | None) -> Tensor:
    """Return the class to explain of each image, int64 B."""
    if classes is None:
        return logits.argmax(dim=1)
    chosen = torch.as_tensor(classes, dtype=torch.int64, device=logits.device)
    if chosen.dim() > 1 or (chosen.dim() == 1 and len(chosen) != len(logits)):
        given = f"classes has the shape {tuple(chosen.shape)} for {len(logits)} images"
        raise ValueError(problem(given, allowed="one class, or one for each image"))
    if len(logits) and not 0 <= int(chosen.min()) <= int(chosen.max()) < logits.shape[1]:
        given = f"classes has {int(chosen.min())} to {int(chosen.max())}"
        raise ValueError(problem(given, allowed=f"0 to {logits.shape[1] - 1}"))
    return chosen.expand(len(logits))
