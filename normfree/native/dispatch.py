"""How tensors lie in memory, and whether anything looks at what is done to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i in memory is the same element in both, which have one shape; strides of dimensions of size 1 do
    not count."""
    if a.stride() == b.stride():
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the memory format of `like`; itself if it has that."""
    if same_layout(tensor, like):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def is_dense(tensor: Tensor) -> bool:
    """Whether it is contiguous, or channels_last: no gaps, and dimension 0 outermost."""
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a compiled kernel may work on it: a tensor and nothing more, on a CPU, in float32, without gaps."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.dtype == torch.float32
        and is_dense(tensor)
    )


def unwatched() -> bool:
    """Whether nothing has to see torch's own operations: no compiler, trace, transform of functions, forward-mode
    gradient or dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit._trace.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def eager_training() -> bool:
    """Whether to leave the plain path: it is taken without gradients, which keep nothing, under torch.compile, which
    decides by itself what to keep, and inside torch.func's transforms, which see only plain operations."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )
