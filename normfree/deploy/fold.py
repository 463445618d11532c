"""`fold`: convert a trained network to one of plain layers, with all constants and norms in their weights.

    weight standardization, gain, β, γ   -> the weight of the convolution itself
    α, skip gain, the gate's factor 2    -> the last convolution of the branch, with the inverse in the gate
    γ of the pooled features             -> the classifier
    batch norm after a convolution       -> that convolution
    batch norm of the residual stream    -> a depthwise 1x1 convolution, since the stream itself must not change

Only Conv2d, Linear and activations remain (and Conv1d in the gate of ECA variants): the same function to rounding.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from normfree.deploy.packed_conv2d import PackedConv2d
from normfree.models.layers import Conv2d, EfficientChannelAttention, SqueezeExcite, WSConv2d
from normfree.models.net import Block, Net, Stem
from normfree.suggest import problem
from normfree.surgery.batchnorm import factor_and_shift

# A branch with a smaller factor is treated as closed. Added to a stream of about 1, it is below the resolution of
# float32, and the inverse factor, which the gate needs, would soon overflow.
CLOSED = 1e-20


@torch.no_grad()
def fold(net: Net) -> Net:
    """Return a copy of `net` in evaluation mode with plain layers, the same outputs and fewer parameters.

    The relative difference of the outputs is about 1e-6 in float32. `net` is not changed; keep it for further training,
    since the copy has neither stochastic depth nor dropout, and its weights are no longer standardized. On a CPU and
    without gradients, the convolutions of the copy pack their weights for inputs of one shape, which takes as much
    memory again (`PackedConv2d`).

    Args:
        net: a network of `create_model`, of any variant. Batch-norm twins are folded with their running statistics.
            A folded network gives an equal copy.

    Raises:
        TypeError: `net` is another module.

    Examples:
        >>> import torch
        >>> from normfree import create_model, fold
        >>> model = create_model("nf_resnet_nano", num_classes=10).eval()
        >>> folded = fold(model)
        >>> images = torch.randn(2, 3, 32, 32)
        >>> torch.allclose(folded(images), model(images), atol=1e-5)
        True
        >>> type(folded.stem.conv0).__name__
        'PackedConv2d'
    """
    if not isinstance(net, Net):
        given = f"fold cannot convert {type(net).__name__}"
        raise TypeError(
            problem(
                given, allowed="networks of normfree.create_model", fix="make the network with create_model"
            )
        )
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
