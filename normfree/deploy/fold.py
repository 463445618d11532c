"""A trained network as a plain one: every constant and every normalization goes into ordinary weights.

    weight standardization, gain, β, γ   -> the convolution's own kernel
    α, skip gain, the gate's factor 2    -> the last convolution of the branch, taken back inside the gate
    γ of the pooled features             -> the classifier
    batch norm after a convolution       -> that convolution; before an activation of the residual stream -> a
                                            depthwise 1x1 convolution, since the stream itself goes on unchanged

What is left is Conv2d, Linear and activations (Conv1d in the gate of ECA rows), the same function to rounding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normfree.deploy.packed_conv2d import PackedConv2d
from normfree.models.layers import Conv2d, EfficientChannelAttention, SqueezeExcite, WSConv2d
from normfree.models.net import Block, Net, Stem
from normfree.surgery.batchnorm import factor_and_shift

#: A branch multiplied by less is shut: next to a stream of about 1 it is beyond float32, and its inverse, which the
#: gate would need, soon is too.
CLOSED = 1e-20


@torch.no_grad()
def fold(net: Net) -> Net:
    """A copy of `net`, in evaluation mode, with the same outputs (relative error about 1e-6 in float32) and fewer
    parameters. `net` stays as it is, and is the one to train on.

    Stochastic depth and dropout are gone from the copy; gradients flow, but training it is training another network.
    On a CPU and without gradients its convolutions lay out their kernels once for inputs of one shape, which takes as
    much memory again (`PackedConv2d`). Works for every row and for batch-norm twins, which are folded with their
    running statistics. Folded copies come back as they are.

    Raises:
        TypeError: `net` is no network of ours.
    """
    if not isinstance(net, Net):
        raise TypeError(f"fold takes a network of normfree.create_model, not {type(net).__name__}.")
    folded = copy.deepcopy(net).eval()
    _fold_stem(folded.stem)
    for stage in folded.stages:
        for block in stage.children():
            assert isinstance(block, Block)
            _fold_block(block)
    _fold_head(folded)
    return folded


# --- the parts ---------------------------------------------------------------------------------------


def _fold_stem(stem: Stem) -> None:
    for i in range(stem.depth):
        norm = getattr(stem, f"norm{i + 1}", None)
        conv, rest = _plain(getattr(stem, f"conv{i}"), norm)
        setattr(stem, f"conv{i}", conv)
        if norm is not None:
            setattr(stem, f"norm{i + 1}", rest)


def _fold_block(block: Block) -> None:
    block.norm0 = _affine(block.norm0)
    block.conv0, block.norm1 = _plain(block.conv0, block.norm1)
    if block.second_conv:
        block.conv1, block.norm1b = _plain(block.conv1, block.norm1b)
        block.conv1b, block.norm2 = _plain(block.conv1b, block.norm2)
    else:
        block.conv1, block.norm2 = _plain(block.conv1, block.norm2)
    block.conv2, _ = _plain(block.conv2)
    if block.transition:
        block.conv_shortcut, _ = _plain(block.conv_shortcut)
    # the branch is multiplied by a constant, which its last convolution can carry; a gate that looks at the branch
    # must then see it without
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
    if net.final_conv is not None:
        net.final_conv, net.final_norm = _plain(net.final_conv, net.final_norm)
    else:
        net.final_norm = _affine(net.final_norm)
    scale = net.remove_head_scale_()
    if isinstance(net.head, nn.Linear):
        net.head.weight.mul_(scale)
    net.folded = True


# --- the arithmetic ----------------------------------------------------------------------------------


def _plain(conv: nn.Module, norm: nn.Module | None = None) -> tuple[Conv2d, nn.Module]:
    """An ordinary convolution for a standardized or plain one, with the norm behind it; and nothing in its place."""
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
    """A depthwise 1x1 convolution for a batch norm that has no convolution before it."""
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
    """gate(y) * factor * y, with y from `conv`, as gate'(y') * y' with y' = factor * y."""
    assert isinstance(gate, SqueezeExcite | EfficientChannelAttention)
    first = gate.fc0 if isinstance(gate, SqueezeExcite) else gate.conv
    if abs(factor) < CLOSED:  # whatever the gate says
        factor = 0.0
    else:
        first.weight.div_(factor)
    _scale(conv, factor)
