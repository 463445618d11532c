"""Folding of our own networks: all constants and norms move into the weights of plain layers.

    weight standardization, gain, β, γ   -> the weight of the convolution itself
    α, skip gain, the gate's factor 2    -> the last convolution of the branch, with the inverse in the gate
    γ of the pooled features             -> the classifier
    batch norm after a convolution       -> that convolution
    batch norm of a feature map or of the residual stream -> a depthwise 1x1 convolution, since others read the map

Only Conv2d, Linear and activations remain (and Conv1d in the gate of ECA variants): the same function to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.deploy.packed_conv2d import PackedConv2d
from normfree.models.features import FeatureNet
from normfree.models.layers import Conv2d, EfficientChannelAttention, SqueezeExcite, WSConv2d
from normfree.models.net import Block, Net, Stem
from normfree.surgery.batchnorm import factor_and_shift

# A branch with a smaller factor is treated as closed. Added to a stream of about 1, it is below the resolution of
# float32, and the inverse factor, which the gate needs, would soon overflow.
CLOSED = 1e-20


@torch.no_grad()
def fold_parts_(module: nn.Module) -> None:
    """Fold a network of `create_model`, a `FeatureNet`, or a stem or block of one, in place, in evaluation mode.

    A folded network is left as it is, up to its batch norms, of which it has none.
    """
    for part in list(module.modules()):
        if isinstance(part, Stem):
            _fold_stem(part)
        elif isinstance(part, Block):
            _fold_block(part)
        elif isinstance(part, Net):
            _fold_head(part)
        elif isinstance(part, FeatureNet):
            _fold_final_conv(part)


# --- the parts ---------------------------------------------------------------------------------------


def _fold_stem(stem: Stem) -> None:
    for i in range(stem.depth):
        norm, is_map = getattr(stem, f"norm{i + 1}", None), i == stem.fine_map_index
        conv, rest = plain_conv(getattr(stem, f"conv{i}"), None if is_map else norm)
        setattr(stem, f"conv{i}", conv)
        if norm is not None:
            setattr(stem, f"norm{i + 1}", _affine(norm) if is_map else rest)


def _fold_block(block: Block) -> None:
    block.norm0 = _affine(block.norm0)
    block.conv0, block.norm1 = plain_conv(block.conv0, block.norm1)
    if block.second_conv:
        block.conv1, block.norm1b = plain_conv(block.conv1, block.norm1b)
        block.conv1b, block.norm2 = plain_conv(block.conv1b, block.norm2)
    else:
        block.conv1, block.norm2 = plain_conv(block.conv1, block.norm2)
    block.conv2, _ = plain_conv(block.conv2)
    if block.transition:
        block.conv_shortcut, _ = plain_conv(block.conv_shortcut)
    # the last convolution of the branch gets the constant factor; a gate that reads the branch must divide by it
    branch, gate = block.remove_scales_()
    if block.attention is not None and block.attention_in_middle:
        gated = block.conv1b if block.second_conv else block.conv1
        _scale_before_gate(gated, block.attention, gate)
        _scale(block.conv2, branch)
    elif block.attention is not None:
        _scale_before_gate(block.conv2, block.attention, gate * branch)
    else:
        _scale(block.conv2, branch)


def _fold_head(net: Net) -> None:
    _fold_final_conv(net)
    net.final_norm = _affine(net.final_norm)
    scale = net.remove_head_scale_()
    if isinstance(net.head, nn.Linear):
        net.head.weight.mul_(scale)
    net.folded = True


def _fold_final_conv(part: Net | FeatureNet) -> None:
    if part.final_conv is not None:
        part.final_conv, _ = plain_conv(part.final_conv)


# --- the arithmetic ----------------------------------------------------------------------------------


def plain_conv(conv: nn.Module, norm: nn.Module | None = None) -> tuple[Conv2d, nn.Module]:
    """Return a plain convolution that includes the norm after it, and an identity that replaces that norm."""
    assert isinstance(conv, WSConv2d | Conv2d)
    bias: Tensor | None = conv.bias
    weight: Tensor
    if isinstance(conv, WSConv2d):
        weight, padding = conv.standardized_weight(), conv.padding
        stride = conv.stride
    else:
        weight, padding = conv.weight, conv.pad_mode
        stride = conv.stride[0]
    if isinstance(norm, nn.BatchNorm2d):
        factor, shift = factor_and_shift(norm, dtype=norm.weight.dtype)
        weight = weight * factor.view(-1, 1, 1, 1)
        bias = shift if bias is None else bias * factor + shift
    return _convolution(weight, bias, stride=stride, groups=conv.groups, padding=padding), nn.Identity()


def _affine(norm: nn.Module) -> nn.Module:
    """Return a depthwise 1x1 convolution equal to a batch norm, for norms without a convolution before them."""
    if not isinstance(norm, nn.BatchNorm2d):
        return norm
    factor, shift = factor_and_shift(norm, dtype=norm.weight.dtype)
    return _convolution(factor.view(-1, 1, 1, 1), shift, stride=1, groups=len(factor), padding="same")


def _convolution(
    weight: Tensor, bias: Tensor | None, *, stride: int, groups: int, padding: str
) -> PackedConv2d:
    outputs, inputs, kernel_size = weight.shape[0], weight.shape[1] * groups, weight.shape[2]
    plain = PackedConv2d(
        inputs, outputs, kernel_size=kernel_size, stride=stride, groups=groups, bias=bias is not None, padding=padding
    ).to(weight)  # fmt: skip
    plain.weight.copy_(weight)
    if plain.bias is not None and bias is not None:
        plain.bias.copy_(bias)
    return plain


def _scale(conv: nn.Module, factor: float) -> None:
    assert isinstance(conv, nn.Conv2d)
    for parameter in conv.parameters():
        parameter.mul_(factor)


def _scale_before_gate(conv: nn.Module, gate: nn.Module, factor: float) -> None:
    """Rewrite gate(y) · factor · y, with y from `conv`, as gate'(y') · y' with y' = factor · y."""
    assert isinstance(gate, SqueezeExcite | EfficientChannelAttention)
    first = gate.fc0 if isinstance(gate, SqueezeExcite) else gate.conv
    if abs(factor) < CLOSED:  # the result is 0 for any value of the gate
        factor = 0.0
    else:
        first.weight.div_(factor)
    _scale(conv, factor)
