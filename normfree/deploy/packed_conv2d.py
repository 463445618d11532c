"""Convolutions that keep their kernel as it is computed with, for inference on a CPU.

oneDNN computes with kernels in blocks, whose form depends on the machine; torch hands it a plain kernel and it is laid
out anew at every call. For a batch of one that is a fifth of the time of NFNet-F0 (docs/speed.md). So it is with the
planes of `winograd`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normfree.models.layers import Conv2d
from normfree.native.dispatch import (
    can_bypass_dispatcher,
    onednn_conv2d,
    onednn_conv2d_is_available,
    pack_onednn_weight,
)
from normfree.ops import winograd
from normfree.ops.conv2d import Activation
from normfree.ops.conv2d_backends import WINOGRAD, Geometry
from normfree.ops.padding import pad_input


class _Packed(NamedTuple):
    """A kernel in oneDNN's layout for inputs of one shape, or its planes if `minimal`; the plain one and its version
    then. Held, its address is nobody else's."""

    kernel: Tensor
    shape: torch.Size
    plain: Tensor
    version: int
    minimal: bool

    def is_of(self, plain: Tensor, shape: torch.Size, minimal: bool) -> bool:
        """Whether it was made of `plain` as that is now, for inputs of this shape, in the form that is asked for."""
        made_of = (self.shape, self.plain.data_ptr(), self.version, self.minimal)
        return made_of == (shape, plain.data_ptr(), plain._version, minimal)


class PackedConv2d(Conv2d):
    """`Conv2d`: the same parameters, the same results to rounding.

    Where nothing is differentiated, on a CPU and in float32, its kernel is laid out once, which takes as much memory
    again, or nearly twice as much for the planes of `winograd`: at the second call in a row with inputs of one shape,
    since the best layout differs from shape to shape. It is laid out anew when it has changed, by anything but writing
    through `.data`, which torch counts nowhere. Everywhere else, and for tools that look at operations, it is the plain
    convolution.
    """

    _packed: _Packed | None = None
    _shape: torch.Size | None = None  # of the call before

    def forward(self, x: Tensor, act: Activation | None = None) -> Tensor:
        """Of `act(x)`, if `act` is given."""
        if not _fits(x, self.weight):
            return super().forward(x, act)
        shape, packed, plain = x.shape, self._packed, self.weight.detach()
        again, self._shape = shape == self._shape, shape
        if not again and (packed is None or packed.shape != shape):
            return super().forward(x, act)
        size, stride = self.weight.shape[-1], self.stride[0]
        x, sides = pad_input(x if act is None else act(x), size, stride, padding=self.pad_mode)
        geometry = Geometry(stride, sides, self.groups)
        minimal = WINOGRAD.supports(x, plain, self.bias, geometry, has_planes=True)
        if packed is None or not packed.is_of(plain, shape, minimal):
            if minimal:
                kernel = winograd.filter_planes(plain, groups=self.groups)
            else:
                kernel = pack_onednn_weight(plain, x.shape, **geometry._asdict())
            self._packed = packed = _Packed(kernel, shape, plain, plain._version, minimal)
        if minimal:
            return winograd.conv2d_with_planes(x, packed.kernel, self.bias, groups=self.groups)
        return onednn_conv2d(x, packed.kernel, self.bias, **geometry._asdict())

    def __getstate__(self) -> dict[str, Any]:
        """Without the second kernel: copies lay out their own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_packed", "_shape")}


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether a call with `x` is inference in float32 on a CPU that nobody looks into."""
    return (
        can_bypass_dispatcher()
        and type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not weight.is_inference()  # those have no version
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and onednn_conv2d_is_available()
    )
