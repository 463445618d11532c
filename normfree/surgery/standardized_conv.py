"""Scaled weight standardization for any convolution."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from normfree.models.layers import standardize
from normfree.suggest import problem


class Standardized(nn.Module):
    """Any convolution with scaled weight standardization, as in `WSConv2d`.

    It keeps the padding, stride, dilation and groups of the convolution. The parameters are `conv.weight`, `conv.bias`
    and a `gain` for each output channel. Initially, the standardized weight is equal to the weight of `conv` minus the
    means of its filters. The norm of each filter of `conv.weight` has no effect and is set to 1, which is large
    compared to the eps of `standardize`.

    Args:
        conv: the convolution, which becomes a submodule and is modified; it gets a bias if it has none.
        input_scale: a constant factor of the input, included in the weight, as in `WSConv2d`.

    Raises:
        ValueError: `conv` is not a convolution or its fan-in is 1, so that every standardized weight would be 0.
    """

    def __init__(self, conv: nn.Module, *, input_scale: float = 1.0) -> None:
        super().__init__()
        if not can_be_standardized(conv):
            raise ValueError(
                problem(f"conv is {conv}", allowed="convolutions, not transposed, with a fan-in above 1")
            )
        assert isinstance(conv, _ConvNd)
        self.conv, self.input_scale = conv, input_scale
        filters = conv.weight.detach().flatten(1)
        centered = filters - filters.mean(dim=1, keepdim=True)
        norm = centered.norm(dim=1)
        self.gain = nn.Parameter(norm / input_scale)
        if conv.bias is None:
            conv.bias = nn.Parameter(filters.new_zeros(len(filters)))
        fill = nn.init.normal_(torch.empty_like(centered), std=filters.shape[1] ** -0.5)
        unit = torch.where(norm[:, None] > 0, centered / norm[:, None], fill)
        with torch.no_grad():
            conv.weight.copy_(unit.view_as(conv.weight))

    def standardized_weight(self) -> Tensor:
        """Return the weight that the convolution uses, O I H W."""
        weight = self.conv.weight
        assert isinstance(weight, Tensor)
        return standardize(weight, self.gain, scale=self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional_call(self.conv, {"weight": self.standardized_weight()}, (x,))
        return out

    def extra_repr(self) -> str:
        return f"input_scale={self.input_scale:.6g}"


def can_be_standardized(module: nn.Module) -> bool:
    """Return True for a convolution that is not transposed, not parametrized and has a fan-in above 1."""
    return (
        isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and not parametrize.is_parametrized(module)
        and module.weight[0].numel() > 1
    )


def scales_with_weight(conv: nn.Module) -> bool:
    """Return True if doubling the weight doubles the output without bias, so the class uses its weight unchanged."""
    assert isinstance(conv, _ConvNd)
    if type(conv).__module__.startswith("torch.nn."):
        return True
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, conv.in_channels, *[16] * (conv.weight.dim() - 2), generator=generator).to(
        conv.weight
    )
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.bias = None
        once = twin(probe)
        twin.weight.mul_(2)
        return torch.allclose(twin(probe), 2 * once, rtol=1e-3, atol=1e-5)
