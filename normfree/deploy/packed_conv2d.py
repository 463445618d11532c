"""Convolutions that keep their weight in the layout of the implementation, for inference on a CPU.

oneDNN uses weights in blocks whose form depends on the machine. PyTorch passes it the plain weight, which is then
reordered at every call; for a batch of one image that takes a fifth of the time of NFNet-F0 (docs/speed.md). Likewise,
the planes of `winograd` are computed only once.
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
from normfree.ops.conv2d_backends import Geometry, can_use_winograd
from normfree.ops.padding import pad_input


class _Packed(NamedTuple):
    """A weight in oneDNN's layout for inputs of one shape, or its planes if `is_planes`.

    `source` is the weight that it was made from, at `version`. It is kept, so no other tensor can get its address.
    """

    weight: Tensor
    shape: torch.Size
    source: Tensor
    version: int
    is_planes: bool

    def is_current(self, weight: Tensor, shape: torch.Size, is_planes: bool) -> bool:
        """Return True if it was made from `weight` as it is now, for inputs of `shape`, in the form asked for."""
        made_from = (self.shape, self.source.data_ptr(), self.version, self.is_planes)
        return made_from == (shape, weight.data_ptr(), weight._version, is_planes)


class PackedConv2d(Conv2d):
    """`Conv2d` with the same parameters, and the same results to rounding, but faster inference on a CPU.

    Without gradients, on a CPU and in float32, the weight is packed once. This takes as much memory again, or nearly
    twice as much for the planes of `winograd`. It is packed at the second of two successive calls with inputs of one
    shape, since the best layout depends on the shape, and packed again when the weight has changed. Only writing
    through `.data` is not noticed, because PyTorch does not count it. In all other cases, and for tools that observe
    operations, it is the plain convolution.
    """

    _packed: _Packed | None = None
    _shape: torch.Size | None = None  # of the last input

    def forward(self, x: Tensor, *, act: Activation | None = None) -> Tensor:
        """Return the convolution of `x`, or of `act(x)`."""
        if not _can_pack(x, self.weight):
            return super().forward(x, act=act)
        shape, packed, weight = x.shape, self._packed, self.weight.detach()
        again, self._shape = shape == self._shape, shape
        if not again and (packed is None or packed.shape != shape):
            return super().forward(x, act=act)
        size, stride = weight.shape[-1], self.stride[0]
        x, sides = pad_input(x if act is None else act(x), size, stride, padding=self.pad_mode)
        geometry = Geometry(stride, sides, self.groups)
        side = 0
        if can_use_winograd(x, weight, self.bias, geometry):
            side = winograd.output_side(x, weight, groups=self.groups, packed=True)
        planes = side > 0
        if packed is None or not packed.is_current(weight, shape, planes):
            if planes:
                made = winograd.filter_planes(weight, groups=self.groups, side=side)
            else:
                made = pack_onednn_weight(weight, x.shape, **geometry._asdict())
            self._packed = packed = _Packed(made, shape, weight, weight._version, planes)
        if planes:
            return winograd.conv2d_with_planes(x, packed.weight, self.bias, groups=self.groups)
        return onednn_conv2d(x, packed.weight, self.bias, **geometry._asdict())

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the packed weight; copies make their own."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_packed", "_shape")}


def _can_pack(x: Tensor, weight: Tensor) -> bool:
    """Return True for inference in float32 on a CPU without anything that observes operations."""
    return (
        can_bypass_dispatcher()
        and type(x) is Tensor
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not weight.is_inference()  # those have no version counter
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and onednn_conv2d_is_available()
    )
