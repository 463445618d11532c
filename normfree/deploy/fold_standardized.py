"""Folding of weight standardization in convolutions of other libraries.

The weight is not computed by a formula of our own. It is the one that the module itself passes to PyTorch's
convolution, observed on two probes, so the folded convolution has the same outputs bit for bit. What the probes do not
prove is left: a weight that depends on the input, more than one convolution, other operations before or after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from normfree.ops.padding import same_padding

# Convolutions with weight standardization, by module and class name. Other classes are named by the caller, because
# many repositories have a class of the same name with another formula.
KNOWN = frozenset(
    {
        ("timm.layers.std_conv", "StdConv2d"),
        ("timm.layers.std_conv", "StdConv2dSame"),
        ("timm.layers.std_conv", "ScaledStdConv2d"),
        ("timm.layers.std_conv", "ScaledStdConv2dSame"),
        ("timm.models.layers.std_conv", "StdConv2d"),
        ("timm.models.layers.std_conv", "StdConv2dSame"),
        ("timm.models.layers.std_conv", "ScaledStdConv2d"),
        ("timm.models.layers.std_conv", "ScaledStdConv2dSame"),
        ("transformers.models.bit.modeling_bit", "WeightStandardizedConv2d"),
        ("bit_pytorch.models", "StdConv2d"),
        ("normfree.surgery.standardized_conv", "Standardized"),
    }
)
_CONVS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class SameConv2d(nn.Conv2d):
    """Plain convolution that pads its input by the SAME rule of XLA, for any stride and dilation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the padded input."""
        return super().forward(pad_same(x, self.kernel_size, self.stride, self.dilation))


def pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Pad the last dimensions of `x` with zeros by the SAME rule; odd padding goes to the end."""
    sides: list[int] = []
    for axis in range(len(kernel_size), 0, -1):
        span = (kernel_size[axis - 1] - 1) * dilation[axis - 1] + 1
        sides += same_padding(x.shape[axis - len(kernel_size) - 1], span, stride[axis - 1])
    return F.pad(x, sides) if any(sides) else x


def is_standardized(module: nn.Module, classes: Sequence[type[nn.Module]] = ()) -> bool:
    """Return True if the class of a module is one of `KNOWN` or of `classes`; a subclass is not."""
    kind = type(module)
    return (kind.__module__, kind.__qualname__) in KNOWN or kind in classes


class NotFoldableError(ValueError):
    """A layer that cannot be folded; the message is the reason."""


@torch.no_grad()
def folded_conv(module: nn.Module) -> nn.Module:
    """Return a plain convolution with the outputs of `module`, a convolution with weight standardization.

    Raises:
        NotFoldableError: the module does something else than one convolution with a constant weight.
    """
    conv = module if isinstance(module, _ConvNd) else getattr(module, "conv", None)
    kind = next((k for k in _CONVS if isinstance(conv, k)), None)
    if kind is None or not isinstance(conv, _ConvNd):
        raise NotFoldableError("it is not a Conv1d, Conv2d or Conv3d")
    if any(tensor.is_meta for tensor in module.parameters()):
        raise NotFoldableError("its weights are on the meta device")
    calls = [_observe(module, probe, kind) for probe in _probes(conv)]
    first, second = calls
    if not torch.equal(first.weight, second.weight):
        raise NotFoldableError("its weight depends on the input")
    if first.bias is not second.bias and (
        first.bias is None or second.bias is None or not torch.equal(first.bias, second.bias)
    ):
        raise NotFoldableError("its bias depends on the input")
    options = first.options
    size, dims = tuple(first.weight.shape[2:]), conv.weight.dim() - 2
    stride, dilation = (_per_axis(options[k], dims) for k in ("stride", "dilation"))
    if all(call.read is call.given for call in calls):
        made: type[nn.Module] = kind
    elif kind is nn.Conv2d and all(
        torch.equal(call.read, pad_same(call.given, size, stride, dilation)) for call in calls
    ):
        made = SameConv2d
    else:
        raise NotFoldableError("it changes its input in another way than SAME padding")
    weight, groups = first.weight, int(options["groups"])
    plain = made(
        weight.shape[1] * groups, weight.shape[0], size, stride=stride, padding=options["padding"],
        dilation=dilation, groups=groups, bias=first.bias is not None, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    assert isinstance(plain, _ConvNd)
    # The memory format is part of the speed, so it is kept.
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=conv.weight.requires_grad)
    if first.bias is not None:
        plain.bias = nn.Parameter(first.bias.detach().clone(), requires_grad=first.bias.requires_grad)
    return plain.train(module.training)


class _Call(NamedTuple):
    """The one convolution that a module computed: its tensors, its options, and the module's own input."""

    given: Tensor
    read: Tensor
    weight: Tensor
    bias: Tensor | None
    options: dict[str, Any]


class _Observer(TorchFunctionMode):
    """Records the calls of PyTorch's convolution functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CONVS.values():
            given = dict(zip(_NAMES, args, strict=False)) | (kwargs or {})
            self.calls.append((func, given, result))
        return result


def _observe(module: nn.Module, probe: Tensor, kind: type[nn.Module]) -> _Call:
    """Run the module on a probe and return the convolution that it computed."""
    try:
        with _Observer() as observer:
            result = module(probe)
    # The class is not ours, so it may raise anything.
    except Exception as error:
        raise NotFoldableError(f"it fails on a probe ({type(error).__name__})") from None
    if len(observer.calls) != 1 or observer.calls[0][0] is not _CONVS[kind]:
        raise NotFoldableError(f"it calls {len(observer.calls)} convolution functions, not one")
    _, given, output = observer.calls[0]
    if output is not result:
        raise NotFoldableError("it changes the output of its convolution")
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | {
        k: given[k] for k in given if k in _NAMES[3:]
    }
    return _Call(probe, given["input"], given["weight"], given.get("bias"), options)


def _probes(conv: _ConvNd) -> Iterator[Tensor]:
    """Yield two random inputs of different sizes, in which SAME padding differs from symmetric padding."""
    generator = torch.Generator().manual_seed(0)
    for extra in (0, 1):
        sizes = [
            (k - 1) * d + 2 * s + 1 + (axis + extra) % 2
            for axis, (k, d, s) in enumerate(zip(conv.kernel_size, conv.dilation, conv.stride, strict=True))
        ]
        probe = torch.randn(2, conv.in_channels, *sizes, generator=generator)
        yield probe.to(conv.weight.device, conv.weight.dtype)


def _per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return an option of a convolution as one number for each axis."""
    return (value,) * dims if isinstance(value, int) else tuple(value)
