"""Differential privacy with Opacus: `import normfree.opacus` registers the layers of this package.

    import normfree.opacus
    from opacus import PrivacyEngine

It registers gradients of single examples in closed form for `WSConv2d` and the convolutions of folded networks, and a
validator and a fixer for blocks with stochastic depth. It needs Opacus 1.6 or newer (`pip install opacus`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normfree.models.layers import Conv2d, WSConv2d
from normfree.models.net import Block
from normfree.ops.example_gradients import (
    Convolution,
    conv2d_example_gradients,
    standardized_example_gradients,
)
from normfree.suggest import needs, problem

with needs("normfree.opacus", install="opacus>=1.6"):
    from opacus.grad_sample import register_grad_sampler
    from opacus.validators import register_module_fixer, register_module_validator
    from opacus.validators.errors import UnsupportedModuleError

# Gradients of single examples by parameter.
Samples = dict[Tensor, Tensor]


@register_grad_sampler(WSConv2d)
def ws_conv2d_samples(layer: WSConv2d, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Return the gradients of single examples of the parameters of `layer`, each B x shape of the parameter.

    Args:
        layer: the convolution.
        activations: its input, B C H W.
        backprops: the gradients of its output, B O H' W', each that of the loss of its example.
    """
    conv = Convolution(layer.stride, layer.groups, layer.padding, layer.input_scale, layer.eps)
    samples = _bias_samples(layer.bias, backprops)
    if layer.weight.requires_grad or layer.gain.requires_grad:
        x = activations[0].to(backprops.dtype)
        by_weight, by_gain = standardized_example_gradients(
            x, backprops, layer.weight.detach(), layer.gain.detach(), conv
        )
        samples |= {layer.weight: by_weight, layer.gain: by_gain}
    return samples


@register_grad_sampler(Conv2d)
def conv2d_samples(layer: Conv2d, activations: list[Tensor], backprops: Tensor) -> Samples:
    """Return the same for a convolution without standardization, see `ws_conv2d_samples`."""
    conv = Convolution(layer.stride[0], layer.groups, layer.pad_mode, 1.0, "floor")
    samples = _bias_samples(layer.bias, backprops)
    if layer.weight.requires_grad:
        x = activations[0].to(backprops.dtype)
        samples[layer.weight] = conv2d_example_gradients(x, backprops, layer.weight, conv)
    return samples


def _bias_samples(bias: Tensor | None, backprops: Tensor) -> Samples:
    return {} if bias is None or not bias.requires_grad else {bias: backprops.sum((2, 3))}


@register_module_validator(Block)
def check_block(block: Block) -> list[Any]:
    """Return an error if the block draws which examples skip its branch."""
    if not block.stochdepth.is_active:
        return []
    given = f"stochastic depth with rate {block.stochdepth.rate:.3g}"
    allowed = "blocks without random draws, since the gradient of an example would depend on them"
    fix = "create_model(..., stochdepth_rate=0.0), or ModuleValidator.fix(model)"
    return [UnsupportedModuleError(problem(given, allowed=allowed, fix=fix))]


@register_module_fixer(Block)
def without_stochastic_depth(block: Block, **options: Any) -> Block:
    """Set the rate of stochastic depth to 0; `ModuleValidator.fix` passes a copy."""
    block.stochdepth.rate = 0.0
    return block
